#pragma once

// Latent attention of one row, for one instruction set (see simd.hpp). The scores of all
// positions are kept, so that every sum runs over positions in ascending order and
// nothing depends on pages, on chunks of the prompt or on how heads are grouped.

#include "troupe/kernels/cpu/linear.hpp"
#include "troupe/kernels/cpu/rows.hpp"

namespace troupe::kernels::cpu::TROUPE_ISA {

#if defined(__AVX512F__)
inline constexpr int kValueRegs = 4; ///< registers of the latent summed together
#else
inline constexpr int kValueRegs = 2;
#endif

/// Rows of keys of one block of positions.
struct key_block {
  const float* row[kPositionBlock]; ///< readable up to padded(latent_dim + rope_dim)
  std::int32_t count;
};

inline key_block find_keys(const attention_args& args, std::int32_t position, float* copies) {
  key_block keys;
  keys.count = min(kPositionBlock, args.length - position);
  const std::int64_t width = args.latent_dim + args.rope_dim;
  for (std::int32_t i = 0; i < keys.count; ++i) {
    const std::int32_t at = position + i;
    const std::int64_t page = args.table[at / args.page_tokens];
    keys.row[i] = args.pages + (page * args.page_tokens + at % args.page_tokens) * width;
    if (width % 16 != 0) {
      float* copy = copies + i * padded(width);
      std::memset(copy + width / 16 * 16, 0, 64);
      std::memcpy(copy, keys.row[i], static_cast<std::size_t>(width) * 4);
      keys.row[i] = copy;
    }
  }
  return keys;
}

/// scores[h][i] = scale * (q[h] . key[i]).
inline void score_block(const attention_args& args, const float* q, const key_block& keys,
                        std::int32_t num_heads, float* scores, std::int64_t score_stride) {
  const std::int64_t depth = padded(args.latent_dim + args.rope_dim);
  for (std::int32_t i = 0; i < keys.count; i += 4) {
    const float* columns[4];
    for (std::int32_t n = 0; n < 4; ++n) {
      columns[n] = keys.row[min(i + n, keys.count - 1)];
    }
    for (std::int32_t h = 0; h < num_heads; h += kTileRows) {
      const std::int32_t num_rows = min(kTileRows, num_heads - h);
      const float* x[kTileRows];
      for (std::int32_t m = 0; m < num_rows; ++m) {
        x[m] = q + (h + m) * depth;
      }
      lanes sums[kTileRows * kPanelColumns];
      multiply_rows(num_rows, x, columns, depth, true, sums);
      for (std::int32_t m = 0; m < num_rows; ++m) {
        const lanes* row = sums + m * kPanelColumns;
        float dots[4];
        reduce4(row[0], row[1], row[2], row[3], dots);
        for (std::int32_t n = 0; n < min(4, keys.count - i); ++n) {
          scores[(h + m) * score_stride + i + n] = dots[n] * args.scale;
        }
      }
    }
  }
}

/// Makes scores to exp(score - largest) and returns their sum. The row is padded with
/// minus infinity, which counts for nothing.
inline float soften(float* scores, std::int32_t length) {
  for (std::int64_t i = length; i < padded(length); ++i) {
    scores[i] = -__builtin_inff();
  }
  const reg largest = splat(max(scores, length));
  lanes sum = {};
  for (std::int32_t i = 0; i < length; i += 16) {
    for (int p = 0; p < kParts; ++p) {
      float* at = scores + i + p * kLanes;
      const reg power = exp(load(at) - largest);
      sum.part[p] = sum.part[p] + power;
      store(at, power);
    }
  }
  return reduce(sum);
}

/// values[h][d] += sum of scores[h][i] * key[i][d] for NumHeads heads, NumRegs registers of d.
template <int NumHeads, int NumRegs>
inline void add_values(const key_block& keys, std::int64_t column, const float* scores,
                       std::int64_t score_stride, float* values, std::int64_t value_stride) {
  reg sum[NumHeads][NumRegs];
  for (int h = 0; h < NumHeads; ++h) {
    for (int r = 0; r < NumRegs; ++r) {
      sum[h][r] = load(values + h * value_stride + column + r * kLanes);
    }
  }
  for (std::int32_t i = 0; i < keys.count; ++i) {
    reg key[NumRegs];
    for (int r = 0; r < NumRegs; ++r) {
      key[r] = load(keys.row[i] + column + r * kLanes);
    }
    for (int h = 0; h < NumHeads; ++h) {
      const reg weight = splat(scores[h * score_stride + i]);
      for (int r = 0; r < NumRegs; ++r) {
        sum[h][r] = fma(weight, key[r], sum[h][r]);
      }
    }
  }
  for (int h = 0; h < NumHeads; ++h) {
    for (int r = 0; r < NumRegs; ++r) {
      store(values + h * value_stride + column + r * kLanes, sum[h][r]);
    }
  }
}

template <int NumHeads>
inline void add_values(const key_block& keys, std::int64_t width, const float* scores,
                       std::int64_t score_stride, float* values) {
  std::int64_t column = 0;
  for (; column + kValueRegs * kLanes <= width; column += kValueRegs * kLanes) {
    add_values<NumHeads, kValueRegs>(keys, column, scores, score_stride, values, width);
  }
  for (; column < width; column += kLanes) {
    add_values<NumHeads, 1>(keys, column, scores, score_stride, values, width);
  }
}

/// Tells that so many positions are done.
inline void tick(const attention_args& args, std::int32_t position) {
  constexpr std::int32_t kPositionsOfTick = 32 * kPositionBlock;
  if (position % kPositionsOfTick == 0 && args.progress != nullptr) {
    args.progress->fetch_add(1, std::memory_order_relaxed);
  }
}

inline void attention(const attention_args& args, std::int32_t first, std::int32_t last,
                      float* scratch) {
  const std::int32_t num_heads = last - first;
  const std::int64_t depth = padded(args.latent_dim + args.rope_dim);
  const std::int64_t width = padded(args.latent_dim);
  const std::int64_t score_stride = padded(args.length);
  float* q = scratch;
  float* values = q + num_heads * depth;
  float* scores = values + num_heads * width;
  float* copies = scores + num_heads * score_stride;

  // Queries in the layout of the keys: latent first, rotated part behind it.
  std::memset(q, 0, static_cast<std::size_t>(num_heads * (depth + width)) * 4);
  for (std::int32_t h = 0; h < num_heads; ++h) {
    std::memcpy(q + h * depth, args.q_latent + std::int64_t{first + h} * args.latent_dim,
                static_cast<std::size_t>(args.latent_dim) * 4);
    std::memcpy(q + h * depth + args.latent_dim,
                args.q_rope + (first + h) * args.q_rope_head_stride,
                static_cast<std::size_t>(args.rope_dim) * 4);
  }
  for (std::int32_t i = 0; i < args.length; i += kPositionBlock) {
    score_block(args, q, find_keys(args, i, copies), num_heads, scores + i, score_stride);
    tick(args, i);
  }
  float sums[kMaxAttentionHeads];
  for (std::int32_t h = 0; h < num_heads; ++h) {
    sums[h] = soften(scores + h * score_stride, args.length);
  }
  for (std::int32_t i = 0; i < args.length; i += kPositionBlock) {
    const key_block keys = find_keys(args, i, copies);
    std::int32_t h = 0;
    for (; h + 4 <= num_heads; h += 4) {
      add_values<4>(keys, width, scores + h * score_stride + i, score_stride, values + h * width);
    }
    for (; h < num_heads; ++h) {
      add_values<1>(keys, width, scores + h * score_stride + i, score_stride, values + h * width);
    }
    tick(args, i);
  }
  for (std::int32_t h = 0; h < num_heads; ++h) {
    const float inverse = 1.0F / sums[h];
    float* out = args.out + std::int64_t{first + h} * args.latent_dim;
    for (std::int32_t d = 0; d < args.latent_dim; ++d) {
      out[d] = values[h * width + d] * inverse;
    }
  }
}

} // namespace troupe::kernels::cpu::TROUPE_ISA
