#include "troupe/placement/place.hpp"

#include <algorithm>
#include <span>
#include <string_view>
#include <tuple>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "troupe/placement/partition.hpp"
#include "troupe/placement/seating.hpp"

namespace troupe::placement {

namespace {

/// Bounds the time that cutting layers takes; the largest models have a few hundred.
constexpr std::uint32_t max_layers = 4096;

std::string divisors_of(std::uint32_t number) {
  std::vector<std::uint32_t> divisors;
  for (std::uint32_t d = 1; d <= number; ++d)
    if (number % d == 0)
      divisors.push_back(d);
  return fmt::format("{}", fmt::join(divisors, ", "));
}

std::uint32_t num_moe_layers(const model_shape& model) {
  std::uint32_t count = 0;
  for (std::uint32_t layer = 0; layer < model.num_layers; ++layer)
    count += model.is_moe(layer) ? 1 : 0;
  return count;
}

/// Everything in the config that cannot be, one line each.
std::vector<std::string> contradictions(const config::cluster_config& cluster,
                                        const model_shape& model) {
  std::vector<std::string> found;
  const auto refuse = [&](std::string_view key, const std::string& what) {
    const std::string where = cluster.where(key);
    found.push_back(fmt::format("{}{}{}: {}", where, where.empty() ? "" : ": ", key, what));
  };
  const config::parallel_settings& parallel = cluster.parallel;
  const std::uint32_t groups = parallel.expert_groups;

  if (std::ranges::all_of(cluster.nodes, [](const auto& node) { return node.devices.empty(); }))
    refuse("nodes", "no node has a device; list at least one, such as devices: [cpu]");
  std::size_t devices = 0;
  std::size_t places = 0; // for workers
  for (const auto& node : cluster.nodes) {
    devices += node.devices.size();
    places += node.devices.size() / std::max(1U, parallel.tensor);
  }
  if (devices > 0 && places == 0)
    refuse("parallel.tensor",
           fmt::format("no node has {} devices for a stage; write at most the devices of a node",
                       parallel.tensor));
  if (places > 0 && cluster.recovery.spares >= places)
    refuse("recovery.spares",
           fmt::format(
             "{} spare {} of {} leave none to run on; write at most {}", cluster.recovery.spares,
             parallel.tensor > 1 ? fmt::format("groups of {} devices", parallel.tensor) : "devices",
             places, places - 1));
  if (parallel.tensor > 1 && groups > 0)
    refuse("parallel.expert_groups",
           fmt::format("{} expert groups cannot serve stages on {} devices each "
                       "(parallel.tensor); write 0, which divides the experts among the devices",
                       groups, parallel.tensor));
  if (parallel.tensor == 0)
    refuse("parallel.tensor", "0 devices compute nothing; write at least 1");
  if (parallel.data == 0)
    refuse("parallel.data", "0 replicas serve nobody; write at least 1");
  if (parallel.pipeline == 0)
    refuse("parallel.pipeline", "0 stages have no room for the layers; write at least 1");
  if (parallel.pipeline > model.num_layers)
    refuse(
      "parallel.pipeline",
      fmt::format("{} stages are more than the model has layers, which is {}; write at most {}",
                  parallel.pipeline, model.num_layers, model.num_layers));

  if (groups == 0) {
    if (parallel.expert_replicas > 1)
      refuse("parallel.expert_replicas",
             fmt::format("{} copies of no expert group (parallel.expert_groups is 0); write 1, or "
                         "give parallel.expert_groups",
                         parallel.expert_replicas));
    return found;
  }
  if (parallel.expert_replicas == 0)
    refuse("parallel.expert_replicas", "0 copies leave no experts; write at least 1");
  if (num_moe_layers(model) == 0)
    refuse("parallel.expert_groups",
           fmt::format("{} expert groups, but the model has no experts; write 0", groups));
  else if (groups > model.num_experts)
    refuse("parallel.expert_groups",
           fmt::format("{} expert groups are more than the model has experts, which is {}; write 0 "
                       "or one of {}",
                       groups, model.num_experts, divisors_of(model.num_experts)));
  else if (model.num_experts % groups != 0)
    refuse("parallel.expert_groups",
           fmt::format("{} does not divide the model's {} experts; write 0 or one of {}", groups,
                       model.num_experts, divisors_of(model.num_experts)));
  return found;
}

std::vector<std::uint32_t> cut_layers(const config::cluster_config& cluster,
                                      const model_shape& model) {
  const bool experts_inside = cluster.parallel.expert_groups == 0;
  const std::uint64_t moe_cost =
    model.moe_layer_cost + (experts_inside ? model.routed_experts_cost : 0);
  std::vector<std::uint64_t> costs;
  for (std::uint32_t layer = 0; layer < model.num_layers; ++layer)
    costs.push_back(
      std::max<std::uint64_t>(1, model.is_moe(layer) ? moe_cost : model.dense_layer_cost));
  return partition(costs, cluster.parallel.pipeline, model.head_cost);
}

/// Takes devices off the end of the list, a node at a time in turn, so that the spares of several
/// are not lost with one node.
void leave_spares(std::vector<std::uint32_t>& num_devices, std::uint32_t spares) {
  while (spares > 0) {
    bool any = false;
    for (auto node = num_devices.rbegin(); node != num_devices.rend() && spares > 0; ++node) {
      if (*node == 0)
        continue;
      --*node;
      --spares;
      any = true;
    }
    if (!any)
      return;
  }
}

/// Hands the actors to the workers that `seats` puts them on.
class assembly {
public:
  explicit assembly(const config::cluster_config& cluster) {
    auto possible = possible_workers(cluster);
    auto next = possible.begin();
    for (const config::node& node : cluster.nodes) {
      auto& workers = workers_.emplace_back();
      for (; next != possible.end() && next->node == node.name; ++next)
        workers.push_back(std::move(*next));
    }
  }

  void add(seat at, actor made) { workers_[at.node][at.device].actors.push_back(std::move(made)); }

  /// The workers that have something to do, and the names of the idle devices.
  std::pair<std::vector<worker>, std::vector<std::string>> finish() && {
    std::pair<std::vector<worker>, std::vector<std::string>> result;
    for (auto& node : workers_)
      for (worker& made : node)
        if (made.actors.empty())
          result.second.push_back(fmt::format("{} {}", made.node, made.device));
        else
          result.first.push_back(std::move(made));
    return result;
  }

private:
  std::vector<std::vector<worker>> workers_; // [node][device]
};

/// The first few of `names`, so that a note about a thousand devices stays one line.
std::string some_of(std::span<const std::string> names) {
  constexpr std::size_t shown = 8;
  const std::string text =
    fmt::format("{}", fmt::join(names.first(std::min(shown, names.size())), ", "));
  return names.size() > shown ? fmt::format("{} and {} more", text, names.size() - shown) : text;
}

void note_devices(plan& made, std::span<const std::string> idle) {
  std::size_t num_actors = 0;
  std::size_t most = 0;
  for (const worker& w : made.workers) {
    num_actors += w.actors.size();
    most = std::max(most, w.actors.size());
  }
  if (!idle.empty())
    made.notes.push_back(fmt::format("{} devices for {} actors; without a worker: {}",
                                     idle.size() + made.workers.size(), num_actors, some_of(idle)));
  if (most > 1)
    made.notes.push_back(fmt::format("{} actors share {} device{}, at most {} on one", num_actors,
                                     made.workers.size(), made.workers.size() == 1 ? "" : "s",
                                     most));
}

void note_spread(plan& made, const seating& seats, const config::cluster_config& cluster) {
  for (std::size_t r = 0; r < seats.stages.size(); ++r) {
    std::vector<std::string> nodes;
    for (const seat& s : seats.stages[r])
      if (std::ranges::find(nodes, cluster.nodes[s.node].name) == nodes.end())
        nodes.push_back(cluster.nodes[s.node].name);
    if (nodes.size() > 1)
      made.notes.push_back(
        fmt::format("no node had room for all of replica-{}: it spans {}", r, some_of(nodes)));
  }
  std::vector<std::string> on_one_device;
  std::vector<std::string> on_one_node;
  const auto num_used =
    std::ranges::count_if(cluster.nodes, [](const auto& node) { return !node.devices.empty(); });
  for (std::size_t g = 0; g < seats.experts.size(); ++g) {
    const std::vector<seat>& copies = seats.experts[g];
    const auto same_node = [&](const seat& s) { return s.node == copies.front().node; };
    bool shares = false;
    for (auto copy = copies.begin(); copy != copies.end(); ++copy)
      shares = shares || std::find(copies.begin(), copy, *copy) != copy;
    if (shares)
      on_one_device.push_back(fmt::format("expert-group-{}", g));
    else if (copies.size() > 1 && num_used > 1 && std::ranges::all_of(copies, same_node))
      on_one_node.push_back(fmt::format("expert-group-{}", g));
  }
  if (!on_one_device.empty())
    made.notes.push_back(fmt::format("copies on the same device, which do not cover for each "
                                     "other: {}",
                                     some_of(on_one_device)));
  if (!on_one_node.empty())
    made.notes.push_back(fmt::format("all copies on one node, whose loss they do not survive: {}",
                                     some_of(on_one_node)));
}

void note_router(plan& made, const model_shape& model) {
  const std::uint32_t groups = made.num_expert_groups;
  const std::uint32_t router = model.num_expert_groups_in_router;
  if (groups > 1 && router > 1 && groups % router != 0 && router % groups != 0)
    made.notes.push_back(fmt::format("the router picks among {} groups of experts, which {} expert "
                                     "groups cut across: tokens visit more of them than needed",
                                     router, groups));
}

} // namespace

std::string worker_name(const std::string& node, std::size_t device) {
  return fmt::format("{}/worker-{}", node, device);
}

std::vector<worker> possible_workers(const config::cluster_config& cluster) {
  const std::size_t ranks = cluster.parallel.tensor;
  std::vector<worker> result;
  for (const config::node& node : cluster.nodes)
    for (std::size_t first = 0; first + ranks <= node.devices.size(); first += ranks) {
      std::vector<std::string> devices;
      for (std::size_t i = first; i < first + ranks; ++i)
        devices.push_back(node.devices[i].name());
      result.push_back(
        {worker_name(node.name, first), node.name, fmt::format("{}", fmt::join(devices, ",")), {}});
    }
  return result;
}

std::vector<std::string> devices_of(const std::string& device) {
  std::vector<std::string> result;
  for (std::size_t at = 0; at < device.size();) {
    const auto end = std::min(device.find(',', at), device.size());
    result.push_back(device.substr(at, end - at));
    at = end + 1;
  }
  return result;
}

expected<plan> place(const config::cluster_config& cluster, const model_shape& model) {
  if (model.num_layers == 0 || model.num_layers > max_layers)
    return fail(error_code::invalid_model, fmt::format("the model has {} layers", model.num_layers),
                fmt::format("Between 1 and {} can be placed", max_layers));
  if (const auto found = contradictions(cluster, model); !found.empty())
    return fail(error_code::invalid_config, fmt::format("{}", fmt::join(found, "\n")));

  const config::parallel_settings& parallel = cluster.parallel;
  plan made;
  made.cluster = cluster.cluster;
  made.num_replicas = parallel.data;
  made.num_stages = parallel.pipeline;
  made.num_layers = model.num_layers;
  made.num_expert_groups = parallel.expert_groups;
  made.num_expert_copies = parallel.expert_groups == 0 ? 0 : parallel.expert_replicas;
  made.num_experts = model.num_experts;

  std::vector<std::uint32_t> num_devices;
  for (const config::node& node : cluster.nodes)
    num_devices.push_back(static_cast<std::uint32_t>(node.devices.size()) / parallel.tensor);
  leave_spares(num_devices, cluster.recovery.spares);
  const seating seats = seat_actors(num_devices, made.num_replicas, made.num_stages,
                                    made.num_expert_groups, made.num_expert_copies);

  assembly workers(cluster);
  const std::vector<std::uint32_t> layers = cut_layers(cluster, model);
  for (std::uint32_t r = 0; r < made.num_replicas; ++r)
    for (std::uint32_t s = 0; s < made.num_stages; ++s)
      workers.add(seats.stages[r][s], {.kind = actor_kind::stage,
                                       .id = fmt::format("replica-{}/stage-{}", r, s),
                                       .replica = r,
                                       .index = s,
                                       .first_layer = layers[s],
                                       .end_layer = layers[s + 1]});
  for (std::uint32_t g = 0; g < made.num_expert_groups; ++g)
    for (std::uint32_t c = 0; c < made.num_expert_copies; ++c) {
      const std::uint32_t per_group = model.num_experts / made.num_expert_groups;
      workers.add(seats.experts[g][c], {.kind = actor_kind::expert_group,
                                        .id = fmt::format("expert-group-{}/copy-{}", g, c),
                                        .index = g,
                                        .copy = c,
                                        .first_expert = g * per_group,
                                        .end_expert = (g + 1) * per_group});
    }
  std::vector<std::string> idle;
  std::tie(made.workers, idle) = std::move(workers).finish();
  note_devices(made, idle);
  note_spread(made, seats, cluster);
  note_router(made, model);
  return made;
}

} // namespace troupe::placement
