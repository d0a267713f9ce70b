#pragma once

#include <cstdint>

#include "troupe/kernels/ops.hpp"

namespace troupe::kernels::cuda {

/// How a packed weight is stored. What a product kernel cannot read is expanded to bf16.
enum class packed_type : std::uint8_t { bf16, f8, i8, i4 };

/// Rows (out features) of a tile: what one matrix instruction takes.
inline constexpr std::int32_t kTileRows = 16;

/// Columns after which partial sums leave the matrix unit, are scaled and added in float32.
inline constexpr std::int32_t kBlockCols = 128;

/// Most parts into which the columns of a product are cut. Each part is summed block by block and
/// the parts are added in order, so a result depends on the number of columns alone.
inline constexpr std::int32_t kMaxSplits = 8;

/// A weight in the order in which lanes read it: tiles of 16 rows, each a run of chunks of 16 rows
/// by 64 bytes of a row. A chunk is [2 halves of 8 rows][32 lanes][16 bytes]; lane 4 * r + t holds,
/// of row r, the columns 8 * t to 8 * t + 7 of each 32 columns of the chunk. So a warp reads 512
/// bytes at a time, and the registers are what mma.m16n8k16 expects once the columns of both of its
/// operands are taken in the same order. Edges are padded with zeros, columns to whole blocks.
struct packed_matrix {
  const void* data = nullptr;
  const float* scales = nullptr;       ///< [ceil(num_rows / block_rows), num_scale_cols]
  const std::uint8_t* zeros = nullptr; ///< i4 only: as many; null stands for 8
  std::int32_t num_rows = 0;
  std::int32_t num_cols = 0;
  std::int32_t num_chunks = 0; ///< of one tile
  std::int32_t block_rows = 1;
  std::int32_t num_scale_cols = 1;
  std::int32_t blocks_per_scale = 1; ///< blocks of kBlockCols that share a scale
  packed_type type = packed_type::bf16;
};

/// Whether one launch can multiply with both, but for the numbers of rows.
constexpr bool same_layout(const packed_matrix& a, const packed_matrix& b) {
  return a.type == b.type && a.num_cols == b.num_cols && a.block_rows == b.block_rows
         && a.num_scale_cols == b.num_scale_cols && a.blocks_per_scale == b.blocks_per_scale;
}

constexpr bool same_shape(const packed_matrix& a, const packed_matrix& b) {
  return same_layout(a, b) && a.num_rows == b.num_rows;
}

/// Columns of a chunk.
constexpr std::int32_t chunk_cols(packed_type type) {
  return type == packed_type::bf16 ? 32 : type == packed_type::i4 ? 128 : 64;
}

constexpr std::int32_t ceil_div(std::int32_t a, std::int32_t b) {
  return (a + b - 1) / b;
}

/// Chunks of a tile: columns are padded to whole blocks.
constexpr std::int32_t num_chunks(packed_type type, std::int32_t num_cols) {
  return ceil_div(num_cols, kBlockCols) * (kBlockCols / chunk_cols(type));
}

/// Bytes of a packed weight without its scales.
constexpr std::int64_t packed_bytes(std::int32_t num_rows, std::int32_t num_chunks) {
  return std::int64_t{ceil_div(num_rows, kTileRows)} * num_chunks * 1024;
}

/// In how many parts the columns are cut: a power of two. Parts of fewer than four blocks are not
/// worth a warp of their own.
constexpr std::int32_t num_splits(std::int32_t num_cols) {
  const std::int32_t most = ceil_div(num_cols, kBlockCols) / 4;
  std::int32_t splits = 1;
  while (splits * 2 <= most && splits * 2 <= kMaxSplits) {
    splits *= 2;
  }
  return splits;
}

} // namespace troupe::kernels::cuda
