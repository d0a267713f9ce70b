#pragma once

#include "troupe/kernels/ops.hpp"

#include <bit>
#include <cstdint>

/// How `place` rounds a weight to 8 bit (weight_use::int8_product): by row and group of columns, so
/// that the largest magnitude of a group is 127 of its steps. The same on a host and in a kernel
/// bit by bit: every step is exact or rounds once, to nearest even, and none can be fused with
/// another to a different result.
namespace troupe::kernels {

/// Columns that share a scale.
inline constexpr std::int32_t kNarrowGroup = 128;

/// The bits of a magnitude: as whole numbers, they are in the order of the magnitudes, with
/// infinity and NaN above all others.
constexpr std::uint32_t magnitude_bits(float value) {
  return std::bit_cast<std::uint32_t>(value) & 0x7FFFFFFFU;
}

/// The scale of a group whose largest magnitude has these bits; NaN where that is not finite, so
/// that products with the group are NaN as they would have been.
constexpr float narrow_scale(std::uint32_t largest_bits) {
  if (largest_bits >= 0x7F800000U) {
    return std::bit_cast<float>(0x7FC00000U);
  }
  const float scale = std::bit_cast<float>(largest_bits) / 127.0F;
  return scale > 0x1p-100F ? scale : 0x1p-100F;
}

/// The code of an element in a group of this scale.
constexpr std::int8_t narrow_code(float value, float scale) {
  const float ratio = value / scale;
  if (!(ratio >= -127.0F && ratio <= 127.0F)) { // by rounding; or NaN, as the scale says
    return static_cast<std::int8_t>(ratio > 127.0F ? 127 : ratio < -127.0F ? -127 : 0);
  }
  return static_cast<std::int8_t>((ratio + 0x1.8p23F) - 0x1.8p23F);
}

/// Whether `place` rounds a weight: one of wider elements, without scales, that is to be kept in 8
/// bit. What is stored in fewer bits stays as it is.
bool is_narrowed(const weight_matrix& weight, weight_use use);

/// What it becomes: its shape, without elements or scales.
weight_matrix narrowed_shape(const weight_matrix& weight);

} // namespace troupe::kernels
