#pragma once

// Latent attention over pages of bf16. Positions come in blocks of kAttentionBlock, counted from
// the beginning of the sequence. A block is worked on from nothing: scores, their maximum and
// exponentials, the sum of values; then it is merged into the result of the blocks before it,
// which are rescaled to the new maximum (online softmax, Milakov and Gimelshein,
// arXiv 1805.02867). A row's bits depend on these blocks alone, not on who else is in the tile
// nor on who computes a block.

#include "troupe/kernels/cpu/fast_pack.hpp"

namespace troupe::kernels::cpu::fast {

inline constexpr std::int32_t kScoreColumns = 8; ///< positions of a tile of scores
inline constexpr std::int32_t kScoreRows = 3;    ///< rows (of sixteen heads) of a tile of scores
inline constexpr std::int32_t kScorePairs = 96;  ///< of a pass over the keys, with several rows
inline constexpr std::int32_t kValueHeads = 8;   ///< heads of a tile of values
inline constexpr std::int32_t kValuePanels = 3;  ///< panels of a tile of values

/// exp(x) of sixteen lanes, for x <= 0: the series of simd.hpp.
inline __m512 exp_lanes(__m512 x) {
  const __m512 magic = _mm512_set1_ps(0x1.8p23F);
  const __m512 shifted = _mm512_fmadd_ps(x, _mm512_set1_ps(0x1.715476p0F), magic);
  const __m512 n = _mm512_sub_ps(shifted, magic);
  const __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(0x1.05c61p-29F),
                                   _mm512_fmadd_ps(n, _mm512_set1_ps(-0x1.62e43p-1F), x));
  __m512 p = _mm512_set1_ps(1.0F / 720);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0F / 120));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0F / 24));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0F / 6));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5F));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0F));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0F));
  const __m512i bits =
    _mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(shifted), 23));
  const __mmask16 large = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.33654F), _CMP_NLT_UQ);
  const __mmask16 number = _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q);
  return _mm512_mask_mov_ps(x, number, _mm512_maskz_mov_ps(large, _mm512_castsi512_ps(bits)));
}

/// Queries of up to sixteen heads of a row in the order of the keys' products:
/// [(latent_dim + rope_dim) / 2][16 heads][2], zeros for heads that are missing.
inline void pack_queries(const float* latent, std::int64_t latent_stride, const float* rope,
                         std::int64_t rope_stride, std::int32_t num_heads, std::int32_t latent_dim,
                         std::int32_t rope_dim, std::uint16_t* out) {
  const std::int32_t width = latent_dim + rope_dim;
  for (std::int32_t k = 0; k < width; k += 32) {
    __m512i square[16];
    for (std::int32_t h = 0; h < 16; ++h) {
      if (h >= num_heads) {
        square[h] = _mm512_setzero_si512();
      } else if (k + 32 <= latent_dim) {
        const float* from = latent + h * latent_stride + k;
        square[h] = to_bf16(_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16));
      } else if (k >= latent_dim && k + 32 <= width) {
        const float* from = rope + h * rope_stride + k - latent_dim;
        square[h] = to_bf16(_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16));
      } else {
        alignas(64) float mixed[32];
        for (std::int32_t i = 0; i < 32; ++i) {
          const std::int32_t at = k + i;
          mixed[i] = at < latent_dim ? latent[h * latent_stride + at]
                     : at < width    ? rope[h * rope_stride + at - latent_dim]
                                     : 0.0F;
        }
        square[h] = to_bf16(_mm512_load_ps(mixed), _mm512_load_ps(mixed + 16));
      }
    }
    transpose(square);
    for (std::int32_t i = 0; i < least(16, (width - k) / 2); ++i) {
      _mm512_store_si512(out + (std::int64_t{k} / 2 + i) * 32, square[i]);
    }
  }
}

/// Scores of kScoreColumns positions for Rows rows of sixteen heads, scaled: the pairs
/// first..last-1 of their products, which go on from `scores` unless they are the first. Lines
/// of the keys `next` are asked for meanwhile, if there are any.
template <int Rows>
inline void score_tile(const std::uint16_t* const* queries, const std::uint16_t* const* keys,
                       std::int32_t first, std::int32_t last, const std::uint16_t* const* next,
                       float scale, float* const* scores) {
  __m512 sum[Rows][kScoreColumns];
  TROUPE_UNROLL for (int r = 0; r < Rows; ++r) {
    TROUPE_UNROLL for (int i = 0; i < kScoreColumns; ++i) {
      sum[r][i] = first == 0 ? _mm512_setzero_ps() : _mm512_load_ps(scores[r] + i * 16);
    }
  }
  for (std::int32_t k = first; k < last; ++k) {
    if (Rows == 1 && next != nullptr && k % 2 == 0) {
      // Sixteen pairs make a line: each line of each key once.
      ask_for(reinterpret_cast<const unsigned char*>(next[k / 2 % kScoreColumns] + k / 16 * 32));
    }
    __m512bh query[Rows];
    TROUPE_UNROLL for (int r = 0; r < Rows; ++r) {
      query[r] = reinterpret_cast<__m512bh>(_mm512_load_si512(queries[r] + std::int64_t{k} * 32));
    }
    TROUPE_UNROLL for (int i = 0; i < kScoreColumns; ++i) {
      std::int32_t pair;
      __builtin_memcpy(&pair, keys[i] + 2 * k, 4);
      const __m512bh key = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
      TROUPE_UNROLL for (int r = 0; r < Rows; ++r) {
        sum[r][i] = _mm512_dpbf16_ps(sum[r][i], query[r], key);
      }
    }
  }
  const __m512 factor = _mm512_set1_ps(scale);
  TROUPE_UNROLL for (int r = 0; r < Rows; ++r) {
    TROUPE_UNROLL for (int i = 0; i < kScoreColumns; ++i) {
      _mm512_store_ps(scores[r] + i * 16, _mm512_mul_ps(sum[r][i], factor));
    }
  }
}

/// Makes scores [count][16 heads] to exp(score - largest), rounded to bf16 and in pairs of
/// positions: [ceil(count / 2)][16 heads][2]. Tells the largest scores and the sums.
inline void soften_block(const float* scores, std::int32_t count, std::uint16_t* weights,
                         float* largest, float* sums) {
  __m512 top = _mm512_load_ps(scores);
  for (std::int32_t i = 1; i < count; ++i) {
    top = _mm512_max_ps(top, _mm512_load_ps(scores + i * 16));
  }
  alignas(64) std::uint16_t order[32];
  for (std::uint16_t i = 0; i < 16; ++i) {
    order[2 * i] = i;
    order[2 * i + 1] = static_cast<std::uint16_t>(16 + i);
  }
  const __m512i pairs = _mm512_load_si512(order);
  __m512 sum = _mm512_setzero_ps();
  for (std::int32_t i = 0; i < count; i += 2) {
    const __m512 even = exp_lanes(_mm512_sub_ps(_mm512_load_ps(scores + i * 16), top));
    sum = _mm512_add_ps(sum, even);
    __m512 odd = _mm512_setzero_ps();
    if (i + 1 < count) {
      odd = exp_lanes(_mm512_sub_ps(_mm512_load_ps(scores + (i + 1) * 16), top));
      sum = _mm512_add_ps(sum, odd);
    }
    _mm512_store_si512(weights + i * 16, _mm512_permutexvar_epi16(pairs, to_bf16(even, odd)));
  }
  _mm512_storeu_ps(largest, top);
  _mm512_storeu_ps(sums, sum);
}

/// Values of a block in pairs of positions: [latent_dim / 16][kAttentionBlock / 2][16][2]; of the
/// elements first..last-1, where first is a multiple of 32.
inline void pair_values(const std::uint16_t* const* keys, std::int32_t count, std::int32_t first,
                        std::int32_t last, std::uint16_t* out) {
  alignas(64) std::uint16_t order[2][32];
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 16; ++i) {
      order[half][2 * i] = static_cast<std::uint16_t>(half * 16 + i);
      order[half][2 * i + 1] = static_cast<std::uint16_t>(32 + half * 16 + i);
    }
  }
  const __m512i low = _mm512_load_si512(order[0]);
  const __m512i high = _mm512_load_si512(order[1]);
  constexpr std::int64_t kPanel = std::int64_t{kAttentionBlock} * 16;
  for (std::int32_t i = 0; i < count; i += 2) {
    for (std::int32_t d = first; d < last; d += 32) {
      const __mmask32 mask = last - d >= 32 ? ~__mmask32{0} : __mmask32{0xFFFF};
      const __m512i even = _mm512_maskz_loadu_epi16(mask, keys[i] + d);
      const __m512i odd =
        i + 1 < count ? _mm512_maskz_loadu_epi16(mask, keys[i + 1] + d) : _mm512_setzero_si512();
      std::uint16_t* to = out + d / 16 * kPanel + i * 16;
      _mm512_store_si512(to, _mm512_permutex2var_epi16(even, low, odd));
      if (last - d > 16) {
        _mm512_store_si512(to + kPanel, _mm512_permutex2var_epi16(even, high, odd));
      }
    }
  }
}

/// How two parts of a softmax are weighed when they become one.
struct merge_weights {
  alignas(64) float before[16];
  alignas(64) float block[16];
};

/// values[h][d] = values[h][d] * before[h] + block[h] * (sum over pairs of weight * value) for
/// kValueHeads heads and Panels panels of d.
template <int Panels>
inline void value_tile(const std::uint16_t* weights, const std::uint16_t* paired,
                       std::int32_t num_pairs, const merge_weights& merge, float* values,
                       std::int64_t value_stride) {
  __m512 sum[kValueHeads][Panels];
  TROUPE_UNROLL for (int h = 0; h < kValueHeads; ++h) {
    TROUPE_UNROLL for (int p = 0; p < Panels; ++p) {
      sum[h][p] = _mm512_setzero_ps();
    }
  }
  constexpr std::int64_t kPanel = std::int64_t{kAttentionBlock} * 16;
  for (std::int32_t k = 0; k < num_pairs; ++k) {
    __m512bh column[Panels];
    TROUPE_UNROLL for (int p = 0; p < Panels; ++p) {
      column[p] = reinterpret_cast<__m512bh>(_mm512_load_si512(paired + p * kPanel + k * 32));
    }
    TROUPE_UNROLL for (int h = 0; h < kValueHeads; ++h) {
      std::int32_t pair;
      __builtin_memcpy(&pair, weights + k * 32 + 2 * h, 4);
      const __m512bh weight = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
      TROUPE_UNROLL for (int p = 0; p < Panels; ++p) {
        sum[h][p] = _mm512_dpbf16_ps(sum[h][p], column[p], weight);
      }
    }
  }
  TROUPE_UNROLL for (int h = 0; h < kValueHeads; ++h) {
    TROUPE_UNROLL for (int p = 0; p < Panels; ++p) {
      float* at = values + h * value_stride + p * 16;
      const __m512 before = _mm512_mul_ps(_mm512_load_ps(at), _mm512_set1_ps(merge.before[h]));
      _mm512_store_ps(at, _mm512_fmadd_ps(sum[h][p], _mm512_set1_ps(merge.block[h]), before));
    }
  }
}

/// The weights of two parts by their largest scores; largest and sums become those of both.
inline void weigh_parts(const float* block_largest, const float* block_sums, float* largest,
                        float* sums, merge_weights& merge) {
  const __m512 before = _mm512_loadu_ps(largest);
  const __m512 block = _mm512_loadu_ps(block_largest);
  const __m512 top = _mm512_max_ps(before, block);
  const __m512 weight_before = exp_lanes(_mm512_sub_ps(before, top));
  const __m512 weight_block = exp_lanes(_mm512_sub_ps(block, top));
  const __m512 sum = _mm512_mul_ps(_mm512_loadu_ps(sums), weight_before);
  _mm512_storeu_ps(largest, top);
  _mm512_storeu_ps(sums, _mm512_fmadd_ps(_mm512_loadu_ps(block_sums), weight_block, sum));
  _mm512_store_ps(merge.before, weight_before);
  _mm512_store_ps(merge.block, weight_block);
}

/// Where the keys of positions first..first + count - 1 lie; behind them the last one again, for
/// scores that nobody reads.
inline void find_keys(const fast_attention_args& args, std::int32_t first, std::int32_t count,
                      const std::uint16_t** keys) {
  const std::int32_t width = args.latent_dim + args.rope_dim;
  for (std::int32_t i = 0; i < count;) {
    const std::int32_t page = (first + i) / args.page_tokens;
    std::int32_t slot = first + i - page * args.page_tokens;
    const std::uint16_t* key =
      args.pages + (std::int64_t{args.table[page]} * args.page_tokens + slot) * width;
    for (; slot < args.page_tokens && i < count; ++slot, key += width) {
      keys[i++] = key;
    }
  }
  for (std::int32_t i = count; i < count + kScoreColumns; ++i) {
    keys[i] = keys[count - 1];
  }
}

/// Scores [positions][16 heads] of one row, for `count` positions rounded up to kScoreColumns.
inline void score_positions(const fast_attention_args& args, std::int32_t first, std::int32_t count,
                            float* scores) {
  const std::uint16_t* keys[kAttentionBlock + kScoreColumns];
  find_keys(args, first, count, keys);
  const std::int32_t pairs = (args.latent_dim + args.rope_dim) / 2;
  for (std::int32_t i = 0; i < count; i += kScoreColumns) {
    float* out = scores + std::int64_t{i} * 16;
    const std::uint16_t* const* next =
      i + kScoreColumns < count ? keys + i + kScoreColumns : nullptr;
    score_tile<1>(args.queries, keys + i, 0, pairs, next, args.scale, &out);
  }
}

/// Adds the panels first..last-1 of a block to the values of one row.
inline void merge_values(const fast_attention_args& args, const std::uint16_t* weights,
                         const merge_weights& merge, std::int32_t count,
                         const std::uint16_t* paired, std::int32_t first, std::int32_t last,
                         float* values) {
  constexpr std::int64_t kPanel = std::int64_t{kAttentionBlock} * 16;
  const std::int32_t num_pairs = (count + 1) / 2;
  for (std::int32_t h = 0; h < args.num_heads; h += kValueHeads) {
    merge_weights shifted;
    for (std::int32_t i = 0; i < kValueHeads; ++i) {
      shifted.before[i] = merge.before[h + i];
      shifted.block[i] = merge.block[h + i];
    }
    for (std::int32_t p = first; p < last; p += kValuePanels) {
      const std::uint16_t* from = paired + p * kPanel;
      float* to = values + std::int64_t{h} * args.latent_dim + p * 16;
      const std::uint16_t* of_heads = weights + 2 * h;
      switch (least(kValuePanels, last - p)) {
      case 1: value_tile<1>(of_heads, from, num_pairs, shifted, to, args.latent_dim); break;
      case 2: value_tile<2>(of_heads, from, num_pairs, shifted, to, args.latent_dim); break;
      default: value_tile<3>(of_heads, from, num_pairs, shifted, to, args.latent_dim); break;
      }
    }
  }
}

/// Makes scores to weights, and tells how they are merged into what `state` [2][16] stands for:
/// the largest scores and the sums so far.
inline void merge_scores(const float* scores, std::int32_t count, std::uint16_t* weights,
                         float* state, merge_weights& merge) {
  float largest[16];
  float sums[16];
  soften_block(scores, count, weights, largest, sums);
  weigh_parts(largest, sums, state, state + 16, merge);
}

/// The panels first..last-1 of one row, of which `scores` of the block are known.
inline void attend_panels(const fast_attention_args& args, std::int32_t position,
                          const float* scores, std::int32_t first, std::int32_t last, float* state,
                          unsigned char* scratch) {
  auto* paired = reinterpret_cast<std::uint16_t*>(scratch);
  auto* weights = paired + std::int64_t{kAttentionBlock} * args.latent_dim;
  const std::int32_t count = least(kAttentionBlock, args.lengths[0] - position);
  const std::uint16_t* keys[kAttentionBlock + kScoreColumns];
  find_keys(args, position, count, keys);
  pair_values(keys, count, first * 16, last * 16, paired);
  merge_weights merge;
  merge_scores(scores, count, weights, state, merge);
  merge_values(args, weights, merge, count, paired, first, last, args.parts[0] + kPartHead);
}

/// Scores of `count` positions for the rows that reach into a block. So few pairs at a time that
/// their part of the queries stays in the first cache while all keys pass by; scores wait.
inline void score_block(const fast_attention_args& args, const std::int32_t* rows,
                        std::int32_t num_rows, const std::uint16_t* const* keys, std::int32_t count,
                        float* scores) {
  constexpr std::int64_t kScores = std::int64_t{kAttentionBlock} * 16;
  const std::int32_t pairs = (args.latent_dim + args.rope_dim) / 2;
  const std::int32_t step = num_rows == 1 ? pairs : kScorePairs;
  for (std::int32_t r = 0; r < num_rows; r += kScoreRows) {
    const std::int32_t together = least(kScoreRows, num_rows - r);
    const std::uint16_t* queries[kScoreRows];
    for (std::int32_t j = 0; j < together; ++j) {
      queries[j] = args.queries[rows[r + j]];
    }
    for (std::int32_t k = 0; k < pairs; k += step) {
      const std::int32_t last = least(pairs, k + step);
      const float scale = last == pairs ? args.scale : 1.0F;
      for (std::int32_t i = 0; i < count; i += kScoreColumns) {
        float* out[kScoreRows];
        for (std::int32_t j = 0; j < together; ++j) {
          out[j] = scores + (r + j) * kScores + i * 16;
        }
        const std::uint16_t* const* next =
          i + kScoreColumns < count ? keys + i + kScoreColumns : nullptr;
        switch (together) {
        case 1: score_tile<1>(queries, keys + i, k, last, next, scale, out); break;
        case 2: score_tile<2>(queries, keys + i, k, last, next, scale, out); break;
        default: score_tile<3>(queries, keys + i, k, last, next, scale, out); break;
        }
      }
    }
  }
}

/// Adds the block that begins at `position` to the parts of all rows that reach into it.
inline void attend_block(const fast_attention_args& args, std::int32_t position,
                         unsigned char* scratch) {
  constexpr std::int64_t kWeights = std::int64_t{kAttentionBlock} * 16;
  auto* paired = reinterpret_cast<std::uint16_t*>(scratch);
  auto* weights = paired + std::int64_t{kAttentionBlock} * args.latent_dim;
  auto* scores = reinterpret_cast<float*>(weights + kWeights * kAttentionTileRows);
  std::int32_t rows[kAttentionTileRows];
  std::int32_t counts[kAttentionTileRows];
  merge_weights merge[kAttentionTileRows];
  std::int32_t num_rows = 0;
  std::int32_t count = 0;
  for (std::int32_t r = 0; r < args.num_rows; ++r) {
    if (args.lengths[r] > position) {
      counts[num_rows] = least(kAttentionBlock, args.lengths[r] - position);
      count = count > counts[num_rows] ? count : counts[num_rows];
      rows[num_rows++] = r;
    }
  }
  const std::uint16_t* keys[kAttentionBlock + kScoreColumns];
  find_keys(args, position, count, keys);
  score_block(args, rows, num_rows, keys, count, scores);
  pair_values(keys, count, 0, args.latent_dim, paired);
  for (std::int32_t j = 0; j < num_rows; ++j) {
    merge_scores(scores + j * kWeights, counts[j], weights + j * kWeights, args.parts[rows[j]],
                 merge[j]);
  }
  // Few panels of values stay in the first cache while all rows pass by.
  const std::int32_t panels = args.latent_dim / 16;
  for (std::int32_t p = 0; p < panels; p += kValuePanels) {
    for (std::int32_t j = 0; j < num_rows; ++j) {
      merge_values(args, weights + j * kWeights, merge[j], counts[j], paired, p,
                   least(panels, p + kValuePanels), args.parts[rows[j]] + kPartHead);
    }
  }
}

/// out[h][d] = values / sum, for the panels first..last-1.
inline void finish_part(const float* values, const float* sums, std::int32_t num_heads,
                        std::int32_t latent_dim, std::int32_t first, std::int32_t last,
                        float* out) {
  for (std::int32_t h = 0; h < num_heads; ++h) {
    const __m512 inverse = _mm512_set1_ps(1.0F / sums[h]);
    const std::int64_t at = std::int64_t{h} * latent_dim;
    for (std::int32_t d = first * 16; d < last * 16; d += 16) {
      _mm512_storeu_ps(out + at + d, _mm512_mul_ps(_mm512_load_ps(values + at + d), inverse));
    }
  }
}

} // namespace troupe::kernels::cpu::fast
