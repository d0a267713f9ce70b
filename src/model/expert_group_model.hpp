#pragma once

#include "troupe/base/error.hpp"
#include "troupe/kernels/ops.hpp"
#include "troupe/model/dispatch_plan.hpp"
#include "troupe/model/model_config.hpp"
#include "troupe/model/tensor_source.hpp"
#include "troupe/model/weights.hpp"

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace troupe::model {

/// A range of routed experts of every MoE layer in a range of layers. Holds no state between
/// calls. To be used by one thread at a time, the one that uses `ops`.
class expert_group_model {
public:
  /// Maps and checks the weights; they are used in place. `ops` must outlive the model. The first
  /// MTP layer is the one behind the last.
  /// Errors: invalid_config for an impossible range, invalid_model, io_failed.
  static expected<std::unique_ptr<expert_group_model>>
  load(std::shared_ptr<tensor_source> source, const model_config& config, expert_range experts,
       std::int32_t first_layer, std::int32_t end_layer, kernels::ops& ops);

  /// The same for all layers of the model.
  static expected<std::unique_ptr<expert_group_model>> load(std::shared_ptr<tensor_source> source,
                                                            const model_config& config,
                                                            expert_range experts, kernels::ops& ops,
                                                            bool with_mtp = false);

  expert_range experts() const { return experts_; }
  std::int32_t hidden_size() const { return hidden_size_; }

  /// The experts of a MoE layer, the same array as long as the model lives.
  std::span<const kernels::expert_weights> experts_of(std::int32_t layer) const {
    return layers_[layer - first_layer_];
  }

  /// out[i] = expert tasks[i].expert of `layer` applied to x[tasks[i].row]. Experts are local:
  /// 0 is the first of this group. Tasks are sorted by expert. x [rows, hidden], out [at least
  /// tasks.size(), hidden]. Errors: invalid_request for anything out of range, as tasks may
  /// come from another process.
  expected<void> run(std::int32_t layer, const kernels::rows_view& x,
                     std::span<const kernels::expert_task> tasks, const kernels::rows_view& out);

  /// Computes one layer for max_rows rows with their experts, of nothing that anybody has asked
  /// for: see stage_model::rehearse.
  expected<void> rehearse(std::int32_t max_rows, std::int32_t top_k);

private:
  expert_group_model(std::shared_ptr<tensor_source> source, const model_config& config,
                     expert_range experts, std::int32_t first_layer, kernels::ops& ops);

  kernels::ops& ops_;
  weight_store store_;
  expert_range experts_;
  std::int32_t first_layer_;
  std::int32_t hidden_size_;
  std::vector<std::vector<kernels::expert_weights>> layers_; // [layer - first_layer][local expert]
};

} // namespace troupe::model
