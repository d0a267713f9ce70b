#include "troupe/model/ordered_groups.hpp"

#include "troupe/model/stored_weight.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

namespace troupe::model {

using kernels::element_type;

namespace {

std::uint16_t nearest_bf16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  return static_cast<std::uint16_t>((bits + 0x7fffU + (bits >> 16 & 1U)) >> 16);
}

/// Appends a row, which is finite, as elements of type `as`.
void store(std::span<const float> row, element_type as, std::byte* out) {
  if (as == element_type::f32) {
    std::memcpy(out, row.data(), row.size_bytes());
    return;
  }
  for (std::size_t i = 0; i < row.size(); ++i) {
    const auto bits = as == element_type::f16 ? nearest_f16(row[i]) : nearest_bf16(row[i]);
    std::memcpy(out + 2 * i, &bits, 2);
  }
}

} // namespace

std::uint16_t nearest_f16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000U);
  const float magnitude = std::abs(value);
  if (!(magnitude < 65520.0F)) // rounds beyond the largest, 65504; or NaN
    return static_cast<std::uint16_t>(sign | (std::isnan(value) ? 0x7e00U : 0x7c00U));
  if (magnitude == 0.0F)
    return sign;
  int exponent = 0;
  std::frexp(magnitude, &exponent); // magnitude in [2^(exponent-1), 2^exponent)
  // Ten bits behind the leading one; below 2^-14 as many as are left of units of 2^-24.
  const int unit = std::max(exponent - 11, -24);
  const auto count = static_cast<std::uint32_t>(std::nearbyint(std::ldexp(magnitude, -unit)));
  // The leading one, where there is one, raises the exponent by one, as does a carry.
  return static_cast<std::uint16_t>(sign | ((static_cast<std::uint32_t>(unit + 24) << 10) + count));
}

std::vector<std::byte> multiply_out(const kernels::weight_matrix& codes, std::int32_t groups,
                                    std::span<const std::int32_t> group_of_column,
                                    element_type as) {
  const auto cols = static_cast<std::size_t>(codes.num_cols);
  const auto in_bytes = kernels::row_bytes(codes.type, codes.num_cols);
  const auto out_bytes = kernels::row_bytes(as, codes.num_cols);
  std::vector<std::byte> result(codes.num_rows * out_bytes);
  std::vector<float> row(cols);
  for (std::int32_t r = 0; r < codes.num_rows; ++r) {
    to_float32(static_cast<const std::byte*>(codes.data) + r * in_bytes, codes.type, row);
    const auto first = static_cast<std::size_t>(r) * groups;
    for (std::size_t c = 0; c < cols; ++c) {
      const auto group = first + static_cast<std::size_t>(group_of_column[c]);
      if (codes.type == element_type::i4)
        row[c] -= codes.zeros != nullptr ? static_cast<float>(codes.zeros[group]) : 8.0F;
      row[c] *= codes.scales[group];
    }
    store(row, as, result.data() + r * out_bytes);
  }
  return result;
}

} // namespace troupe::model
