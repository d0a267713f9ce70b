#include <catch2/catch.hpp>

#include <random>
#include <set>
#include <vector>

#include "troupe/placement/seating.hpp"

using troupe::placement::seat;
using troupe::placement::seat_actors;

TEST_CASE("a replica goes where it fits") {
  const std::vector<std::uint32_t> nodes = {1, 3};
  const auto seats = seat_actors(nodes, 1, 3, 1, 1);
  CHECK(seats.stages == std::vector<std::vector<seat>>{{{1, 0}, {1, 1}, {1, 2}}});
  CHECK(seats.experts == std::vector<std::vector<seat>>{{{0, 0}}});
}

TEST_CASE("a replica that fits nowhere is cut as seldom as possible") {
  const std::vector<std::uint32_t> nodes = {1, 3, 2};
  const auto seats = seat_actors(nodes, 1, 5, 0, 0);
  CHECK(seats.stages == std::vector<std::vector<seat>>{{{1, 0}, {1, 1}, {1, 2}, {2, 0}, {2, 1}}});
}

TEST_CASE("one device takes everything") {
  const std::vector<std::uint32_t> nodes = {0, 1};
  const auto seats = seat_actors(nodes, 2, 2, 2, 2);
  for (const auto& row : seats.stages)
    CHECK(row == std::vector<seat>{{1, 0}, {1, 0}});
  for (const auto& row : seats.experts)
    CHECK(row == std::vector<seat>{{1, 0}, {1, 0}});
}

TEST_CASE("copies keep to different nodes wherever all nodes have the same room") {
  std::mt19937 random(11);
  for (int round = 0; round < 500; ++round) {
    const std::uint32_t num_nodes = 1 + random() % 6;
    const std::uint32_t stages = 1 + random() % 3;
    const std::uint32_t copies = 1 + random() % num_nodes;
    const std::uint32_t groups = 1 + random() % 8;
    // A replica a node, and a device for each of its stages and of the experts' copies.
    const std::uint32_t room = (groups * copies + num_nodes - 1) / num_nodes;
    const std::vector<std::uint32_t> nodes(num_nodes, stages + room);
    const auto seats = seat_actors(nodes, num_nodes, stages, groups, copies);
    std::set<std::uint32_t> replica_nodes;
    for (const auto& row : seats.stages) {
      for (const seat& s : row)
        REQUIRE(s.node == row.front().node);
      replica_nodes.insert(row.front().node);
    }
    REQUIRE(replica_nodes.size() == num_nodes);
    for (const auto& row : seats.experts) {
      std::set<std::uint32_t> used;
      for (const seat& s : row)
        used.insert(s.node);
      REQUIRE(used.size() == copies);
    }
  }
}

TEST_CASE("the largest cluster that a file can describe is seated in time") {
  const std::vector<std::uint32_t> nodes(256, 64);
  const auto seats = seat_actors(nodes, 256, 256, 1024, 16);
  std::set<std::uint32_t> used;
  for (const seat& s : seats.experts.back())
    used.insert(s.node);
  CHECK(used.size() == 16);
}
