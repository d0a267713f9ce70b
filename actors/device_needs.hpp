#pragma once

#include "troupe/base/error.hpp"
#include "troupe/model/model_config.hpp"
#include "troupe/model/stage_model.hpp"
#include "troupe/placement/device_budget.hpp"
#include "cluster.pb.h"

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace troupe::actors {

/// How a worker keeps the head.
model::head_format head_of(const proto::ClusterPlan& plan);

/// How its devices compute.
kernels::numerics numerics_of(const proto::ClusterPlan& plan);

/// What a worker loads a stage with.
model::stage_options stage_options_of(const proto::ActorPlan& stage, const proto::ClusterPlan& plan,
                                      const model::model_config& model);

/// What these actors need of the GPU that they are on, or of each of those that compute them
/// together; contexts are not counted.
placement::device_need
device_need_of(const google::protobuf::RepeatedPtrField<proto::ActorPlan>& actors,
               const proto::ClusterPlan& plan, const model::model_config& model);

/// Writes into the actors of a plan what each takes of a GPU (ActorPlan.device_bytes), wherever it
/// goes later.
void note_device_bytes(proto::ClusterPlan& plan, const model::model_config& model);

/// A GPU of a node, and what all processes of the plan that use it need of it.
struct planned_device {
  std::string node;
  std::string device; ///< "cuda:0"
  placement::device_need need;
};

/// All GPUs of a plan on which something is to run, in the order of the plan.
std::vector<planned_device> device_needs(const proto::ClusterPlan& plan,
                                         const model::model_config& model);

/// Whether all of them have room. `memory_of` says how much memory a GPU has; nothing: not known
/// here, and its worker will see. Fails with invalid_config for the first that is too small.
expected<void>
check_devices(const proto::ClusterPlan& plan, const model::model_config& model,
              const std::function<std::optional<std::uint64_t>(const planned_device&)>& memory_of);

} // namespace troupe::actors
