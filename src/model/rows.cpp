#include "troupe/model/rows.hpp"

#include <cstddef>

namespace troupe::model {

kernels::rows_view slice_rows(const kernels::rows_view& x, kernels::element_type type,
                              std::int32_t first, std::int32_t count) {
  auto result = x;
  result.data = static_cast<std::byte*>(x.data)
                + static_cast<std::size_t>(first) * x.stride * kernels::size_of(type);
  result.num_rows = count;
  return result;
}

kernels::rows_view slice_cols(const kernels::rows_view& x, kernels::element_type type,
                              std::int32_t first, std::int32_t count) {
  auto result = x;
  result.data =
    static_cast<std::byte*>(x.data) + static_cast<std::size_t>(first) * kernels::size_of(type);
  result.num_cols = count;
  return result;
}

void gather_rows(kernels::ops& ops, const kernels::rows_view& x, std::span<const std::int32_t> rows,
                 void* to) {
  const auto type = ops.activation_type();
  const auto row_bytes =
    static_cast<std::size_t>(x.num_cols) * kernels::size_of(ops.exchange_type());
  for (std::size_t i = 0; i < rows.size();) {
    auto end = i + 1;
    while (end < rows.size() && rows[end] == rows[end - 1] + 1)
      ++end;
    ops.export_rows(slice_rows(x, type, rows[i], static_cast<std::int32_t>(end - i)),
                    static_cast<std::byte*>(to) + i * row_bytes);
    i = end;
  }
}

row_buffer::row_buffer(kernels::ops& ops, kernels::element_type type, std::int64_t max_rows,
                       std::int32_t num_cols)
  : memory_(ops.allocate(static_cast<std::size_t>(max_rows) * num_cols * kernels::size_of(type))),
    num_cols_(num_cols) {}

kernels::rows_view row_buffer::view(std::int32_t num_rows) const {
  return {memory_.get(), num_rows, num_cols_, num_cols_};
}

} // namespace troupe::model
