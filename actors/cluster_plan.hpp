#pragma once

#include "troupe/base/error.hpp"
#include "troupe/config/cluster_config.hpp"
#include "troupe/model/model_config.hpp"
#include "troupe/placement/place.hpp"
#include "cluster.pb.h"

#include <cstdint>
#include <map>
#include <string>

namespace troupe::actors {

/// What placement needs to know of a model.
placement::model_shape shape_of(const model::model_config& model);

/// The plan that every process works by: placement plus sizes and limits. Errors are placement's.
expected<proto::ClusterPlan> make_cluster_plan(const config::cluster_config& cluster,
                                               const model::model_config& model);

/// The memory of those GPUs of a plan that are this host's, by node and device ("cuda:0"), as far
/// as the driver tells.
std::map<std::string, std::map<std::string, std::uint64_t>>
local_gpu_bytes(const config::cluster_config& cluster, const proto::ClusterPlan& plan);

/// Everything that can be known to fail before a process is started: the model's files are there,
/// whole and of the right shapes, the tokenizer and the chat template can be read, the layout is
/// possible. Reads headers and small tensors only. Returns the plan.
expected<proto::ClusterPlan> check_before_launch(const config::cluster_config& cluster);

} // namespace troupe::actors
