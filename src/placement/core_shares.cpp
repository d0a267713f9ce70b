#include "troupe/placement/core_shares.hpp"

#include <algorithm>
#include <map>
#include <set>
#include <string>

namespace troupe::placement {

core_shares share_cores(const config::cluster_config& cluster, const plan& placed,
                        std::uint32_t cores) {
  std::map<std::string, std::string> host_of; // of a node
  for (const auto& node : cluster.nodes)
    host_of[node.name] = node.host;
  std::map<std::string, std::set<std::uint32_t>> replicas;          // with stages on a host
  std::map<std::string, std::uint32_t> groups;                      // on a host
  std::map<std::uint32_t, std::set<std::string>> places_of_replica; // that compute its stages
  for (const auto& worker : placed.workers) {
    const auto& host = host_of[worker.node];
    bool is_cpu = worker.device.starts_with("cpu");
    bool has_group = false;
    for (const auto& actor : worker.actors) {
      if (actor.kind == actor_kind::stage) {
        replicas[host].insert(actor.replica);
        places_of_replica[actor.replica].insert(is_cpu ? host : worker.name);
      } else {
        has_group = true;
      }
    }
    groups[host] += has_group ? 1 : 0;
  }
  std::uint32_t most_replicas = 1, most_groups = 1, places = 1;
  for (const auto& [host, here] : replicas)
    most_replicas = std::max(most_replicas, static_cast<std::uint32_t>(here.size()));
  for (const auto& [host, count] : groups)
    most_groups = std::max(most_groups, count);
  for (const auto& [replica, where] : places_of_replica)
    places = std::max(places, static_cast<std::uint32_t>(where.size()));
  const auto wanted = cluster.serving.threads;
  core_shares result;
  result.stage_threads = wanted != 0 ? wanted : std::max(1U, cores / most_replicas);
  const auto part = std::max(1U, cores / most_groups);
  result.expert_threads = wanted != 0 ? wanted : std::min(2 * part, std::max(1U, cores));
  result.decode_micro_batches = places;
  return result;
}

} // namespace troupe::placement
