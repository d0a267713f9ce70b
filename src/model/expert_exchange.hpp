#pragma once

#include "troupe/base/error.hpp"
#include "troupe/kernels/ops.hpp"
#include "troupe/model/dispatch_plan.hpp"
#include "troupe/model/expert_group_model.hpp"

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace troupe::model {

/// How a stage gets its routed experts computed, here or in other processes. A stage calls
/// `begin`, computes the shared expert, then calls `finish`, both on the thread of its
/// forward pass. Results must not depend on where experts live: each is one row of
/// kernels::ops::experts, and the stage sums them in ascending order of experts.
class expert_exchange {
public:
  virtual ~expert_exchange() = default;

  /// Starts the experts of `layer` for x [rows, hidden], activations that stay unchanged until
  /// `finish` returns. `experts` is a host array [rows, top_k] of global indices, ascending
  /// within a row, valid for this call only. A `begin` without `finish` before it is
  /// given up: the forward pass it belonged to is being repeated.
  virtual expected<void> begin(std::int32_t layer, const kernels::rows_view& x,
                               std::span<const std::int32_t> experts, std::int32_t top_k) = 0;

  /// Waits, with a deadline, and writes one row for each (row, k) into expert_out
  /// [rows * top_k, hidden], in any order, and to expert_rows [rows, top_k] where each one
  /// is. An error aborts the forward pass, which may then be repeated.
  virtual expected<void> finish(const kernels::rows_view& expert_out,
                                std::span<std::int32_t> expert_rows) = 0;
};

/// All experts in this process.
class local_experts final : public expert_exchange {
public:
  /// Loads all experts of the MoE layers in [first_layer, end_layer). Errors: as
  /// expert_group_model::load.
  static expected<std::unique_ptr<local_experts>>
  load(std::shared_ptr<tensor_source> source, const model_config& config, std::int32_t first_layer,
       std::int32_t end_layer, std::int32_t max_rows, kernels::ops& ops);

  /// For devices that mix them without an exchange (kernels::ops::mixture).
  std::span<const kernels::expert_weights> experts_of(std::int32_t layer) const {
    return model_->experts_of(layer);
  }

  expected<void> begin(std::int32_t layer, const kernels::rows_view& x,
                       std::span<const std::int32_t> experts, std::int32_t top_k) override;
  expected<void> finish(const kernels::rows_view& expert_out,
                        std::span<std::int32_t> expert_rows) override;

private:
  local_experts(std::unique_ptr<expert_group_model> model, dispatch_plan plan);

  std::unique_ptr<expert_group_model> model_;
  dispatch_plan plan_;
  std::int32_t layer_ = -1;
  kernels::rows_view x_;
};

} // namespace troupe::model
