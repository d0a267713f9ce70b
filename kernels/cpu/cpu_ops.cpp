#include "troupe/kernels/cpu/cpu_ops.hpp"

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "troupe/kernels/cpu/fast_ops.hpp"
#include "troupe/kernels/cpu/rank_group.hpp"
#include "troupe/kernels/cpu/router.hpp"

namespace troupe::kernels {

std::size_t size_of(element_type type) {
  switch (type) {
  case element_type::f32: return 4;
  case element_type::bf16:
  case element_type::f16: return 2;
  case element_type::f8_e4m3:
  case element_type::i8:
  case element_type::i4: return 1;
  }
  return 0;
}

std::size_t row_bytes(element_type type, std::int32_t num_cols) {
  const auto elements = static_cast<std::size_t>(num_cols);
  return type == element_type::i4 ? (elements + 1) / 2 : elements * size_of(type);
}

std::unique_ptr<ops> make_cpu_ops(std::int32_t num_threads, std::atomic<std::uint64_t>* progress,
                                  numerics mode, std::shared_ptr<cpu_rank_group> group,
                                  std::int32_t rank) {
  std::unique_ptr<cpu::cpu_ops> made;
  if (mode == numerics::fast) {
    made = std::make_unique<cpu::fast_ops>(cpu::choose_kernels(), cpu::choose_fast_kernels(),
                                           num_threads, progress);
  } else {
    made = std::make_unique<cpu::cpu_ops>(cpu::choose_kernels(), num_threads, progress);
  }
  made->join(std::move(group), rank);
  return made;
}

namespace cpu {

namespace {

/// Products (or elements) worth waking another thread for: some 5 us of work.
constexpr std::int64_t kWorkOfChunk = 1 << 16;

/// Rows that share a panel of weights before a tick.
constexpr std::int32_t kRowsOfTick = 512;

/// Bytes between two ticks where memory is only moved.
constexpr std::size_t kBytesOfTick = std::size_t{1} << 24;

/// Chunks a thread, so that one that comes late has not much to catch up on.
constexpr std::int32_t kChunksPerThread = 4;

float* row_of(const rows_view& rows, std::int32_t row) {
  return static_cast<float*>(rows.data) + std::int64_t{row} * rows.stride;
}

/// Where the key of a position lies in the pages of its layer.
float* key_of(const kv_layer_view& kv, const std::int32_t* table, std::int32_t position) {
  const std::int64_t page = table[position / kv.page_tokens];
  assert(page >= 0 && page < kv.num_pages);
  return static_cast<float*>(kv.data)
         + (page * kv.page_tokens + position % kv.page_tokens)
             * (std::int64_t{kv.latent_dim} + kv.rope_dim);
}

const std::int32_t* table_of(const batch_view& batch, std::int32_t row) {
  return batch.block_tables.data() + batch.block_table_offsets[batch.sequences[row]];
}

} // namespace

cpu_ops::cpu_ops(const kernel_table& kernels, std::int32_t num_threads,
                 std::atomic<std::uint64_t>* progress)
  : kernels_(kernels),
    progress_(progress == nullptr ? &unwatched_ : progress),
    pool_(std::max(num_threads, 1)),
    memory_(pool_.size()) {
  description_ = std::string("cpu (") + kernels_.name + ", " + std::to_string(pool_.size())
                 + (pool_.size() == 1 ? " thread)" : " threads)");
}

std::shared_ptr<void> cpu_ops::allocate(std::size_t bytes) {
  void* memory = allocate_aligned(bytes);
  if (memory == nullptr) {
    return nullptr;
  }
  for (std::size_t at = 0; at < bytes; at += kBytesOfTick) {
    std::memset(static_cast<char*>(memory) + at, 0, std::min(kBytesOfTick, bytes - at));
    tick();
  }
  return {memory, std::free};
}

void cpu_ops::copy_to_host(const rows_view& from, void* to) {
  const auto bytes = static_cast<std::size_t>(from.num_cols) * 4;
  for (std::int32_t m = 0; m < from.num_rows; ++m) {
    std::memcpy(static_cast<char*>(to) + m * bytes, row_of(from, m), bytes);
    tick_at_row(m);
  }
}

void cpu_ops::copy_from_host(const void* from, const rows_view& to) {
  const auto bytes = static_cast<std::size_t>(to.num_cols) * 4;
  for (std::int32_t m = 0; m < to.num_rows; ++m) {
    std::memcpy(row_of(to, m), static_cast<const char*>(from) + m * bytes, bytes);
    tick_at_row(m);
  }
}

std::int32_t cpu_ops::num_chunks(std::int64_t work, std::int32_t most) const {
  if (pool_.size() == 1) {
    return 1;
  }
  const std::int64_t wanted =
    std::min<std::int64_t>(work / kWorkOfChunk, std::int64_t{pool_.size()} * kChunksPerThread);
  return static_cast<std::int32_t>(std::clamp<std::int64_t>(wanted, 1, std::max(most, 1)));
}

void cpu_ops::tick_at_row(std::int32_t row) {
  if ((row + 1) % kRowsOfTick == 0) {
    tick();
  }
}

float* cpu_ops::linear_scratch(std::int32_t thread) {
  return memory_[thread].linear.take(kLinearScratch);
}

void cpu_ops::embed(const weight_matrix& table, std::span<const std::int32_t> ids,
                    const rows_view& out) {
  const auto num_rows = static_cast<std::int32_t>(ids.size());
  assert(out.num_cols == table.num_cols && out.num_rows >= num_rows);
  for_rows(num_rows, table.num_cols, [&](std::int32_t m, std::int32_t) {
    assert(ids[m] >= 0 && ids[m] < table.num_rows);
    kernels_.expand_row(table, ids[m], row_of(out, m));
  });
}

void cpu_ops::rms_norm(const rows_view& x, const float* weight, float epsilon,
                       const rows_view& out) {
  for_rows(x.num_rows, 2 * std::int64_t{x.num_cols}, [&](std::int32_t m, std::int32_t) {
    kernels_.rms_norm(row_of(x, m), weight, epsilon, x.num_cols, row_of(out, m));
  });
}

cpu_ops::readable_rows cpu_ops::make_readable(const rows_view& x, std::int32_t num_cols) {
  if (num_cols % kNumLanes == 0) {
    return {static_cast<const float*>(x.data), x.stride};
  }
  const std::int64_t stride = padded(num_cols);
  float* copy = padded_input_.take(x.num_rows * stride);
  for (std::int32_t m = 0; m < x.num_rows; ++m) {
    float* row = copy + m * stride;
    std::copy_n(row_of(x, m), num_cols, row);
    std::fill(row + num_cols, row + stride, 0.0F);
  }
  return {copy, stride};
}

void cpu_ops::multiply(linear_args args, std::int32_t first, std::int32_t last,
                       std::int32_t thread) {
  const std::int32_t num_rows = args.num_rows;
  const float* x = args.x;
  const std::int32_t* rows = args.rows;
  float* out = args.out;
  for (std::int32_t m = 0; m < num_rows; m += kRowsOfTick) {
    args.num_rows = std::min(kRowsOfTick, num_rows - m);
    args.x = rows == nullptr ? x + m * args.x_stride : x;
    args.rows = rows == nullptr ? nullptr : rows + m;
    args.out = out + m * args.out_stride;
    const std::int64_t panel = std::int64_t{args.num_rows} * args.w.num_cols * kPanelColumns;
    const auto step = static_cast<std::int32_t>(
                        std::max<std::int64_t>(kWorkOfTick / std::max<std::int64_t>(panel, 1), 1))
                      * kPanelColumns;
    for (std::int32_t n = first; n < last; n += step) {
      kernels_.linear(args, n, std::min(last, n + step), linear_scratch(thread));
      tick();
    }
  }
}

void cpu_ops::multiply(const linear_args& args) {
  const std::int32_t num_panels = (args.w.num_rows + kPanelColumns - 1) / kPanelColumns;
  const std::int64_t work = std::int64_t{args.num_rows} * args.w.num_rows * args.w.num_cols;
  const std::int64_t chunks = num_chunks(work, num_panels);
  pool_.run(static_cast<std::int32_t>(chunks), [&](std::int32_t chunk, std::int32_t thread) {
    const auto first = static_cast<std::int32_t>(num_panels * chunk / chunks * kPanelColumns);
    const auto last = static_cast<std::int32_t>(num_panels * (chunk + 1) / chunks * kPanelColumns);
    multiply(args, first, std::min(last, args.w.num_rows), thread);
  });
}

void cpu_ops::linear(const rows_view& x, const weight_matrix& w, const rows_view& out) {
  assert(x.num_cols == w.num_cols && out.num_cols == w.num_rows && out.num_rows == x.num_rows);
  const readable_rows input = make_readable(x, w.num_cols);
  multiply({.x = input.data,
            .x_stride = input.stride,
            .rows = nullptr,
            .num_rows = x.num_rows,
            .w = w,
            .out = static_cast<float*>(out.data),
            .out_stride = out.stride});
}

void cpu_ops::linear_per_head(const rows_view& x, std::int32_t x_head_stride,
                              const weight_matrix& w, std::int32_t num_heads, const rows_view& out,
                              std::int32_t out_head_stride) {
  assert(w.scales == nullptr && w.num_rows % num_heads == 0);
  const std::int32_t in_dim = w.num_cols;
  const std::int32_t out_dim = w.num_rows / num_heads;
  const auto head_bytes = std::int64_t{in_dim} * out_dim * static_cast<int>(size_of(w.type));
  const std::int64_t depth = padded(in_dim);
  const bool copied = in_dim % kNumLanes != 0;
  if (copied) {
    float* copy = padded_input_.take(std::int64_t{x.num_rows} * num_heads * depth);
    for (std::int32_t m = 0; m < x.num_rows; ++m) {
      for (std::int32_t h = 0; h < num_heads; ++h) {
        float* row = copy + (std::int64_t{m} * num_heads + h) * depth;
        std::copy_n(row_of(x, m) + std::int64_t{h} * x_head_stride, in_dim, row);
        std::fill(row + in_dim, row + depth, 0.0F);
      }
    }
  }
  const float* input = copied ? padded_input_.take(0) : static_cast<const float*>(x.data);
  const std::int64_t work = std::int64_t{x.num_rows} * num_heads * in_dim * out_dim;
  const std::int64_t chunks = num_chunks(work, num_heads);
  pool_.run(static_cast<std::int32_t>(chunks), [&](std::int32_t chunk, std::int32_t thread) {
    const auto last = static_cast<std::int32_t>(num_heads * (chunk + 1) / chunks);
    for (auto h = static_cast<std::int32_t>(num_heads * chunk / chunks); h < last; ++h) {
      linear_args args;
      args.x = input + h * (copied ? depth : x_head_stride);
      args.x_stride = copied ? num_heads * depth : x.stride;
      args.num_rows = x.num_rows;
      args.w = w;
      args.w.data = static_cast<const char*>(w.data) + h * head_bytes;
      args.w.num_rows = out_dim;
      args.out = static_cast<float*>(out.data) + std::int64_t{h} * out_head_stride;
      args.out_stride = out.stride;
      multiply(args, 0, out_dim, thread);
    }
  });
}

void cpu_ops::find_rotations(std::span<const std::int32_t> positions, const float* inv_freq,
                             std::int32_t num_pairs, float magnitude) {
  const bool known = magnitude == rotated_magnitude_
                     && std::equal(positions.begin(), positions.end(), rotated_positions_.begin(),
                                   rotated_positions_.end())
                     && std::equal(inv_freq, inv_freq + num_pairs, rotated_frequencies_.begin(),
                                   rotated_frequencies_.end());
  if (known) {
    return;
  }
  const auto num_rows = static_cast<std::int32_t>(positions.size());
  float* rotations = rotations_.take(std::int64_t{num_rows} * 4 * num_pairs);
  // Sines cost some forty products each.
  for_rows(num_rows, std::int64_t{num_pairs} * 80, [&](std::int32_t m, std::int32_t) {
    float* cosines = rotations + std::int64_t{m} * 4 * num_pairs;
    float* sines = cosines + 2 * num_pairs;
    for (std::int32_t i = 0; i < num_pairs; ++i) {
      const float angle = static_cast<float>(positions[m]) * inv_freq[i];
      const float cosine = static_cast<float>(std::cos(static_cast<double>(angle))) * magnitude;
      const float sine = static_cast<float>(std::sin(static_cast<double>(angle))) * magnitude;
      cosines[2 * i] = cosines[2 * i + 1] = cosine;
      sines[2 * i] = -sine;
      sines[2 * i + 1] = sine;
    }
  });
  rotated_positions_.assign(positions.begin(), positions.end());
  rotated_frequencies_.assign(inv_freq, inv_freq + num_pairs);
  rotated_magnitude_ = magnitude;
}

void cpu_ops::rope(const rows_view& x, std::int32_t num_heads, std::int32_t head_stride,
                   std::int32_t offset, std::int32_t rope_dim,
                   std::span<const std::int32_t> positions, const float* inv_freq,
                   float magnitude) {
  const std::int32_t num_pairs = rope_dim / 2;
  find_rotations(positions.first(x.num_rows), inv_freq, num_pairs, magnitude);
  const float* rotations = rotations_.take(0);
  for_rows(x.num_rows, 2 * std::int64_t{rope_dim} * num_heads, [&](std::int32_t m, std::int32_t) {
    const float* cosines = rotations + std::int64_t{m} * 4 * num_pairs;
    for (std::int32_t h = 0; h < num_heads; ++h) {
      kernels_.rotate(row_of(x, m) + offset + std::int64_t{h} * head_stride, cosines,
                      cosines + 2 * num_pairs, 2 * num_pairs);
    }
  });
}

void cpu_ops::rope_halves(const rows_view& x, std::int32_t num_heads, std::int32_t head_stride,
                          std::int32_t offset, std::int32_t rope_dim,
                          std::span<const std::int32_t> positions, const float* inv_freq,
                          float magnitude) {
  const std::int32_t num_pairs = rope_dim / 2;
  find_rotations(positions.first(x.num_rows), inv_freq, num_pairs, magnitude);
  const float* rotations = rotations_.take(0);
  for_rows(x.num_rows, 2 * std::int64_t{rope_dim} * num_heads, [&](std::int32_t m, std::int32_t) {
    const float* cosines = rotations + std::int64_t{m} * 4 * num_pairs;
    const float* sines = cosines + 2 * num_pairs;
    for (std::int32_t h = 0; h < num_heads; ++h) {
      float* head = row_of(x, m) + offset + std::int64_t{h} * head_stride;
      for (std::int32_t i = 0; i < num_pairs; ++i) {
        const float first = head[i];
        const float second = head[num_pairs + i];
        const float sine = sines[2 * i + 1];
        head[i] = first * cosines[2 * i] - second * sine;
        head[num_pairs + i] = first * sine + second * cosines[2 * i];
      }
    }
  });
}

void cpu_ops::append_kv(const rows_view& latent, const rows_view& rope_key, const batch_view& batch,
                        const kv_layer_view& kv) {
  for (std::int32_t m = 0; m < latent.num_rows; ++m) {
    float* key = key_of(kv, table_of(batch, m), batch.positions[m]);
    std::copy_n(row_of(latent, m), kv.latent_dim, key);
    std::copy_n(row_of(rope_key, m), kv.rope_dim, key + kv.latent_dim);
  }
}

void cpu_ops::latent_attention(const rows_view& q_latent, const rows_view& q_rope,
                               std::int32_t q_rope_head_stride, std::int32_t num_heads, float scale,
                               const batch_view& batch, const kv_layer_view& kv,
                               const rows_view& out) {
  std::int64_t work = 0;
  for (std::int32_t m = 0; m < q_latent.num_rows; ++m) {
    work += std::int64_t{batch.positions[m] + 1} * num_heads * (2 * kv.latent_dim + kv.rope_dim);
  }
  // Heads that share a pass over the keys: as many as fit, but enough groups for all threads.
  const std::int32_t chunks = num_chunks(work, q_latent.num_rows * num_heads);
  std::int32_t group = kMaxAttentionHeads;
  while (group > 4 && q_latent.num_rows * ((num_heads + group - 1) / group) < chunks) {
    group /= 2;
  }
  const std::int32_t num_groups = (num_heads + group - 1) / group;
  const std::int32_t num_tasks = q_latent.num_rows * num_groups;
  const auto work_on = [&](std::int32_t task, std::int32_t thread) {
    const std::int32_t m = task / num_groups;
    const std::int32_t first = task % num_groups * group;
    const std::int32_t last = std::min(num_heads, first + group);
    attention_args args;
    args.q_latent = row_of(q_latent, m);
    args.q_rope = row_of(q_rope, m);
    args.q_rope_head_stride = q_rope_head_stride;
    args.scale = scale;
    args.pages = static_cast<const float*>(kv.data);
    args.table = table_of(batch, m);
    args.page_tokens = kv.page_tokens;
    args.latent_dim = kv.latent_dim;
    args.rope_dim = kv.rope_dim;
    args.length = batch.positions[m] + 1;
    args.progress = progress_;
    args.out = row_of(out, m);
    float* memory = memory_[thread].attention.take(
      attention_scratch(group, kv.latent_dim, kv.rope_dim, args.length));
    kernels_.attention(args, first, last, memory);
  };
  if (chunks == 1) {
    for (std::int32_t task = 0; task < num_tasks; ++task) {
      work_on(task, 0);
    }
  } else {
    pool_.run(num_tasks, work_on);
  }
}

void cpu_ops::append_grouped_kv(const rows_view& keys, const rows_view& values,
                                const batch_view& batch, const grouped_kv_view& kv) {
  // One place of a page is laid out as two parts in either kind of attention. This class's own
  // way to write them: one that is derived may keep latents, and only those, in another type.
  const std::int32_t width = kv.num_kv_heads * kv.head_dim;
  cpu_ops::append_kv(keys, values, batch, {kv.data, kv.num_pages, kv.page_tokens, width, width});
}

void cpu_ops::grouped_attention(const rows_view& q, std::int32_t num_heads, float scale,
                                const batch_view& batch, const grouped_kv_view& kv,
                                const rows_view& out) {
  assert(num_heads % kv.num_kv_heads == 0);
  std::int64_t work = 0;
  for (std::int32_t m = 0; m < q.num_rows; ++m) {
    work += 2 * std::int64_t{batch.positions[m] + 1} * num_heads * kv.head_dim;
  }
  const std::int32_t num_tasks = q.num_rows * kv.num_kv_heads;
  const std::int32_t group = num_heads / kv.num_kv_heads;
  const auto work_on = [&](std::int32_t task, std::int32_t thread) {
    const std::int32_t m = task / kv.num_kv_heads;
    grouped_attention_args args;
    args.q = row_of(q, m);
    args.num_heads = num_heads;
    args.num_kv_heads = kv.num_kv_heads;
    args.head_dim = kv.head_dim;
    args.scale = scale;
    args.pages = static_cast<const float*>(kv.data);
    args.table = table_of(batch, m);
    args.page_tokens = kv.page_tokens;
    args.length = batch.positions[m] + 1;
    args.out = row_of(out, m);
    args.progress = progress_;
    float* memory =
      memory_[thread].attention.take(grouped_attention_scratch(group, kv.head_dim, args.length));
    kernels_.grouped_attention(args, task % kv.num_kv_heads, memory);
  };
  if (num_chunks(work, num_tasks) == 1) {
    for (std::int32_t task = 0; task < num_tasks; ++task) {
      work_on(task, 0);
    }
  } else {
    pool_.run(num_tasks, work_on);
  }
}

void cpu_ops::swiglu(const rows_view& gate, const rows_view& up, const rows_view& out) {
  for_rows(gate.num_rows, 8 * std::int64_t{gate.num_cols}, [&](std::int32_t m, std::int32_t) {
    kernels_.swiglu(row_of(gate, m), row_of(up, m), gate.num_cols, row_of(out, m));
  });
}

void cpu_ops::add(const rows_view& x, const rows_view& delta) {
  for_rows(x.num_rows, x.num_cols, [&](std::int32_t m, std::int32_t) {
    kernels_.add(row_of(x, m), row_of(delta, m), x.num_cols);
  });
}

void cpu_ops::add_bias(const rows_view& x, const float* bias) {
  for_rows(x.num_rows, x.num_cols,
           [&](std::int32_t m, std::int32_t) { kernels_.add(row_of(x, m), bias, x.num_cols); });
}

void cpu_ops::route(const rows_view& x, const weight_matrix& w, const float* bias,
                    const router_params& params, std::span<std::int32_t> experts,
                    std::span<float> weights) {
  assert(w.num_rows == params.num_experts);
  assert(experts.size() >= static_cast<std::size_t>(x.num_rows) * params.top_k);
  rows_view logits;
  logits.data = logits_.take(std::int64_t{x.num_rows} * w.num_rows);
  logits.num_rows = x.num_rows;
  logits.num_cols = w.num_rows;
  logits.stride = w.num_rows;
  cpu_ops::linear(x, w, logits); // exact in every kind of numerics: a tie may hang on it
  const std::int64_t work = std::int64_t{w.num_rows} * (params.top_k + 8);
  for_rows(x.num_rows, work, [&](std::int32_t m, std::int32_t thread) {
    float* scores = row_of(logits, m);
    if (params.score == router_score::sigmoid) {
      kernels_.sigmoid(scores, w.num_rows, scores);
    } else {
      const float largest = kernels_.max(scores, w.num_rows);
      const auto sum =
        static_cast<float>(kernels_.exp_sum(scores, largest, 1.0F, w.num_rows, scores));
      for (std::int32_t e = 0; e < w.num_rows; ++e) {
        scores[e] /= sum;
      }
    }
    const std::size_t at = static_cast<std::size_t>(m) * params.top_k;
    choose_experts(scores, bias, params,
                   memory_[thread].router.take(w.num_rows + params.num_groups), experts.data() + at,
                   weights.data() + at);
  });
}

void cpu_ops::experts(const rows_view& x, std::span<const expert_task> tasks,
                      std::span<const expert_weights> experts, const rows_view& out) {
  const auto num_tasks = static_cast<std::int32_t>(tasks.size());
  if (num_tasks == 0) {
    return;
  }
  std::int32_t* task_rows = task_rows_.take(num_tasks);
  expert_run* runs = runs_.take(num_tasks);
  std::int32_t num_runs = 0;
  std::int32_t widest = 0;
  for (std::int32_t t = 0; t < num_tasks; ++t) {
    task_rows[t] = tasks[t].row;
    if (num_runs == 0 || runs[num_runs - 1].expert != tasks[t].expert) {
      runs[num_runs++] = {tasks[t].expert, t, 0};
      widest = std::max(widest, experts[tasks[t].expert].gate.num_rows);
    }
    ++runs[num_runs - 1].count;
  }
  const readable_rows input = make_readable(x, x.num_cols);
  const std::int64_t stride = padded(widest);
  float* gates = gates_.take(num_tasks * stride);
  float* ups = ups_.take(num_tasks * stride);

  // Every run is cut into the same number of column ranges, wide enough to be worth a chunk.
  const auto for_columns = [&](std::int32_t num_columns, std::int64_t work_a_task, auto&& work) {
    const std::int32_t num_panels = (num_columns + kPanelColumns - 1) / kPanelColumns;
    const std::int32_t chunks = num_chunks(num_tasks * work_a_task, num_runs * num_panels);
    const std::int32_t cuts = std::min(num_panels, (chunks + num_runs - 1) / num_runs);
    const auto do_cut = [&](std::int32_t item, std::int32_t thread) {
      const expert_run& run = runs[item / cuts];
      const std::int64_t cut = item % cuts;
      work(run, static_cast<std::int32_t>(num_panels * cut / cuts * kPanelColumns),
           static_cast<std::int32_t>(num_panels * (cut + 1) / cuts * kPanelColumns), thread);
    };
    if (chunks == 1) {
      for (std::int32_t item = 0; item < num_runs * cuts; ++item) {
        do_cut(item, 0);
      }
    } else {
      pool_.run(num_runs * cuts, do_cut);
    }
  };

  for_columns(
    widest, 2 * std::int64_t{widest} * x.num_cols,
    [&](const expert_run& run, std::int32_t first, std::int32_t last, std::int32_t thread) {
      const expert_weights& expert = experts[run.expert];
      const std::int32_t width = expert.gate.num_rows;
      last = std::min(last, width);
      if (first >= last) {
        return;
      }
      linear_args args;
      args.x = input.data;
      args.x_stride = input.stride;
      args.rows = task_rows + run.first;
      args.num_rows = run.count;
      args.out_stride = stride;
      args.w = expert.gate;
      args.out = gates + run.first * stride;
      multiply(args, first, last, thread);
      args.w = expert.up;
      args.out = ups + run.first * stride;
      multiply(args, first, last, thread);
      for (std::int32_t t = run.first; t < run.first + run.count; ++t) {
        float* gate = gates + t * stride;
        kernels_.swiglu(gate + first, ups + t * stride + first, last - first, gate + first);
        if (last == width) {
          std::fill(gate + width, gate + padded(width), 0.0F);
        }
      }
    });
  for_columns(
    out.num_cols, std::int64_t{widest} * out.num_cols,
    [&](const expert_run& run, std::int32_t first, std::int32_t last, std::int32_t thread) {
      linear_args args;
      args.x = gates + run.first * stride;
      args.x_stride = stride;
      args.num_rows = run.count;
      args.w = experts[run.expert].down;
      args.out = row_of(out, run.first);
      args.out_stride = out.stride;
      multiply(args, first, std::min(last, args.w.num_rows), thread);
    });
}

void cpu_ops::combine(const rows_view& expert_out, std::span<const std::int32_t> expert_rows,
                      std::span<const float> weights, std::int32_t top_k, const rows_view& shared,
                      const rows_view& out) {
  const std::int64_t work = std::int64_t{out.num_cols} * (top_k + 2);
  for_rows(out.num_rows, work, [&](std::int32_t m, std::int32_t) {
    const std::size_t at = static_cast<std::size_t>(m) * top_k;
    kernels_.combine(static_cast<const float*>(expert_out.data), expert_out.stride,
                     expert_rows.data() + at, weights.data() + at, top_k,
                     shared.data == nullptr ? nullptr : row_of(shared, m), out.num_cols,
                     row_of(out, m));
  });
}

void cpu_ops::sample(const rows_view& logits, std::span<const sampling_params> params,
                     std::span<sampled_token> out) {
  // As much as a wide distribution takes, whose tokens have to be sorted.
  for_rows(
    logits.num_rows, 64 * std::int64_t{logits.num_cols}, [&](std::int32_t m, std::int32_t thread) {
      out[m] = memory_[thread].tokens.draw(kernels_, row_of(logits, m), logits.num_cols, params[m]);
    });
}

void cpu_ops::join(std::shared_ptr<cpu_rank_group> group, std::int32_t rank) {
  group_ = std::move(group);
  rank_ = rank;
}

void cpu_ops::clear(const rows_view& x) {
  for_rows(x.num_rows, x.num_cols,
           [&](std::int32_t m, std::int32_t) { std::fill_n(row_of(x, m), x.num_cols, 0.0F); });
}

void cpu_ops::all_reduce(const rows_view& x) {
  if (group_ == nullptr || is_alone_ || !failure_.empty()) {
    return;
  }
  failure_ = group_->add_up(rank_, x);
  tick();
}

bool cpu_ops::all_finite(const rows_view& x) {
  std::atomic<bool> finite = true;
  for_rows(x.num_rows, x.num_cols, [&](std::int32_t m, std::int32_t) {
    const float* row = row_of(x, m);
    // The exponent of infinity and NaN is all ones; adding one to it reaches the sign.
    std::uint32_t reached = 0;
    for (std::int32_t k = 0; k < x.num_cols; ++k) {
      std::uint32_t bits;
      std::memcpy(&bits, row + k, 4);
      reached |= (bits & 0x7F800000U) + 0x00800000U;
    }
    if ((reached & 0x80000000U) != 0) {
      finite.store(false, std::memory_order_relaxed);
    }
  });
  return finite.load(std::memory_order_relaxed);
}

} // namespace cpu

} // namespace troupe::kernels
