#pragma once

#include <cstdint>

#include "troupe/kernels/cuda/kernels.hpp"

namespace troupe::kernels::cuda {

/// Rows in pieces of 16 bytes, the unit in which ranks exchange them. The last piece of a row may
/// be a part of one.
struct pieces_of_rows {
  bf16* data = nullptr;
  std::int64_t stride = 0;
  std::uint32_t num_cols = 0;
  std::uint32_t per_row = 0;
  std::uint32_t count = 0;
  bool whole = false; ///< every piece is 16 bytes on a border of 16 bytes
};

inline std::uint32_t pieces_per_row(std::int32_t num_cols) {
  return (static_cast<std::uint32_t>(num_cols) + 7) / 8;
}

/// `count` rows of x from `first` on.
inline pieces_of_rows pieces_of(const rows_of_bf16& x, std::int32_t first, std::int32_t count) {
  pieces_of_rows part;
  part.data = x.data + first * x.stride;
  part.stride = x.stride;
  // Rows without gaps are one long row, unless that would cut pieces in another way than on a
  // rank whose rows have gaps.
  const bool dense = count == 1 || (x.stride == x.num_cols && x.num_cols % 8 == 0);
  part.num_cols = static_cast<std::uint32_t>(dense ? count * x.num_cols : x.num_cols);
  part.per_row = (part.num_cols + 7) / 8;
  part.count = pieces_per_row(x.num_cols) * count;
  part.whole = x.num_cols % 8 == 0 && (dense || x.stride % 8 == 0)
               && reinterpret_cast<std::uintptr_t>(part.data) % 16 == 0;
  return part;
}

} // namespace troupe::kernels::cuda
