#pragma once

#include "troupe/kernels/ops.hpp"

#include <cstdint>
#include <memory>
#include <span>

namespace troupe::model {

/// Rows [first, first + count) of x, whose elements are of `type`.
kernels::rows_view slice_rows(const kernels::rows_view& x, kernels::element_type type,
                              std::int32_t first, std::int32_t count);

/// Columns [first, first + count) of x, whose elements are of `type`.
kernels::rows_view slice_cols(const kernels::rows_view& x, kernels::element_type type,
                              std::int32_t first, std::int32_t count);

/// Copies the given rows of x to dense host memory [rows.size(), x.num_cols] of the back end's
/// exchange_type, neighbours together. What an exchange sends to an expert group.
void gather_rows(kernels::ops& ops, const kernels::rows_view& x, std::span<const std::int32_t> rows,
                 void* to);

/// Device memory for up to a fixed number of rows. Views stay valid when it is moved.
class row_buffer {
public:
  row_buffer() = default;
  row_buffer(kernels::ops& ops, kernels::element_type type, std::int64_t max_rows,
             std::int32_t num_cols);

  kernels::rows_view view(std::int32_t num_rows) const;

private:
  std::shared_ptr<void> memory_;
  std::int32_t num_cols_ = 0;
};

} // namespace troupe::model
