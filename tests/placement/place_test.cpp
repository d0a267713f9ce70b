#include <catch2/catch.hpp>

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "troupe/placement/place.hpp"

namespace config = troupe::config;
namespace placement = troupe::placement;

namespace {

/// The demo model; costs in thousands of parameters.
const placement::model_shape mini = {.num_layers = 6,
                                     .first_dense_layers = 1,
                                     .num_experts = 16,
                                     .num_expert_groups_in_router = 4,
                                     .dense_layer_cost = 573,
                                     .moe_layer_cost = 282,
                                     .routed_experts_cost = 1573,
                                     .head_cost = 262};

config::cluster_config cluster_of(const std::vector<std::size_t>& devices) {
  config::cluster_config cluster;
  cluster.nodes.clear();
  for (std::size_t n = 0; n < devices.size(); ++n) {
    config::node node{.name = "n" + std::to_string(n)};
    node.devices.clear();
    for (std::size_t d = 0; d < devices[n]; ++d)
      node.devices.push_back({config::device_kind::cpu, static_cast<std::uint32_t>(d)});
    cluster.nodes.push_back(node);
  }
  return cluster;
}

/// "n0/worker-1: replica-0/stage-0 [0,3) expert-group-0/copy-0 [0,8)"
std::vector<std::string> lines_of(const placement::plan& plan) {
  std::vector<std::string> lines;
  for (const auto& worker : plan.workers) {
    std::string line = worker.name + ":";
    for (const auto& actor : worker.actors) {
      const bool stage = actor.kind == placement::actor_kind::stage;
      line += " " + actor.id + " [" + std::to_string(stage ? actor.first_layer : actor.first_expert)
              + "," + std::to_string(stage ? actor.end_layer : actor.end_expert) + ")";
    }
    lines.push_back(line);
  }
  return lines;
}

placement::plan place_file(const std::string& name) {
  const auto cluster = config::load(TROUPE_SOURCE_DIR "/configs/" + name + ".yaml");
  REQUIRE(cluster);
  const auto plan = placement::place(*cluster, mini);
  REQUIRE(plan);
  CHECK(plan->cluster == name);
  return *plan;
}

std::string refusal(const std::string& parallel, const placement::model_shape& model) {
  const std::string text = "model: {path: models/troupe-mini}\nparallel: {" + parallel + "}\n";
  const std::string file = TROUPE_SOURCE_DIR "/configs/c.yaml";
  const auto cluster = config::parse(text, file);
  REQUIRE(cluster);
  const auto plan = placement::place(*cluster, model);
  REQUIRE(!plan);
  CHECK(plan.error().code == troupe::error_code::invalid_config);
  std::string cause = plan.error().cause;
  for (auto at = cause.find(file); at != std::string::npos; at = cause.find(file))
    cause.replace(at, file.size(), "c.yaml");
  return cause;
}

} // namespace

TEST_CASE("the shipped cluster files place the demo model") {
  CHECK(lines_of(place_file("local"))
        == std::vector<std::string>{"node-0/worker-0: replica-0/stage-0 [0,3)",
                                    "node-0/worker-1: replica-0/stage-1 [3,6)",
                                    "node-0/worker-2: expert-group-0/copy-0 [0,8)",
                                    "node-0/worker-3: expert-group-1/copy-0 [8,16)"});
  CHECK(lines_of(place_file("single"))
        == std::vector<std::string>{"node-0/worker-0: replica-0/stage-0 [0,6)"});
  const placement::plan two = place_file("two-nodes");
  CHECK(lines_of(two)
        == std::vector<std::string>{
          "node-0/worker-0: replica-0/stage-0 [0,3)", "node-0/worker-1: replica-0/stage-1 [3,6)",
          "node-1/worker-0: replica-1/stage-0 [0,3)", "node-1/worker-1: replica-1/stage-1 [3,6)"});
  CHECK(two.notes.empty());
  CHECK(two.workers[3].node == "node-1");
  CHECK(two.workers[3].device == "cpu:1");
}

TEST_CASE("the plan reads as a tree") {
  auto cluster = cluster_of({2, 2});
  cluster.cluster = "demo";
  cluster.parallel.pipeline = 2;
  cluster.parallel.expert_groups = 4;
  cluster.nodes[1].devices.pop_back();
  const auto plan = placement::place(cluster, {.num_layers = 3, .num_experts = 16});
  REQUIRE(plan);
  CHECK(placement::describe(*plan)
        == "cluster demo: 1 replica of 2 stages, 4 expert groups in 1 copy, on 3 workers\n"
           "n0\n"
           "├─ n0/worker-0  cpu:0\n"
           "│  ├─ replica-0/stage-0      layers 0-1\n"
           "│  └─ expert-group-0/copy-0  experts 0-3\n"
           "└─ n0/worker-1  cpu:1\n"
           "   ├─ replica-0/stage-1      layer 2\n"
           "   └─ expert-group-2/copy-0  experts 8-11\n"
           "n1\n"
           "└─ n1/worker-0  cpu:0\n"
           "   ├─ expert-group-1/copy-0  experts 4-7\n"
           "   └─ expert-group-3/copy-0  experts 12-15\n"
           "note: 6 actors share 3 devices, at most 2 on one\n");
}

TEST_CASE("layouts that contradict the model are refused where they are written") {
  const placement::model_shape dense = {.num_layers = 6};
  const placement::model_shape all_dense = {
    .num_layers = 6, .first_dense_layers = 6, .num_experts = 8};
  CHECK(
    refusal("pipeline: 7", mini)
    == "c.yaml:2:22: parallel.pipeline: 7 stages are more than the model has layers, which is 6; "
       "write at most 6");
  CHECK(
    refusal("expert_groups: 3", mini)
    == "c.yaml:2:27: parallel.expert_groups: 3 does not divide the model's 16 experts; write 0 or "
       "one of 1, 2, 4, 8, 16");
  CHECK(
    refusal("expert_groups: 32", mini)
    == "c.yaml:2:27: parallel.expert_groups: 32 expert groups are more than the model has experts, "
       "which is 16; write 0 or one of 1, 2, 4, 8, 16");
  const std::string no_experts =
    "c.yaml:2:27: parallel.expert_groups: 2 expert groups, but the model has no experts; write 0";
  CHECK(refusal("expert_groups: 2", dense) == no_experts);
  CHECK(refusal("expert_groups: 2", all_dense) == no_experts);
  CHECK(
    refusal("expert_replicas: 2", mini)
    == "c.yaml:2:29: parallel.expert_replicas: 2 copies of no expert group (parallel.expert_groups "
       "is 0); write 1, or give parallel.expert_groups");
  CHECK(
    refusal("pipeline: 9, expert_groups: 5", mini)
    == "c.yaml:2:22: parallel.pipeline: 9 stages are more than the model has layers, which is 6; "
       "write at most 6\n"
       "c.yaml:2:40: parallel.expert_groups: 5 does not divide the model's 16 experts; write 0 or "
       "one of 1, 2, 4, 8, 16");
}

TEST_CASE("configs that no file can hold are refused too") {
  const auto cause_of = [](const config::cluster_config& cluster) {
    const auto plan = placement::place(cluster, mini);
    REQUIRE(!plan);
    CHECK(plan.error().code == troupe::error_code::invalid_config);
    return plan.error().cause;
  };
  CHECK(cause_of(cluster_of({}))
        == "nodes: no node has a device; list at least one, such as devices: [cpu]");
  CHECK(cause_of(cluster_of({0, 0}))
        == "nodes: no node has a device; list at least one, such as devices: [cpu]");
  auto cluster = cluster_of({1});
  cluster.parallel.data = 0;
  CHECK(cause_of(cluster) == "parallel.data: 0 replicas serve nobody; write at least 1");
  cluster.parallel = {.pipeline = 0};
  CHECK(cause_of(cluster)
        == "parallel.pipeline: 0 stages have no room for the layers; write at least 1");
  cluster.parallel = {.expert_groups = 2, .expert_replicas = 0};
  CHECK(cause_of(cluster)
        == "parallel.expert_replicas: 0 copies leave no experts; write at least 1");

  const auto no_layers = placement::place(cluster_of({1}), {});
  REQUIRE(!no_layers);
  CHECK(no_layers.error().code == troupe::error_code::invalid_model);
}

TEST_CASE("stages on several devices have neighbours of one node") {
  auto cluster = cluster_of({5, 1, 4});
  cluster.parallel.tensor = 2;
  cluster.parallel.pipeline = 3;
  const auto plan = placement::place(cluster, mini);
  REQUIRE(plan);
  std::vector<std::string> where;
  for (const auto& worker : plan->workers)
    where.push_back(worker.name + " " + worker.device);
  CHECK(where
        == std::vector<std::string>{"n0/worker-0 cpu:0,cpu:1", "n0/worker-2 cpu:2,cpu:3",
                                    "n2/worker-0 cpu:0,cpu:1"});
  std::vector<std::string> possible;
  for (const auto& worker : placement::possible_workers(cluster))
    possible.push_back(worker.name);
  CHECK(possible
        == std::vector<std::string>{"n0/worker-0", "n0/worker-2", "n2/worker-0", "n2/worker-2"});
  CHECK(placement::devices_of("cuda:0,cuda:10") == std::vector<std::string>{"cuda:0", "cuda:10"});
  CHECK(placement::devices_of("cpu:1") == std::vector<std::string>{"cpu:1"});
  CHECK(placement::devices_of("").empty());

  const auto refused = [&] { return placement::place(cluster, mini).error().cause; };
  cluster.parallel.tensor = 8;
  CHECK(refused().find("no node has 8 devices for a stage") != std::string::npos);
  cluster.parallel.tensor = 2;
  cluster.recovery.spares = 4;
  CHECK(refused().find("4 spare groups of 2 devices of 4 leave none") != std::string::npos);
  cluster.recovery.spares = 0;
  cluster.parallel.expert_groups = 2;
  CHECK(refused().find("2 expert groups cannot serve stages on 2 devices") != std::string::npos);
}

TEST_CASE("stages are balanced by what they hold") {
  // DeepSeek-R1: experts inside, the three dense layers weigh next to nothing.
  const placement::model_shape r1 = {.num_layers = 61, .first_dense_layers = 3, .num_experts = 256};
  auto cluster = cluster_of({8});
  cluster.parallel.pipeline = 2;
  auto plan = placement::place(cluster, r1);
  REQUIRE(plan);
  CHECK(plan->workers[0].actors[0].end_layer == 32);
  CHECK(plan->workers[1].actors[0].end_layer == 61);
  // Experts elsewhere: dense layers and the head are the heavy ones.
  cluster.parallel.expert_groups = 4;
  plan = placement::place(cluster, r1);
  REQUIRE(plan);
  CHECK(plan->workers[0].actors[0].end_layer == 30);
}

TEST_CASE("notes tell what a reader would not guess") {
  auto cluster = cluster_of({2, 2});
  cluster.parallel = {.pipeline = 3};
  auto plan = placement::place(cluster, mini);
  REQUIRE(plan);
  CHECK(plan->notes
        == std::vector<std::string>{"4 devices for 3 actors; without a worker: n1 cpu:1",
                                    "no node had room for all of replica-0: it spans n0, n1"});

  cluster = cluster_of({1});
  cluster.parallel = {.expert_groups = 2, .expert_replicas = 2};
  plan = placement::place(cluster, mini);
  REQUIRE(plan);
  CHECK(plan->notes
        == std::vector<std::string>{"5 actors share 1 device, at most 5 on one",
                                    "copies on the same device, which do not cover for each other: "
                                    "expert-group-0, expert-group-1"});

  cluster = cluster_of({4, 2});
  cluster.parallel = {.pipeline = 4, .expert_groups = 1, .expert_replicas = 2};
  plan = placement::place(cluster, mini);
  REQUIRE(plan);
  CHECK(plan->notes
        == std::vector<std::string>{
          "all copies on one node, whose loss they do not survive: expert-group-0"});

  cluster = cluster_of({4});
  cluster.parallel = {.expert_groups = 3};
  plan = placement::place(cluster,
                          {.num_layers = 2, .num_experts = 12, .num_expert_groups_in_router = 4});
  REQUIRE(plan);
  CHECK(plan->notes
        == std::vector<std::string>{"the router picks among 4 groups of experts, which 3 expert "
                                    "groups cut across: tokens visit more "
                                    "of them than needed"});
}

TEST_CASE("replicas stay together and spread out, copies keep apart") {
  // Per node: a replica of two stages and two of the six experts' copies.
  auto cluster = cluster_of({4, 4, 4});
  cluster.parallel = {.data = 3, .pipeline = 2, .expert_groups = 2, .expert_replicas = 3};
  const auto plan = placement::place(cluster, mini);
  REQUIRE(plan);
  CHECK(plan->workers.size() == 12);
  CHECK(plan->notes.empty());
  std::map<std::uint32_t, std::set<std::string>> nodes_of_replica;
  std::map<std::uint32_t, std::set<std::string>> nodes_of_group;
  for (const auto& worker : plan->workers)
    for (const auto& actor : worker.actors)
      (actor.kind == placement::actor_kind::stage ? nodes_of_replica[actor.replica]
                                                  : nodes_of_group[actor.index])
        .insert(worker.node);
  CHECK(nodes_of_replica
        == std::map<std::uint32_t, std::set<std::string>>{{0, {"n0"}}, {1, {"n1"}}, {2, {"n2"}}});
  CHECK(nodes_of_group
        == std::map<std::uint32_t, std::set<std::string>>{{0, {"n0", "n1", "n2"}},
                                                          {1, {"n0", "n1", "n2"}}});
}

TEST_CASE("any layout that is possible is placed by the rules") {
  std::mt19937 random(31);
  const auto pick = [&](std::uint32_t low, std::uint32_t high) {
    return std::uniform_int_distribution<std::uint32_t>(low, high)(random);
  };
  for (int round = 0; round < 2000; ++round) {
    std::vector<std::size_t> devices(pick(1, 5));
    for (auto& d : devices)
      d = pick(0, 6);
    devices[pick(0, static_cast<std::uint32_t>(devices.size()) - 1)] = pick(1, 6);
    placement::model_shape model = {.num_layers = pick(1, 24)};
    model.first_dense_layers = pick(0, 3);
    const std::uint32_t num_groups = pick(0, 1) * pick(1, 6);
    model.num_experts = num_groups == 0 ? pick(0, 8) : num_groups * pick(1, 5);
    model.dense_layer_cost = pick(1, 100);
    model.moe_layer_cost = pick(1, 100);
    model.routed_experts_cost = pick(1, 1000);
    model.head_cost = pick(0, 300);
    if (num_groups > 0)
      model.num_layers += model.first_dense_layers; // at least one MoE layer
    auto cluster = cluster_of(devices);
    cluster.parallel = {.data = pick(1, 4),
                        .pipeline = pick(1, std::min(6U, model.num_layers)),
                        .expert_groups = num_groups,
                        .expert_replicas = num_groups > 0 ? pick(1, 3) : 1};
    const auto plan = placement::place(cluster, model);
    REQUIRE(plan);
    REQUIRE(*plan == *placement::place(cluster, model));

    std::map<std::string, std::string> device_of; // every worker that could be
    for (const auto& node : cluster.nodes)
      for (std::size_t d = 0; d < node.devices.size(); ++d)
        device_of[node.name + "/worker-" + std::to_string(d)] = node.devices[d].name();
    std::map<std::string, const placement::actor*> actors;
    std::map<std::string, std::size_t> load;
    std::map<std::uint32_t, std::map<std::string, std::uint32_t>> stages_on; // [replica][node]
    for (const auto& worker : plan->workers) {
      REQUIRE(device_of.at(worker.name) == worker.device);
      REQUIRE(worker.name.starts_with(worker.node + "/"));
      REQUIRE(!worker.actors.empty());
      REQUIRE(load.emplace(worker.name, worker.actors.size()).second);
      for (const auto& actor : worker.actors) {
        REQUIRE(actors.emplace(actor.id, &actor).second);
        if (actor.kind == placement::actor_kind::stage)
          ++stages_on[actor.replica][worker.node];
      }
    }

    // Every layer once a replica, every expert once a copy, in order and without gaps.
    const auto& parallel = cluster.parallel;
    std::uint64_t dearest = 0;
    std::uint64_t total = model.head_cost;
    std::uint64_t dearest_layer = 0;
    const auto cost_of = [&](std::uint32_t layer) {
      return !model.is_moe(layer)
               ? model.dense_layer_cost
               : model.moe_layer_cost + (num_groups == 0 ? model.routed_experts_cost : 0);
    };
    for (std::uint32_t layer = 0; layer < model.num_layers; ++layer) {
      total += cost_of(layer);
      dearest_layer = std::max<std::uint64_t>(dearest_layer, cost_of(layer));
    }
    for (std::uint32_t r = 0; r < parallel.data; ++r) {
      std::uint32_t next = 0;
      for (std::uint32_t s = 0; s < parallel.pipeline; ++s) {
        const auto& stage =
          *actors.at("replica-" + std::to_string(r) + "/stage-" + std::to_string(s));
        REQUIRE((stage.replica == r && stage.index == s));
        REQUIRE(stage.first_layer == next);
        REQUIRE(stage.end_layer > next);
        next = stage.end_layer;
        std::uint64_t cost = s + 1 == parallel.pipeline ? model.head_cost : 0;
        for (std::uint32_t layer = stage.first_layer; layer < stage.end_layer; ++layer)
          cost += cost_of(layer);
        dearest = std::max(dearest, cost);
      }
      REQUIRE(next == model.num_layers);
    }
    REQUIRE(dearest <= total / parallel.pipeline + dearest_layer + model.head_cost + 1);
    for (std::uint32_t c = 0; c < plan->num_expert_copies; ++c) {
      std::uint32_t next = 0;
      for (std::uint32_t g = 0; g < num_groups; ++g) {
        const auto& group =
          *actors.at("expert-group-" + std::to_string(g) + "/copy-" + std::to_string(c));
        REQUIRE((group.index == g && group.copy == c));
        REQUIRE(group.first_expert == next);
        REQUIRE(group.end_expert - next == model.num_experts / num_groups);
        next = group.end_expert;
      }
      REQUIRE(next == model.num_experts);
    }
    REQUIRE(actors.size()
            == std::size_t{parallel.data} * parallel.pipeline
                 + std::size_t{num_groups} * plan->num_expert_copies);

    // No device carries more than one actor more than another; idle ones have no worker.
    std::size_t least = actors.size();
    std::size_t most = 0;
    for (const auto& [name, device] : device_of) {
      least = std::min(least, load[name]);
      most = std::max(most, load[name]);
    }
    REQUIRE(most - least <= 1);

    // The first replica has an empty house: it is only split where no node could take it.
    const std::size_t widest = *std::max_element(devices.begin(), devices.end());
    const std::size_t own = actors.size() / device_of.size();
    const std::size_t shared = actors.size() % device_of.size();
    if (parallel.pipeline <= own * widest + std::min(widest, shared))
      REQUIRE(stages_on[0].size() == 1);
  }
}
