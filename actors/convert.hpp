#pragma once

#include "troupe/base/error.hpp"
#include "cluster.pb.h"

#include <cstdint>
#include <string>

namespace troupe::actors {

/// Errors as they travel and as they are used.
proto::Error to_proto(const error& e);
error from_proto(const proto::Error& e);

/// The worker that runs a stage, or null.
const proto::WorkerView* find_stage(const proto::ClusterView& view, std::uint32_t replica,
                                    std::uint32_t index);

/// That actor of a worker, or null.
const proto::ActorPlan* find_stage(const proto::WorkerView& worker, std::uint32_t replica,
                                   std::uint32_t index);

/// The generation of an actor's KV memory, or 0 where a worker's view does not say.
std::uint64_t kv_generation(const proto::WorkerView& worker, const std::string& actor);

/// The worker that runs a copy of an expert group, or null.
const proto::WorkerView* find_expert_group(const proto::ClusterView& view, std::uint32_t index,
                                           std::uint32_t copy);

} // namespace troupe::actors
