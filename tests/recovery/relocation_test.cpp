#include "troupe/recovery/relocation.hpp"

#include <catch2/catch.hpp>

#include <random>

using namespace troupe;
using recovery::relocate;

namespace {

/// Builds views: nodes with memory, workers with actors.
struct builder {
  proto::ClusterView view;

  builder& node(const std::string& name, std::uint64_t memory = 0) {
    auto* n = view.add_nodes();
    n->set_name(name);
    n->set_state(proto::RUNNING);
    n->set_memory_bytes(memory);
    return *this;
  }

  /// A worker on the last node; "s2" is stage 2, "e1.0" copy 0 of group 1. Each has 100 bytes.
  builder& worker(const std::vector<std::string>& actors) {
    auto* w = view.add_workers();
    auto node = view.nodes(view.nodes_size() - 1).name();
    w->mutable_plan()->set_node(node);
    w->mutable_plan()->set_name(node + "/worker-" + std::to_string(view.workers_size() - 1));
    w->set_state(actors.empty() ? proto::IDLE : proto::RUNNING);
    for (const auto& text : actors) {
      auto* a = w->mutable_plan()->add_actors();
      a->set_id(text);
      a->set_kind(text[0] == 's' ? proto::STAGE : proto::EXPERT_GROUP);
      a->set_index(static_cast<std::uint32_t>(text[1] - '0'));
      a->set_weight_bytes(100);
    }
    return *this;
  }
};

std::string text(const recovery::relocation& r) {
  std::string result;
  for (const auto& m : r.moves)
    result += m.actor + ":" + m.from + ">" + m.to + " ";
  for (const auto& d : r.dropped)
    result += "-" + d + " ";
  return result + r.problem;
}

} // namespace

TEST_CASE("a spare device is preferred to one in use") {
  auto b = builder().node("a").worker({"s0"}).node("b").worker({"s1"}).worker({});
  CHECK(text(relocate(b.view, {"a/worker-0"})) == "s0:a/worker-0>b/worker-2 ");
}

TEST_CASE("without a spare the worker with fewest actors is shared") {
  auto b = builder().node("a").worker({"s0"}).node("b").worker({"s1", "e0.0"}).worker({"s2"});
  CHECK(text(relocate(b.view, {"a/worker-0"})) == "s0:a/worker-0>b/worker-2 ");
}

TEST_CASE("stages get the spares before experts do") {
  auto b = builder().node("a").worker({"e0.0", "s0"}).node("b").worker({"s1"}).worker({});
  CHECK(text(relocate(b.view, {"a/worker-0"}))
        == "s0:a/worker-0>b/worker-2 e0.0:a/worker-0>b/worker-1 ");
}

TEST_CASE("nodes that are not there and workers that are given up take nothing") {
  auto b = builder().node("a").worker({"s0"}).node("b").worker({}).node("c").worker({}).worker({});
  b.view.mutable_nodes(1)->set_state(proto::LOST);
  b.view.mutable_workers(2)->set_state(proto::FAILED);
  CHECK(text(relocate(b.view, {"a/worker-0"})) == "s0:a/worker-0>c/worker-3 ");
}

TEST_CASE("copies of a group never share a worker, and a redundant one is not packed") {
  auto b = builder().node("a").worker({"e0.0"}).node("b").worker({"e0.1"}).worker({"s0"});
  CHECK(text(relocate(b.view, {"a/worker-0"})) == "-e0.0 ");
  b.worker({});
  CHECK(text(relocate(b.view, {"a/worker-0"})) == "e0.0:a/worker-0>b/worker-3 ");
  // Both copies lost: the first one found has to find a place, the other one may go without.
  auto both = builder().node("a").worker({"e0.0"}).worker({"e0.1"}).node("b").worker({"s0"});
  CHECK(text(relocate(both.view, {"a/worker-0", "a/worker-1"}))
        == "e0.0:a/worker-0>b/worker-2 -e0.1 ");
}

TEST_CASE("what does not fit into memory does not move, and then nothing does") {
  auto b = builder().node("a").worker({"s0"}).worker({"s1"}).node("b", 340).worker({"s2"});
  auto found = relocate(b.view, {"a/worker-0", "a/worker-1"}); // 300 of 306 bytes
  CHECK(found.moves.size() == 2);
  b.view.mutable_nodes(1)->set_memory_bytes(330);
  found = relocate(b.view, {"a/worker-0", "a/worker-1"});
  CHECK(found.moves.empty());
  CHECK(found.problem == "s1 of a/worker-1 fits on no device that is left");
}

TEST_CASE("what moves to a GPU needs no memory of its host") {
  auto b = builder().node("a").worker({"s0"}).node("b", 110).worker({"s1"}).worker({});
  CHECK(relocate(b.view, {"a/worker-0"}).moves.empty());
  for (auto& worker : *b.view.mutable_workers())
    worker.mutable_plan()->set_device("cuda:0");
  CHECK(text(relocate(b.view, {"a/worker-0"})) == "s0:a/worker-0>b/worker-2 ");
}

TEST_CASE("what moves to GPUs fits into each of them, or does not move") {
  auto b = builder().node("a").worker({"s0"}).node("b").worker({"s1"}).worker({});
  b.view.mutable_workers(0)->mutable_plan()->set_device("cuda:0,cuda:1");
  b.view.mutable_workers(1)->mutable_plan()->set_device("cuda:0,cuda:1");
  b.view.mutable_workers(2)->mutable_plan()->set_device("cuda:2,cuda:3");
  for (auto& worker : *b.view.mutable_workers())
    for (auto& actor : *worker.mutable_plan()->mutable_actors())
      actor.set_device_bytes(60);
  auto& gpus = *b.view.mutable_nodes(1)->mutable_gpu_bytes();
  const auto moved = [&] { return text(relocate(b.view, {"a/worker-0"})); };
  CHECK(moved() == "s0:a/worker-0>b/worker-2 "); // nothing is known of them
  gpus["cuda:2"] = 80;
  gpus["cuda:3"] = 60; // nine tenths are 54
  CHECK(moved() == "s0:a/worker-0>b/worker-1 ");
  gpus["cuda:0"] = 150; // 135 for two actors
  gpus["cuda:1"] = 130;
  CHECK(moved() == "s0 of a/worker-0 fits on no device that is left");
  gpus["cuda:1"] = 140;
  CHECK(moved() == "s0:a/worker-0>b/worker-1 ");
}

TEST_CASE("workers that share a GPU share its memory") {
  auto b = builder().node("a").worker({"s0"}).node("b").worker({"s1"}).worker({});
  for (auto& worker : *b.view.mutable_workers()) {
    worker.mutable_plan()->set_device("cuda:0");
    for (auto& actor : *worker.mutable_plan()->mutable_actors())
      actor.set_device_bytes(60);
  }
  auto& gpus = *b.view.mutable_nodes(1)->mutable_gpu_bytes();
  gpus["cuda:0"] = 130;
  CHECK(relocate(b.view, {"a/worker-0"}).moves.empty());
  gpus["cuda:0"] = 140;
  CHECK(text(relocate(b.view, {"a/worker-0"})) == "s0:a/worker-0>b/worker-2 ");
}

TEST_CASE("whatever is lost, each actor ends up on exactly one usable worker or is named") {
  std::mt19937 random(3);
  auto pick = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  for (int round = 0; round < 2000; ++round) {
    builder b;
    int stage = 0;
    int nodes = 1 + pick(4);
    for (int n = 0; n < nodes; ++n) {
      b.node("n" + std::to_string(n), pick(3) == 0 ? 0 : static_cast<std::uint64_t>(pick(900)));
      for (int w = 1 + pick(3); w > 0; --w) {
        std::vector<std::string> actors;
        if (pick(3) != 0 && stage < 10)
          actors.push_back("s" + std::to_string(stage++));
        if (pick(3) == 0)
          actors.push_back("e" + std::to_string(pick(2)) + "." + std::to_string(round)
                           + std::to_string(n) + std::to_string(w));
        b.worker(actors);
      }
    }
    std::set<std::string> lost;
    std::size_t num_homeless = 0;
    auto dead = "n" + std::to_string(pick(nodes));
    for (auto& n : *b.view.mutable_nodes())
      if (n.name() == dead)
        n.set_state(proto::FAILED);
    for (const auto& w : b.view.workers())
      if (w.plan().node() == dead) {
        lost.insert(w.plan().name());
        num_homeless += static_cast<std::size_t>(w.plan().actors_size());
      }
    auto found = relocate(b.view, lost);
    if (!found.problem.empty()) {
      REQUIRE(found.moves.empty());
      continue;
    }
    REQUIRE(found.moves.size() + found.dropped.size() == num_homeless);
    std::set<std::string> moved;
    for (const auto& m : found.moves) {
      REQUIRE(moved.insert(m.actor).second);
      REQUIRE(lost.count(m.from) == 1);
      REQUIRE(lost.count(m.to) == 0);
    }
    for (const auto& id : found.dropped)
      REQUIRE(id[0] == 'e');
  }
}

TEST_CASE("a loss is foreseen in words") {
  proto::ClusterPlan plan;
  auto b = builder().node("a").worker({"s0"}).node("b").worker({"s1"}).worker({});
  for (const auto& w : b.view.workers())
    *plan.add_workers() = w.plan();
  auto lines = recovery::foresee_losses(plan, {});
  REQUIRE(lines.size() == 2);
  CHECK(lines[0] == "if a is lost: s0 moves to the spare b/worker-2");
  CHECK(lines[1] == "if b is lost: s1 is packed onto a/worker-0");
  lines = recovery::foresee_losses(plan, {{"a", {150, {}}}});
  CHECK(lines[1]
        == "if b is lost: s1 of b/worker-1 fits on no device that is left: requests wait until it "
           "is back");
  for (auto& worker : *plan.mutable_workers()) {
    worker.set_device("cuda:0");
    for (auto& actor : *worker.mutable_actors())
      actor.set_device_bytes(60);
  }
  lines = recovery::foresee_losses(plan, {{"a", {1000, {{"cuda:0", 130}}}}});
  CHECK(lines[0]
        == "if a is lost: s0 moves to the spare b/worker-2 if its GPU has room (not known here)");
  CHECK(lines[1]
        == "if b is lost: s1 of b/worker-1 fits on no device that is left: requests wait until it "
           "is back");
}
