#include "troupe/kernels/cpu/fast_ops.hpp"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <limits>

#include "troupe/kernels/cpu/bf16.hpp"

namespace troupe::kernels::cpu {

namespace {

/// Positions of one item where threads share a row, a multiple of 8.
constexpr std::int32_t kScorePositions = 32;

/// Panels of values of one item there: even, and enough to make up for softening scores again.
constexpr std::int32_t kValuePanelsOfItem = 8;

/// Rows whose keys are worth writing on several threads.
constexpr std::int64_t kAppendWork = 1 << 3;

float* row_of(const rows_view& rows, std::int32_t row) {
  return static_cast<float*>(rows.data) + std::int64_t{row} * rows.stride;
}

const std::int32_t* table_of(const batch_view& batch, std::int32_t row) {
  return batch.block_tables.data() + batch.block_table_offsets[batch.sequences[row]];
}

/// Where the key of a position lies in the pages of its layer.
std::uint16_t* key_of(const kv_layer_view& kv, const std::int32_t* table, std::int32_t position) {
  const std::int64_t page = table[position / kv.page_tokens];
  assert(page >= 0 && page < kv.num_pages);
  return static_cast<std::uint16_t*>(kv.data)
         + (page * kv.page_tokens + position % kv.page_tokens)
             * (std::int64_t{kv.latent_dim} + kv.rope_dim);
}

std::int32_t ceil_div(std::int32_t a, std::int32_t b) {
  return (a + b - 1) / b;
}

/// Nothing attended to yet.
void clear_part(float* part, std::int32_t latent_dim) {
  std::fill_n(part, kAttentionHeads, -std::numeric_limits<float>::infinity());
  std::fill(part + kAttentionHeads, part + part_floats(latent_dim), 0.0F);
}

} // namespace

void fast_ops::append_kv(const rows_view& latent, const rows_view& rope_key,
                         const batch_view& batch, const kv_layer_view& kv) {
  const std::int64_t work = (std::int64_t{kv.latent_dim} + kv.rope_dim) * kAppendWork;
  for_rows(latent.num_rows, work, [&](std::int32_t m, std::int32_t) {
    std::uint16_t* key = key_of(kv, table_of(batch, m), batch.positions[m]);
    if (fast_ != nullptr) {
      fast_->round_row(row_of(latent, m), kv.latent_dim, kv.latent_dim, key);
      fast_->round_row(row_of(rope_key, m), kv.rope_dim, kv.rope_dim, key + kv.latent_dim);
      return;
    }
    const float* from = row_of(latent, m);
    key = std::transform(from, from + kv.latent_dim, key, bf16_bits);
    from = row_of(rope_key, m);
    std::transform(from, from + kv.rope_dim, key, bf16_bits);
  });
}

void fast_ops::latent_attention(const rows_view& q_latent, const rows_view& q_rope,
                                std::int32_t q_rope_head_stride, std::int32_t num_heads,
                                float scale, const batch_view& batch, const kv_layer_view& kv,
                                const rows_view& out) {
  const attention_call call{q_latent, q_rope, q_rope_head_stride, num_heads, scale, batch, kv, out};
  if (fast_ == nullptr || kv.latent_dim % 16 != 0 || kv.rope_dim % 2 != 0) {
    return attend_emulated(call);
  }
  const std::int32_t panels = ceil_div(num_heads, kAttentionHeads);
  tiles_.clear();
  for (std::int32_t m = 0; m < q_latent.num_rows; ++m) {
    const std::int32_t length = batch.positions[m] + 1;
    const bool joins = !tiles_.empty() && tiles_.back().count < kAttentionTileRows
                       && batch.sequences[m] == batch.sequences[m - 1];
    if (joins) {
      ++tiles_.back().count;
      tiles_.back().length = std::max(tiles_.back().length, length);
    } else {
      tiles_.push_back({m, 1, length});
    }
  }
  const std::int64_t tasks = static_cast<std::int64_t>(tiles_.size()) * panels;
  if (tasks >= 2 * pool().size() || pool().size() == 1) {
    attend_by_tile(call);
  } else {
    attend_together(call);
  }
}

fast_attention_args fast_ops::attention_of(const attention_call& call, std::int32_t row,
                                           std::int32_t first_head) {
  fast_attention_args args;
  args.num_heads = std::min(kAttentionHeads, call.num_heads - first_head);
  args.scale = call.scale;
  args.pages = static_cast<const std::uint16_t*>(call.kv.data);
  args.table = table_of(call.batch, row);
  args.page_tokens = call.kv.page_tokens;
  args.latent_dim = call.kv.latent_dim;
  args.rope_dim = call.kv.rope_dim;
  return args;
}

void fast_ops::pack_row(const attention_call& call, std::int32_t row, std::int32_t first_head,
                        std::uint16_t* out) {
  const std::int32_t latent_dim = call.kv.latent_dim;
  const std::int32_t heads = std::min(kAttentionHeads, call.num_heads - first_head);
  fast_->pack_queries(row_of(call.q_latent, row) + std::int64_t{first_head} * latent_dim,
                      latent_dim,
                      row_of(call.q_rope, row) + std::int64_t{first_head} * call.q_rope_head_stride,
                      call.q_rope_head_stride, heads, latent_dim, call.kv.rope_dim, out);
}

/// One thread computes all blocks of a tile of rows, one after the other.
void fast_ops::attend_by_tile(const attention_call& call) {
  const std::int32_t latent_dim = call.kv.latent_dim;
  const std::int64_t query_size = (std::int64_t{latent_dim} + call.kv.rope_dim) * kAttentionHeads;
  const std::int32_t panels = ceil_div(call.num_heads, kAttentionHeads);
  const auto tasks = static_cast<std::int32_t>(tiles_.size()) * panels;
  pool().run(tasks, [&](std::int32_t task, std::int32_t thread) {
    const attention_tile& tile = tiles_[task / panels];
    const std::int32_t first_head = task % panels * kAttentionHeads;
    thread_memory& memory = memory_[thread];
    std::uint16_t* queries = memory.queries.take(query_size * kAttentionTileRows);
    float* parts = memory.parts.take(part_floats(latent_dim) * kAttentionTileRows);
    unsigned char* scratch = memory.attention.take(attend_scratch(latent_dim));
    fast_attention_args args = attention_of(call, tile.first, first_head);
    args.num_rows = tile.count;
    for (std::int32_t r = 0; r < tile.count; ++r) {
      args.queries[r] = queries + r * query_size;
      args.parts[r] = parts + r * part_floats(latent_dim);
      args.lengths[r] = call.batch.positions[tile.first + r] + 1;
      pack_row(call, tile.first + r, first_head, queries + r * query_size);
      clear_part(args.parts[r], latent_dim);
    }
    for (std::int32_t position = 0; position < tile.length; position += kAttentionBlock) {
      fast_->attend_block(args, position, scratch);
      tick();
    }
    for (std::int32_t r = 0; r < tile.count; ++r) {
      fast_->finish_part(args.parts[r] + kPartHead, args.parts[r] + kAttentionHeads, args.num_heads,
                         latent_dim, 0, latent_dim / kAttentionHeads,
                         row_of(call.out, tile.first + r) + std::int64_t{first_head} * latent_dim);
    }
  });
}

/// Threads share the positions of each row, then its values.
void fast_ops::attend_together(const attention_call& call) {
  const std::int32_t latent_dim = call.kv.latent_dim;
  const std::int64_t query_size = (std::int64_t{latent_dim} + call.kv.rope_dim) * kAttentionHeads;
  const std::int32_t panels = ceil_div(call.num_heads, kAttentionHeads);
  const std::int32_t value_panels = latent_dim / 16;
  std::uint16_t* queries = queries_.take(query_size);
  float* part = parts_.take(part_floats(latent_dim));
  for (std::int32_t task = 0; task < call.q_latent.num_rows * panels; ++task) {
    const std::int32_t row = task / panels;
    const std::int32_t first_head = task % panels * kAttentionHeads;
    fast_attention_args args = attention_of(call, row, first_head);
    const std::int32_t length = call.batch.positions[row] + 1;
    args.num_rows = 1;
    args.queries[0] = queries;
    args.parts[0] = part;
    args.lengths[0] = length;
    pack_row(call, row, first_head, queries);
    float* scores = scores_.take(std::int64_t{length + kScorePositions} * kAttentionHeads);
    pool().run(ceil_div(length, kScorePositions), [&](std::int32_t i, std::int32_t) {
      const std::int32_t first = i * kScorePositions;
      fast_->score_positions(args, first, std::min(kScorePositions, length - first),
                             scores + std::int64_t{first} * kAttentionHeads);
      tick();
    });
    pool().run(
      ceil_div(value_panels, kValuePanelsOfItem), [&](std::int32_t i, std::int32_t thread) {
        const std::int32_t first = i * kValuePanelsOfItem;
        const std::int32_t last = std::min(value_panels, first + kValuePanelsOfItem);
        alignas(64) float state[2 * kAttentionHeads];
        std::fill_n(state, kAttentionHeads, -std::numeric_limits<float>::infinity());
        std::fill_n(state + kAttentionHeads, kAttentionHeads, 0.0F);
        for (std::int32_t h = 0; h < kAttentionHeads; ++h) {
          std::fill_n(part + kPartHead + std::int64_t{h} * latent_dim + first * 16,
                      (last - first) * 16, 0.0F);
        }
        unsigned char* scratch = memory_[thread].attention.take(attend_scratch(latent_dim));
        for (std::int32_t position = 0; position < length; position += kAttentionBlock) {
          fast_->attend_panels(args, position, scores + std::int64_t{position} * kAttentionHeads,
                               first, last, state, scratch);
          tick();
        }
        fast_->finish_part(part + kPartHead, state + kAttentionHeads, args.num_heads, latent_dim,
                           first, last,
                           row_of(call.out, row) + std::int64_t{first_head} * latent_dim);
      });
  }
}

/// The same roundings in plain loops, a head of a row at a time.
void fast_ops::attend_emulated(const attention_call& call) {
  const std::int32_t latent_dim = call.kv.latent_dim;
  const std::int32_t width = latent_dim + call.kv.rope_dim;
  const std::int32_t tasks = call.q_latent.num_rows * call.num_heads;
  pool().run(tasks, [&](std::int32_t task, std::int32_t thread) {
    const std::int32_t row = task / call.num_heads;
    const std::int32_t head = task % call.num_heads;
    const std::int32_t length = call.batch.positions[row] + 1;
    const std::int32_t* table = table_of(call.batch, row);
    float* query = memory_[thread].parts.take(width + length);
    float* scores = query + width;
    const float* latent = row_of(call.q_latent, row) + std::int64_t{head} * latent_dim;
    const float* rope = row_of(call.q_rope, row) + std::int64_t{head} * call.q_rope_head_stride;
    std::transform(latent, latent + latent_dim, query, nearest_bf16);
    std::transform(rope, rope + call.kv.rope_dim, query + latent_dim, nearest_bf16);
    float largest = -std::numeric_limits<float>::infinity();
    for (std::int32_t i = 0; i < length; ++i) {
      const std::uint16_t* key = key_of(call.kv, table, i);
      float sum = 0.0F;
      for (std::int32_t d = 0; d < width; ++d) {
        sum += query[d] * bf16_value(key[d]);
      }
      scores[i] = sum * call.scale;
      largest = std::max(largest, scores[i]);
      if (i % (kAttentionBlock * 16) == 0) {
        tick();
      }
    }
    float* out = row_of(call.out, row) + std::int64_t{head} * latent_dim;
    std::fill_n(out, latent_dim, 0.0F);
    float sum = 0.0F;
    for (std::int32_t i = 0; i < length; ++i) {
      const float weight = std::exp(scores[i] - largest);
      sum += weight;
      const float rounded = nearest_bf16(weight);
      const std::uint16_t* key = key_of(call.kv, table, i);
      for (std::int32_t d = 0; d < latent_dim; ++d) {
        out[d] += rounded * bf16_value(key[d]);
      }
    }
    for (std::int32_t d = 0; d < latent_dim; ++d) {
      out[d] /= sum;
    }
  });
}

} // namespace troupe::kernels::cpu
