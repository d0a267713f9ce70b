#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "troupe/config/cluster_config.hpp"

namespace troupe::placement {

enum class actor_kind : std::uint8_t { stage, expert_group };

/// One actor of a worker. The fields that do not concern its kind are 0.
struct actor {
  actor_kind kind = actor_kind::stage;
  std::string id;                ///< "replica-0/stage-1", "expert-group-0/copy-0"
  std::uint32_t replica = 0;     ///< stages only
  std::uint32_t index = 0;       ///< of the stage in its replica, or of the expert group
  std::uint32_t copy = 0;        ///< expert groups only
  std::uint32_t first_layer = 0; ///< stages: [first_layer, end_layer)
  std::uint32_t end_layer = 0;
  std::uint32_t first_expert = 0; ///< expert groups: [first_expert, end_expert) of every MoE layer
  std::uint32_t end_expert = 0;

  friend bool operator==(const actor&, const actor&) = default;
};

/// One process, on one device or on several that compute its stages together.
struct worker {
  std::string name; ///< "node-0/worker-1"; the number is that of its first device in its node
  std::string node;
  std::string device;        ///< "cpu:1", "cuda:0,cuda:1"
  std::vector<actor> actors; ///< at least one; stages first

  friend bool operator==(const worker&, const worker&) = default;
};

/// What runs where. Expert groups are shared by all replicas.
struct plan {
  std::string cluster;
  std::uint32_t num_replicas = 0;
  std::uint32_t num_stages = 0; ///< of each replica
  std::uint32_t num_layers = 0;
  std::uint32_t num_expert_groups = 0; ///< 0: the experts live inside the stages
  std::uint32_t num_expert_copies = 0; ///< of each group; 0 without groups
  std::uint32_t num_experts = 0;
  std::vector<worker> workers;    ///< in the order of nodes and their devices
  std::vector<std::string> notes; ///< what a reader should know: idle or shared devices, risks

  friend bool operator==(const plan&, const plan&) = default;
};

/// The name of the worker on a device: "node-0/worker-1".
std::string worker_name(const std::string& node, std::size_t device);

/// The workers that a cluster's devices have room for, without actors. With parallel.tensor N each
/// has N neighbouring devices of its node; what is left of a node has none.
std::vector<worker> possible_workers(const config::cluster_config& cluster);

/// The devices of a worker, by name: "cuda:0,cuda:1" taken apart.
std::vector<std::string> devices_of(const std::string& device);

/// The plan as a tree for a terminal, ending with a newline.
std::string describe(const plan& what);

} // namespace troupe::placement
