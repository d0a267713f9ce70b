#pragma once

#include "troupe/kernels/ops.hpp"

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace troupe::model {

/// The elements of a matrix whose columns were put into groups in the order of their activations
/// (GPTQ with `desc_act`), so that neighbours have different scales. Kernels know only groups of
/// neighbours, and sorting the columns would need every input sorted as well. So
/// (code - zero) * scale is multiplied out and rounded to `as` (f16, bf16 or f32), the type of
/// the stored scales, as the libraries that write this format do it before each product. In 16 bit
/// that takes 4 times the memory of 4-bit codes, and 2 times that of 8-bit ones.
///
/// `codes` has type i4 or i8, with the scales and zero points of `groups` groups a row, as if they
/// were of neighbours; `group_of_column` has num_cols elements below `groups`. Pure.
std::vector<std::byte> multiply_out(const kernels::weight_matrix& codes, std::int32_t groups,
                                    std::span<const std::int32_t> group_of_column,
                                    kernels::element_type as);

/// The nearest value of half precision (IEEE 754 binary16), ties to even.
std::uint16_t nearest_f16(float value);

} // namespace troupe::model
