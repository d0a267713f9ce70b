#include "troupe/model/quantized_tensor.hpp"

#include "troupe/kernels/cpu/bf16.hpp"
#include "troupe/model/half_float.hpp"
#include "troupe/model/integer_packing.hpp"
#include "troupe/model/stored_weight.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include <fmt/format.h>

namespace troupe::model {

namespace {

/// Rows expanded to float32 at a time.
constexpr std::int32_t kSliceRows = 128;

/// Rows [first, first + count) of a matrix; `first` is a multiple of the rows of a block, or there
/// is one block.
kernels::weight_matrix rows_of(const kernels::weight_matrix& whole, std::int32_t first,
                               std::int32_t count) {
  auto part = whole;
  part.num_rows = count;
  part.data = static_cast<const std::byte*>(whole.data)
              + first * kernels::row_bytes(whole.type, whole.num_cols);
  if (whole.scales != nullptr) {
    const auto groups = (whole.num_cols + whole.block_cols - 1) / whole.block_cols;
    part.scales = whole.scales + static_cast<std::size_t>(first / whole.block_rows) * groups;
  }
  return part;
}

template <class T>
std::vector<std::byte> bytes_of(const std::vector<T>& values) {
  std::vector<std::byte> result(values.size() * sizeof(T));
  std::memcpy(result.data(), values.data(), result.size());
  return result;
}

std::vector<std::vector<std::byte>> pack(const integer_rows& rows) {
  const auto groups = rows.format.num_groups(rows.num_cols);
  if (rows.format.bits == 8)
    return {bytes_of(rows.scales), bytes_of(rows.codes)};
  std::vector<std::uint16_t> scales(rows.scales.size());
  for (std::int32_t row = 0; row < rows.num_rows; ++row)
    for (std::int32_t group = 0; group < groups; ++group)
      scales[static_cast<std::size_t>(group) * rows.num_rows + row] =
        f16_bits(rows.scales[static_cast<std::size_t>(row) * groups + group]);
  return {pack_awq(rows.codes, rows.num_rows, rows.num_cols),
          pack_awq(rows.zeros, rows.num_rows, groups), bytes_of(scales)};
}

} // namespace

expected<converted_tensor> convert_tensor(tensor_source& source, const model_config& config,
                                          const integer_format& format,
                                          const planned_tensor& tensor) {
  converted_tensor result;
  if (tensor.treatment == tensor_treatment::copied)
    return result;
  auto stored = find_weight(source, config, tensor.name, tensor.num_rows, tensor.num_cols,
                            weight_loading::load);
  if (!stored)
    return tl::unexpected(std::move(stored.error()));
  const auto weight = stored->view();
  const auto not_finite = [&](std::int64_t row, std::int64_t col) {
    return fail(error_code::invalid_model,
                fmt::format("{}: tensor \"{}\" has a value that is not finite in row {}, column {}",
                            source.file_of(tensor.name), tensor.name, row, col),
                "the file is damaged: copy it again from its source");
  };
  const bool has_blocks = weight.scales != nullptr && weight.block_rows < weight.num_rows;
  const auto slice =
    has_blocks ? std::max(kSliceRows / weight.block_rows, 1) * weight.block_rows : kSliceRows;
  const auto cols = static_cast<std::size_t>(tensor.num_cols);
  integer_rows rows;
  std::vector<std::uint16_t> expanded;
  if (tensor.treatment == tensor_treatment::quantized)
    rows = make_integer_rows(format, tensor.num_rows, tensor.num_cols);
  else
    expanded.reserve(static_cast<std::size_t>(tensor.num_rows) * cols);
  for (std::int32_t first = 0; first < tensor.num_rows; first += slice) {
    const auto values =
      dequantise(rows_of(weight, first, std::min(slice, tensor.num_rows - first)));
    if (tensor.treatment == tensor_treatment::quantized) {
      if (const auto bad = quantize_rows(values, first, rows))
        return not_finite(first + static_cast<std::int64_t>(*bad / cols),
                          static_cast<std::int64_t>(*bad % cols));
      continue;
    }
    for (std::size_t i = 0; i < values.size(); ++i) {
      if (!std::isfinite(values[i]))
        return not_finite(first + static_cast<std::int64_t>(i / cols),
                          static_cast<std::int64_t>(i % cols));
      expanded.push_back(kernels::cpu::bf16_bits(values[i]));
    }
  }
  if (tensor.treatment == tensor_treatment::expanded) {
    result.outputs.push_back(bytes_of(expanded));
    return result;
  }
  result.outputs = pack(rows);
  result.loss = rows.loss;
  return result;
}

} // namespace troupe::model
