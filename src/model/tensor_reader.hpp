#pragma once

#include "troupe/base/error.hpp"
#include "troupe/kernels/ops.hpp"
#include "troupe/model/weights.hpp"

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace troupe::model {

/// Loads one tensor after the other and stops at the first error, so that a layer reads as the
/// list of its tensors. After an error nothing more is written; ask `finish` before any use.
class tensor_reader {
public:
  explicit tensor_reader(weight_store& store) : store_(store) {}

  void read(kernels::weight_matrix& out, const std::string& name, std::int32_t num_rows,
            std::int32_t num_cols, kernels::weight_use use = kernels::weight_use::product) {
    if (status_)
      take(store_.matrix(name, num_rows, num_cols, use), out);
  }

  void read(std::optional<kernels::weight_matrix>& out, const std::string& name,
            std::int32_t num_rows, std::int32_t num_cols,
            kernels::weight_use use = kernels::weight_use::product) {
    if (status_)
      take(store_.matrix(name, num_rows, num_cols, use), out);
  }

  void read(const float*& out, const std::string& name, std::int32_t size) {
    if (status_)
      take(store_.vector(name, size), out);
  }

  void read(std::optional<kernels::expert_weights>& out, const std::string& prefix,
            std::int32_t hidden_size, std::int32_t intermediate_size) {
    if (status_)
      take(load_mlp(store_, prefix, hidden_size, intermediate_size), out);
  }

  /// A weight as float32 values, to be taken apart.
  std::vector<float> values(const std::string& name, std::int32_t num_rows, std::int32_t num_cols) {
    std::vector<float> result;
    if (status_)
      take(store_.dequantised(name, num_rows, num_cols), result);
    return result;
  }

  /// Keeps values made of tensors; null after an error.
  const float* keep(std::vector<float> made) {
    return status_ ? store_.keep(std::move(made)) : nullptr;
  }

  /// The same for a weight of rows of num_cols values; empty after an error.
  kernels::weight_matrix keep(std::vector<float> made, std::int32_t num_cols,
                              kernels::weight_use use = kernels::weight_use::product) {
    return status_ ? store_.keep(std::move(made), num_cols, use) : kernels::weight_matrix{};
  }

  bool ok() const { return status_.has_value(); }

  /// The first error, if any.
  expected<void> finish() { return std::move(status_); }

private:
  template <class From, class To>
  void take(expected<From> value, To& out) {
    if (value)
      out = std::move(*value);
    else
      status_ = tl::unexpected(std::move(value.error()));
  }

  weight_store& store_;
  expected<void> status_;
};

} // namespace troupe::model
