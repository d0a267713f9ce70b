#pragma once

#include <cstdint>

#include "troupe/kernels/cpu/packed.hpp"
#include "troupe/kernels/ops.hpp"

/// The inner loops behind `numerics::fast`, for processors with AVX-512, BF16, VBMI and VNNI. An
/// output is one chain of sums over ascending elements in one lane, with a break where a
/// scale ends; how many rows and panels share a pass changes nothing in it.
namespace troupe::kernels::cpu {

/// Activations after rounding. Rows are padded with zeros to the depth of the weight.
struct fast_rows {
  const void* data = nullptr;            ///< bf16, or signed bytes for weights of kind i8
  std::int64_t stride = 0;               ///< elements
  const float* scales = nullptr;         ///< kind i8: [row][group]
  const std::int32_t* offsets = nullptr; ///< kind i8: [row][group], -128 * sum of the bytes
};

/// out[m, n] = sum over k of x[rows[m], k] * w[n, k].
struct fast_args {
  const packed_weight* w = nullptr;
  fast_rows x;
  const std::int32_t* rows = nullptr; ///< [num_rows] rows of x; null: 0, 1, 2, ...
  std::int32_t num_rows = 0;
  float* out = nullptr;
  std::int64_t out_stride = 0;
  std::int32_t first_column = 0; ///< the column that `out` points to
};

/// Bytes of scratch that `fast_table::multiply` needs, aligned to 64.
inline constexpr std::int64_t kMultiplyScratch = 4 * kLargestGroup * kPackedColumns * 2;

/// Positions that are worked on together, counted from the beginning of a sequence.
inline constexpr std::int32_t kAttentionBlock = 128;

/// Heads of a panel of queries.
inline constexpr std::int32_t kAttentionHeads = 16;

/// Rows of one sequence that share a pass over its keys.
inline constexpr std::int32_t kAttentionTileRows = 6;

/// A part of the result of sixteen heads of a row, aligned to 64 bytes: their largest scores
/// (minus infinity before the first), the sums of their weights, and weighted values
/// [16][latent_dim] behind.
inline constexpr std::int64_t kPartHead = 32;

constexpr std::int64_t part_floats(std::int32_t latent_dim) {
  return kPartHead + std::int64_t{kAttentionHeads} * latent_dim;
}

/// Bytes of scratch that `fast_table::attend_block` needs, aligned to 64.
constexpr std::int64_t attend_scratch(std::int32_t latent_dim) {
  return std::int64_t{kAttentionBlock} * latent_dim * 2
         + std::int64_t{kAttentionTileRows} * kAttentionBlock * kAttentionHeads * (2 + 4);
}

/// Sixteen heads of some rows of one sequence; latent_dim is a multiple of 16, rope_dim even.
struct fast_attention_args {
  const std::uint16_t* queries[kAttentionTileRows]; ///< of `fast_table::pack_queries`
  float* parts[kAttentionTileRows];
  std::int32_t lengths[kAttentionTileRows]; ///< positions that each row sees
  std::int32_t num_rows = 0;
  std::int32_t num_heads = 0; ///< of the sixteen
  float scale = 1.0F;
  const std::uint16_t* pages = nullptr; ///< [num_pages, page_tokens, latent_dim + rope_dim]
  const std::int32_t* table = nullptr;  ///< page of each page_tokens positions
  std::int32_t page_tokens = 0;
  std::int32_t latent_dim = 0;
  std::int32_t rope_dim = 0;
};

struct fast_table {
  /// Fills panels first..last-1 of `to`, whose shape is set, from `w`.
  void (*pack)(const weight_matrix& w, const packed_weight& to, std::int32_t first,
               std::int32_t last);

  /// out[0..depth-1] = x rounded to bf16 (nearest, ties to even), zeros behind `count`.
  void (*round_row)(const float* x, std::int32_t count, std::int32_t depth, std::uint16_t* out);

  /// The way back: out[0..count-1] as float32.
  void (*widen_row)(const std::uint16_t* x, std::int32_t count, float* out);

  /// Signed bytes of each group of a row: x / scale rounded, scale = largest magnitude / 127.
  void (*quantise_row)(const float* x, std::int32_t count, std::int32_t depth, std::int32_t group,
                       std::int8_t* out, float* scales, std::int32_t* offsets);

  /// Computes the columns of panels first..last-1 of all rows.
  void (*multiply)(const fast_args& args, std::int32_t first, std::int32_t last,
                   unsigned char* scratch);

  /// Queries of up to sixteen heads as bf16 [(latent_dim + rope_dim) / 2][16 heads][2].
  void (*pack_queries)(const float* latent, std::int64_t latent_stride, const float* rope,
                       std::int64_t rope_stride, std::int32_t num_heads, std::int32_t latent_dim,
                       std::int32_t rope_dim, std::uint16_t* out);

  /// Merges the block of positions that begins at `position` into the parts of all rows that see
  /// any of it.
  void (*attend_block)(const fast_attention_args& args, std::int32_t position,
                       unsigned char* scratch);

  /// The same for one row in two steps, so that threads can share it, with the same bits: scores
  /// [count][16] of any positions, rounded up to 8 of them, ...
  void (*score_positions)(const fast_attention_args& args, std::int32_t first, std::int32_t count,
                          float* scores);

  /// ... and from those of a block the panels first..last-1 of the values; `first` is even. State
  /// is of the caller: the largest scores and the sums [2][16], -infinity and 0 before the first
  /// block.
  void (*attend_panels)(const fast_attention_args& args, std::int32_t position, const float* scores,
                        std::int32_t first, std::int32_t last, float* state,
                        unsigned char* scratch);

  /// out[head][latent_dim] = weighted values / sum of weights, of the panels first..last-1.
  void (*finish_part)(const float* values, const float* sums, std::int32_t num_heads,
                      std::int32_t latent_dim, std::int32_t first, std::int32_t last, float* out);

  /// `rounds` times kPeakSums instructions of 32 products of bf16, or of 64 products of bytes,
  /// for measuring how fast that can be; returns what came out.
  float (*peak_bf16)(std::int64_t rounds);
  float (*peak_i8)(std::int64_t rounds);
};

/// Null if this machine lacks the instructions or TROUPE_CPU asks for less.
const fast_table* choose_fast_kernels();

#if defined(__x86_64__)
const fast_table& fast_avx512_kernels();
#endif

} // namespace troupe::kernels::cpu
