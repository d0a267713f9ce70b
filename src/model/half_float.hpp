#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

/// IEEE 754 binary16 without special instructions: 5 bits of exponent, 10 of mantissa.
namespace troupe::model {

/// To the nearest, ties to even; beyond 65,520 infinity. A NaN stays one.
inline std::uint16_t f16_bits(float value) {
  constexpr std::uint32_t smallest_normal = 0x38800000; // 2^-14
  constexpr std::uint32_t infinity = 0x7f800000;
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000U);
  auto magnitude = bits & 0x7fffffffU;
  if (magnitude > infinity)
    return static_cast<std::uint16_t>(sign | 0x7e00U);
  if (magnitude < smallest_normal) // a multiple of 2^-24
    return static_cast<std::uint16_t>(
      sign | static_cast<std::uint16_t>(std::nearbyint(std::bit_cast<float>(magnitude) * 0x1p24F)));
  if (magnitude >= 0x47800000) // 2^16
    return static_cast<std::uint16_t>(sign | 0x7c00U);
  magnitude += 0xfffU + (magnitude >> 13 & 1U);
  return static_cast<std::uint16_t>(sign | (magnitude - 0x38000000U) >> 13);
}

/// The finite value of 16 bits.
inline float f16_value(std::uint16_t bits) {
  const int exponent = bits >> 10 & 0x1f;
  const int mantissa = bits & 0x3ff;
  const float magnitude = exponent == 0
                            ? std::ldexp(static_cast<float>(mantissa), -24)
                            : std::ldexp(static_cast<float>(mantissa | 0x400), exponent - 25);
  return (bits & 0x8000U) != 0 ? -magnitude : magnitude;
}

} // namespace troupe::model
