#include "troupe/placement/core_shares.hpp"

#include <catch2/catch.hpp>

using namespace troupe;
using placement::actor_kind;

namespace {

placement::worker worker(std::string node, std::string device, actor_kind kind,
                         std::uint32_t replica = 0) {
  placement::actor one;
  one.kind = kind;
  one.replica = replica;
  return {node + "/" + device, node, device, {one}};
}

config::cluster_config hosts(std::vector<std::pair<std::string, std::string>> nodes) {
  config::cluster_config result;
  result.nodes.clear();
  for (auto& [name, host] : nodes)
    result.nodes.push_back({.name = name, .host = host});
  return result;
}

void check(const config::cluster_config& cluster, std::vector<placement::worker> workers,
           std::uint32_t stage_threads, std::uint32_t expert_threads, std::uint32_t decodes) {
  placement::plan placed;
  placed.workers = std::move(workers);
  const auto shares = placement::share_cores(cluster, placed, 8);
  CHECK(shares.stage_threads == stage_threads);
  CHECK(shares.expert_threads == expert_threads);
  CHECK(shares.decode_micro_batches == decodes);
}

} // namespace

TEST_CASE("stages on one host take turns with all of its cores, others share them") {
  const auto stage = actor_kind::stage, group = actor_kind::expert_group;
  const auto one = hosts({{"a", "localhost"}});
  check(one, {}, 8, 8, 1);
  check(one, {worker("a", "cpu:0", stage)}, 8, 8, 1);
  check(one,
        {worker("a", "cpu:0", stage), worker("a", "cpu:1", stage), worker("a", "cpu:2", group),
         worker("a", "cpu:3", group)},
        8, 8, 1);
  std::vector<placement::worker> groups;
  for (auto i = 0; i < 8; ++i)
    groups.push_back(worker("a", "cpu:" + std::to_string(i), group));
  check(one, groups, 8, 2, 1); // twice its part
  check(one, {worker("a", "cpu:0", stage, 0), worker("a", "cpu:1", stage, 1)}, 4, 8, 1);

  // Two nodes of one machine share its cores as well; two machines compute at the same time.
  const std::vector<placement::worker> apart{worker("a", "cpu:0", stage),
                                             worker("b", "cpu:0", stage)};
  check(hosts({{"a", "localhost"}, {"b", "localhost"}}), apart, 8, 8, 1);
  check(hosts({{"a", "x"}, {"b", "y"}}), apart, 8, 8, 2);
}

TEST_CASE("every GPU computes by itself, and threads that are given are taken") {
  const auto stage = actor_kind::stage;
  auto one = hosts({{"a", "localhost"}});
  const std::vector<placement::worker> gpus{worker("a", "cuda:0", stage),
                                            worker("a", "cuda:1", stage)};
  check(one, gpus, 8, 8, 2);
  one.serving.threads = 3;
  check(one, gpus, 3, 3, 2);
}

TEST_CASE("more sharers than cores have one each") {
  std::vector<placement::worker> many;
  for (std::uint32_t r = 0; r < 20; ++r)
    many.push_back(worker("a", "cpu:" + std::to_string(r), actor_kind::stage, r));
  check(hosts({{"a", "localhost"}}), many, 1, 8, 1);
}
