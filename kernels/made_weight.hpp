#pragma once

#include "troupe/kernels/ops.hpp"

#include <bit>
#include <cstdint>

/// The arithmetic of made-up weights (model/random_weights.hpp), the same on a host and in a kernel
/// bit by bit: every step is exact or rounds once, to nearest even, and none can be fused with
/// another to a different result.
namespace troupe::kernels {

/// A made-up matrix, or a part of one: its elements follow from its key and their index in the
/// whole matrix; where it is quantized, scales and codes follow from the elements of whole blocks.
struct weight_recipe {
  std::uint64_t key = 0;     ///< of the tensor
  double width = 0.0;        ///< elements lie between -width and width
  std::int32_t num_rows = 0; ///< of the whole matrix
  std::int32_t num_cols = 0;
  std::int32_t first_row = 0; ///< where in it the part begins
  std::int32_t first_col = 0;
  std::int32_t block_rows = 0; ///< what shares a scale, from the first row and column of the whole
  std::int32_t block_cols = 0; ///< matrix on; 0: not quantized
};

/// The output function of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
/// generators", OOPSLA 2014).
constexpr std::uint64_t splitmix64(std::uint64_t z) {
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9U;
  z = (z ^ z >> 27) * 0x94D049BB133111EBU;
  return z ^ z >> 31;
}

/// The bits of a finite value rounded to bf16.
constexpr std::uint16_t made_bf16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  return static_cast<std::uint16_t>((bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16);
}

/// The bits of one element in bf16.
constexpr std::uint16_t made_element(std::uint64_t key, double width, std::uint64_t index) {
  const auto z = splitmix64(key + (index + 1) * 0x9E3779B97F4A7C15U);
  const double uniform = static_cast<double>(z >> 40) * 0x1p-24 * 2.0 - 1.0;
  return made_bf16(static_cast<float>(uniform * width));
}

/// The same of a row and column of the whole matrix, as a number.
constexpr float made_value(const weight_recipe& recipe, std::int32_t row, std::int32_t col) {
  const auto index = static_cast<std::uint64_t>(row) * static_cast<std::uint64_t>(recipe.num_cols)
                     + static_cast<std::uint64_t>(col);
  return std::bit_cast<float>(std::uint32_t{made_element(recipe.key, recipe.width, index)} << 16);
}

inline constexpr float kLargestE4m3 = 448.0F;

/// The scale of a block whose largest magnitude is this, in e4m3 or in signed bytes.
constexpr float made_scale(element_type type, float largest) {
  const float size = largest < 1e-4F ? 1e-4F : largest;
  return size / (type == element_type::f8_e4m3 ? kLargestE4m3 : 127.0F);
}

/// The nearest whole number, ties to even, of one below 2^22.
constexpr std::int32_t nearest(float value) {
  return static_cast<std::int32_t>((value + 0x1.8p23F) - 0x1.8p23F);
}

/// The nearest e4m3 code, ties to even; beyond the largest value, the largest.
constexpr std::uint8_t nearest_e4m3(float value) {
  const auto all = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint8_t>(all >> 24 & 0x80U);
  float size = std::bit_cast<float>(all & 0x7FFFFFFFU);
  if (size > kLargestE4m3) {
    size = kLargestE4m3;
  }
  if (size < 0x1p-6F) { // subnormal: multiples of 2^-9, and the first normal value follows them
    return static_cast<std::uint8_t>(sign | nearest(size * 512.0F));
  }
  const auto bits = std::bit_cast<std::uint32_t>(size);
  const auto rounded = (bits + 0x7FFFFU + (bits >> 20 & 1U)) >> 20;
  return static_cast<std::uint8_t>(sign | (rounded - (120U << 3)));
}

/// The code of an element in a block of this scale.
constexpr std::uint8_t made_code(element_type type, float value, float scale) {
  const float ratio = value / scale;
  return type == element_type::f8_e4m3
           ? nearest_e4m3(ratio)
           : static_cast<std::uint8_t>(static_cast<std::int8_t>(nearest(ratio)));
}

} // namespace troupe::kernels
