#pragma once

#include <cstdint>

#include "troupe/kernels/cuda/kernels.hpp"

namespace troupe::kernels::cuda {

/// Rows in pieces of 16 bytes, the unit in which ranks exchange them. The last piece of a row may
/// be a part of one.
template <class T>
struct pieces_of_rows {
  /// Elements of a piece.
  static constexpr std::uint32_t kPiece = 16 / sizeof(T);

  T* data = nullptr;
  std::int64_t stride = 0;
  std::uint32_t num_cols = 0;
  std::uint32_t per_row = 0;
  std::uint32_t count = 0;
  bool whole = false; ///< every piece is 16 bytes on a border of 16 bytes
};

template <class T>
std::uint32_t pieces_per_row(std::int32_t num_cols) {
  constexpr auto kPiece = pieces_of_rows<T>::kPiece;
  return (static_cast<std::uint32_t>(num_cols) + kPiece - 1) / kPiece;
}

/// `count` rows of x from `first` on.
template <class T>
pieces_of_rows<T> pieces_of(const rows_of<T>& x, std::int32_t first, std::int32_t count) {
  constexpr auto kPiece = static_cast<std::int32_t>(pieces_of_rows<T>::kPiece);
  pieces_of_rows<T> part;
  part.data = x.data + first * x.stride;
  part.stride = x.stride;
  // Rows without gaps are one long row, unless that would cut pieces in another way than on a
  // rank whose rows have gaps.
  const bool dense = count == 1 || (x.stride == x.num_cols && x.num_cols % kPiece == 0);
  part.num_cols = static_cast<std::uint32_t>(dense ? count * x.num_cols : x.num_cols);
  part.per_row = (part.num_cols + part.kPiece - 1) / part.kPiece;
  part.count = pieces_per_row<T>(x.num_cols) * count;
  part.whole = x.num_cols % kPiece == 0 && (dense || x.stride % kPiece == 0)
               && reinterpret_cast<std::uintptr_t>(part.data) % 16 == 0;
  return part;
}

} // namespace troupe::kernels::cuda
