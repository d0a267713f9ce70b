#pragma once

#include "troupe/config/cluster_config.hpp"
#include "troupe/placement/plan.hpp"

#include <cstdint>

namespace troupe::placement {

/// How many threads workers compute with, all at least 1.
struct core_shares {
  std::uint32_t stage_threads = 1;        ///< of a worker with a stage
  std::uint32_t expert_threads = 1;       ///< of a worker with an expert group
  std::uint32_t decode_micro_batches = 1; ///< of a replica in flight at once
};

/// Workers of kind cpu share the `cores` of their host. Stages of a replica there take turns with
/// all of them rather than compute side by side with a part of them each: their rows then stay
/// together, and weights are read once for all of them. Replicas, and expert groups, do compute at
/// the same time. Groups rarely have the same work, so each has threads for twice its part: who has
/// more goes on with the cores of who has done. A replica has as many micro-batches of decodes in
/// flight as hosts with its stages, a GPU counting as one. serving.threads, where it is given, is
/// the share of every worker.
core_shares share_cores(const config::cluster_config& cluster, const plan& placed,
                        std::uint32_t cores);

} // namespace troupe::placement
