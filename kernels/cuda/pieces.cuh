#pragma once

// What kernels that add up rows of several ranks share, for device code.

#include "troupe/kernels/cuda/device.cuh"
#include "troupe/kernels/cuda/pieces.hpp"

namespace troupe::kernels::cuda {

template <bool kWhole, class T>
__device__ inline uint4 load_piece(const pieces_of_rows<T>& x, std::uint32_t piece) {
  constexpr auto kPiece = pieces_of_rows<T>::kPiece;
  const std::uint32_t row = piece / x.per_row;
  const std::uint32_t col = (piece - row * x.per_row) * kPiece;
  const T* at = x.data + row * x.stride + col;
  if constexpr (kWhole) {
    return *reinterpret_cast<const uint4*>(at);
  } else {
    alignas(16) T values[kPiece];
#pragma unroll
    for (std::uint32_t i = 0; i < kPiece; ++i) {
      values[i] = col + i < x.num_cols ? at[i] : T(0.0F);
    }
    return *reinterpret_cast<const uint4*>(values);
  }
}

template <bool kWhole, class T>
__device__ inline void store_piece(const pieces_of_rows<T>& x, std::uint32_t piece,
                                   const uint4& value) {
  constexpr auto kPiece = pieces_of_rows<T>::kPiece;
  const std::uint32_t row = piece / x.per_row;
  const std::uint32_t col = (piece - row * x.per_row) * kPiece;
  T* at = x.data + row * x.stride + col;
  if constexpr (kWhole) {
    *reinterpret_cast<uint4*>(at) = value;
  } else {
    alignas(16) T values[kPiece];
    *reinterpret_cast<uint4*>(values) = value;
#pragma unroll
    for (std::uint32_t i = 0; i < kPiece; ++i) {
      if (col + i < x.num_cols) {
        at[i] = values[i];
      }
    }
  }
}

/// By value, so that both stay in registers.
__device__ inline uint4 choose(bool first, uint4 a, uint4 b) {
  if (first) {
    return a;
  }
  return b;
}

/// The sums of the elements of a piece.
template <class T>
class piece_sum;

template <>
class piece_sum<bf16> {
public:
  __device__ explicit piece_sum(const uint4& first) {
    const std::uint32_t words[4] = {first.x, first.y, first.z, first.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values_[2 * i] = low(words[i]);
      values_[2 * i + 1] = high(words[i]);
    }
  }

  __device__ void add(const uint4& next) {
    const std::uint32_t words[4] = {next.x, next.y, next.z, next.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values_[2 * i] += low(words[i]);
      values_[2 * i + 1] += high(words[i]);
    }
  }

  __device__ uint4 rounded() const {
    return {pair(0), pair(2), pair(4), pair(6)};
  }

private:
  static __device__ float low(std::uint32_t word) {
    return __uint_as_float(word << 16);
  }
  static __device__ float high(std::uint32_t word) {
    return __uint_as_float(word & 0xFFFF0000U);
  }

  __device__ std::uint32_t pair(int i) const {
    const __nv_bfloat162 both = __floats2bfloat162_rn(values_[i], values_[i + 1]);
    return *reinterpret_cast<const std::uint32_t*>(&both);
  }

  float values_[8];
};

template <>
class piece_sum<float> {
public:
  __device__ explicit piece_sum(const uint4& first) {
    values_[0] = __uint_as_float(first.x);
    values_[1] = __uint_as_float(first.y);
    values_[2] = __uint_as_float(first.z);
    values_[3] = __uint_as_float(first.w);
  }

  __device__ void add(const uint4& next) {
    values_[0] += __uint_as_float(next.x);
    values_[1] += __uint_as_float(next.y);
    values_[2] += __uint_as_float(next.z);
    values_[3] += __uint_as_float(next.w);
  }

  __device__ uint4 rounded() const {
    return {__float_as_uint(values_[0]), __float_as_uint(values_[1]), __float_as_uint(values_[2]),
            __float_as_uint(values_[3])};
  }

private:
  float values_[4];
};

} // namespace troupe::kernels::cuda
