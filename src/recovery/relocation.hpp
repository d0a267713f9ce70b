#pragma once

#include "cluster.pb.h"

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace troupe::recovery {

/// One actor that goes to another worker. `from` is empty for one that ran nowhere.
struct move {
  std::string actor;
  std::string from;
  std::string to;
};

/// Where the actors of lost workers go.
struct relocation {
  std::vector<move> moves;
  std::vector<std::string>
    dropped;           ///< copies of expert groups that find no place; another one runs
  std::string problem; ///< why stages or last copies find no place; empty: all do
};

/// Finds new places for the actors of the workers in `lost`. Pure and deterministic.
///
/// - An actor goes to a spare device (no actors, its node is there) where one has the memory; else
///   it is packed onto the usable worker with the fewest actors.
/// - Copies of an expert group never share a worker. A copy whose group still has another one goes
///   to a spare device or nowhere: packing it would slow down others for redundancy alone.
/// - What does not fit into a node's memory (weights and KV of all its actors in nine tenths of
///   it; unknown memory always fits) does not go there. The same holds for each GPU and what its
///   actors take of it (ActorPlan.device_bytes); the last tenth is for contexts and standbys.
/// - All or nothing: with a problem, there are no moves.
relocation relocate(const proto::ClusterView& view, const std::set<std::string>& lost);

/// Finds the moves home: actors that are packed onto a worker, or copies that run nowhere,
/// while the worker that `plan` gave them to is a spare again.
std::vector<move> moves_home(const proto::ClusterView& view, const proto::ClusterPlan& plan);

/// What is known of a node's memory before it runs.
struct node_memory {
  std::uint64_t host_bytes = 0;                   ///< 0: unknown
  std::map<std::string, std::uint64_t> gpu_bytes; ///< by device; those that are known
};

/// What the loss of each node of a plan would mean, a line each: "if node-1 is lost:
/// replica-0/stage-1 moves to node-0/worker-2".
std::vector<std::string> foresee_losses(const proto::ClusterPlan& plan,
                                        const std::map<std::string, node_memory>& memory);

/// True when both run the same actors, in the same order.
bool same_actors(const proto::WorkerPlan& a, const proto::WorkerPlan& b);

/// True when nothing is lost of what replicas need with this worker away: it has only copies of
/// expert groups that run elsewhere too.
bool is_covered(const proto::ClusterView& view, const proto::WorkerView& worker);

} // namespace troupe::recovery
