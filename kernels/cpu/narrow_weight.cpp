#include "troupe/kernels/narrow_weight.hpp"

#include <algorithm>

#include "troupe/kernels/cpu/cpu_ops.hpp"

namespace troupe::kernels {

namespace {

std::int32_t groups_of(std::int32_t num_cols) {
  return (num_cols + kNarrowGroup - 1) / kNarrowGroup;
}

} // namespace

bool is_narrowed(const weight_matrix& weight, weight_use use) {
  const bool is_wide = weight.type == element_type::f32 || weight.type == element_type::bf16
                       || weight.type == element_type::f16;
  return use == weight_use::int8_product && is_wide && weight.scales == nullptr;
}

weight_matrix narrowed_shape(const weight_matrix& weight) {
  weight_matrix result;
  result.type = element_type::i8;
  result.num_rows = weight.num_rows;
  result.num_cols = weight.num_cols;
  result.block_rows = 1;
  result.block_cols = kNarrowGroup;
  return result;
}

namespace cpu {

weight_matrix cpu_ops::place(const weight_matrix& weight, weight_use use) {
  if (!is_narrowed(weight, use)) {
    return weight;
  }
  const auto num_codes = static_cast<std::size_t>(weight.num_rows) * weight.num_cols;
  const auto begin_of_scales = (num_codes + 63) / 64 * 64;
  const auto num_scales = static_cast<std::size_t>(weight.num_rows) * groups_of(weight.num_cols);
  auto memory = allocate(begin_of_scales + num_scales * sizeof(float));
  if (memory == nullptr) {
    failure_ = "there is no memory for a weight in 8 bit";
    return weight;
  }
  auto* codes = static_cast<std::int8_t*>(memory.get());
  auto* scales = reinterpret_cast<float*>(codes + begin_of_scales);
  narrow(weight, codes, scales);
  auto result = narrowed_shape(weight);
  result.data = codes;
  result.scales = scales;
  narrowed_.push_back(std::move(memory));
  return result;
}

void cpu_ops::narrow(const weight_matrix& weight, std::int8_t* codes, float* scales) {
  const std::int32_t num_cols = weight.num_cols;
  const std::int32_t num_groups = groups_of(num_cols);
  for_rows(weight.num_rows, 4 * std::int64_t{num_cols}, [&](std::int32_t row, std::int32_t thread) {
    float* values = memory_[thread].linear.take(num_cols);
    kernels_.expand_row(weight, row, values);
    std::int8_t* to = codes + std::int64_t{row} * num_cols;
    for (std::int32_t group = 0; group < num_groups; ++group) {
      const std::int32_t first = group * kNarrowGroup;
      const std::int32_t last = std::min(num_cols, first + kNarrowGroup);
      std::uint32_t largest = 0;
      for (std::int32_t k = first; k < last; ++k) {
        largest = std::max(largest, magnitude_bits(values[k]));
      }
      const float scale = narrow_scale(largest);
      scales[std::int64_t{row} * num_groups + group] = scale;
      for (std::int32_t k = first; k < last; ++k) {
        to[k] = narrow_code(values[k], scale);
      }
    }
  });
}

} // namespace cpu

} // namespace troupe::kernels
