#pragma once

#include <cstdint>

#include "troupe/base/error.hpp"
#include "troupe/config/cluster_config.hpp"
#include "troupe/placement/plan.hpp"

namespace troupe::placement {

/// What placement has to know of a model. Costs are parameters (any unit will do, as
/// long as it is the same); their defaults are those of DeepSeek-R1, in thousands.
struct model_shape {
  std::uint32_t num_layers = 0;          ///< without the layers that only predict further tokens
  std::uint32_t first_dense_layers = 0;  ///< layers before the first MoE layer
  std::uint32_t moe_layer_frequency = 1; ///< past those, layer l is MoE when l is a multiple of it
  std::uint32_t num_experts = 0;         ///< routed experts of a MoE layer; 0: every layer is dense
  std::uint32_t num_expert_groups_in_router = 1; ///< groups the router picks from first
  std::uint64_t dense_layer_cost = 583'500;
  std::uint64_t moe_layer_cost = 233'000;         ///< attention, router and shared experts
  std::uint64_t routed_experts_cost = 11'274'000; ///< all routed experts of one layer
  std::uint64_t head_cost = 926'700;              ///< carried by the last stage

  /// Whether `layer` has routed experts.
  bool is_moe(std::uint32_t layer) const {
    return num_experts > 0 && layer >= first_dense_layers
           && layer % (moe_layer_frequency == 0 ? 1 : moe_layer_frequency) == 0;
  }
};

/// Decides which layers, experts and devices every actor gets. Pure and deterministic.
///
/// - Layers are cut into contiguous runs so that the costliest stage is as cheap as it
///   can be; among those cuts the most even one wins. Experts are cut into equal runs.
/// - With at least as many devices as actors, every actor has a device to itself; idle
///   devices get no worker, and a note says so. With fewer, no device carries more than
///   one actor more than another.
/// - Within these bounds: the stages of a replica stay on one node where one has room for
///   all of them, replicas are spread over nodes, and copies of an expert group go to
///   different devices, and to different nodes.
///
/// Fails with invalid_config, listing every contradiction as "WHERE: KEY: what is wrong
/// with VALUE; what would be right", and with invalid_model for a model without layers.
expected<plan> place(const config::cluster_config& cluster, const model_shape& model);

} // namespace troupe::placement
