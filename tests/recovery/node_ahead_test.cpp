#include "node_fixture.hpp"

#include <algorithm>

using namespace troupe;
using namespace troupe::test;

namespace {

/// Workers of that many GPUs, a stage each. Nothing has connected yet.
node gpus(std::uint32_t num_workers, std::uint32_t num_standbys) {
  node n;
  n.assignment.mutable_plan()->set_standbys(num_standbys);
  n.assignment.mutable_plan()->set_num_stages(1);
  for (std::uint32_t i = 0; i < num_workers; ++i) {
    n.plan(i, {i});
    auto* plan = n.assignment.mutable_known(static_cast<int>(i))->mutable_plan();
    plan->set_device("cuda:" + std::to_string(i));
  }
  n.assign();
  n.done();
  return n;
}

void run(node& n, const std::string& worker, std::uint64_t incarnation = 1) {
  REQUIRE(n.greet(worker, incarnation));
  n.done();
  n.say(worker, incarnation, proto::RUNNING);
}

proto::ProcessState state_of_standby(const node& n) {
  REQUIRE(n.hello.standbys_size() == 1);
  return n.hello.standbys(0).state();
}

} // namespace

TEST_CASE("a standby loads ahead what a worker of a GPU has, once that runs") {
  auto n = gpus(1, 1);
  steps asked{"prepare node-0/standby-0#1 replica-0/stage-0 on cuda:0"};
  SECTION("the worker is first") {
    run(n, "node-0/worker-0");
    CHECK(n.done() == steps{"report node-0/worker-0#1 RUNNING"});
    n.make_ready("node-0/standby-0");
    asked.insert(asked.begin(), "prepare node-0/standby-0#1");
    asked.emplace_back("hello");
    CHECK(n.done() == asked);
    CHECK(state_of_standby(n) == proto::LOADING);
  }
  SECTION("the standby is first") {
    n.make_ready("node-0/standby-0");
    CHECK(n.done() == steps{"prepare node-0/standby-0#1", "hello"});
    CHECK(state_of_standby(n) == proto::RUNNING); // there is nothing to load yet
    run(n, "node-0/worker-0");
    asked.insert(asked.begin(), "report node-0/worker-0#1 RUNNING");
    CHECK(n.done() == asked);
  }
  n.say("node-0/standby-0", 1, proto::RUNNING);
  CHECK(n.done() == steps{"hello"});
  CHECK(state_of_standby(n) == proto::RUNNING);
  n.say("node-0/standby-0", 1, proto::RUNNING); // once more: its connection broke
  CHECK(n.done() == steps{"hello"});
}

TEST_CASE("on a CPU nothing is loaded ahead") {
  auto n = running(1);
  n.say("node-0/standby-0", 1, proto::RUNNING);
  CHECK(n.done() == steps{"hello"});
}

TEST_CASE("a standby that still loads takes the place all the same") {
  auto n = gpus(1, 1);
  n.make_ready("node-0/standby-0");
  run(n, "node-0/worker-0");
  n.done();
  n.end("node-0/worker-0#1");
  CHECK(n.done()
        == steps{"report node-0/worker-0#1 LOST",
                 "assign node-0/standby-0#1 as node-0/worker-0#2 replica-0/stage-0 on cuda:0",
                 "view to node-0/standby-0#1", "report node-0/worker-0#2 STARTING",
                 "start node-0/standby-1#1"});
}

TEST_CASE("each worker gets a standby before one gets two, and each its own") {
  auto n = gpus(2, 3);
  run(n, "node-0/worker-0");
  run(n, "node-0/worker-1");
  n.done();
  const std::string on[] = {"replica-0/stage-0 on cuda:0", "replica-0/stage-1 on cuda:1"};
  for (std::size_t i = 0; i < 3; ++i) {
    auto name = "node-0/standby-" + std::to_string(i);
    n.make_ready(name);
    CHECK(n.done()
          == steps{"prepare " + name + "#1", "prepare " + name + "#1 " + on[i % 2], "hello"});
    n.say(name, 1, proto::RUNNING);
    n.done();
  }
  SECTION("the second worker's") {
    n.end("node-0/worker-1#1");
    CHECK(n.done()[1] == "assign node-0/standby-1#1 as node-0/worker-1#2 " + on[1]);
    SECTION("then another's, the first of those that are ready") {
      n.say("node-0/worker-1", 2, proto::RUNNING);
      n.done();
      n.die("node-0/worker-1#1");
      n.end("node-0/standby-1#1");
      CHECK(n.done()[1] == "assign node-0/standby-0#1 as node-0/worker-1#3 " + on[1]);
    }
  }
  SECTION("the first worker's that is whole") {
    n.end("node-0/worker-0#1");
    CHECK(n.done()[1] == "assign node-0/standby-0#1 as node-0/worker-0#2 " + on[0]);
    n.die("node-0/worker-0#1");
    n.end("node-0/standby-0#1");
    CHECK(n.done()[1] == "assign node-0/standby-2#1 as node-0/worker-0#3 " + on[0]);
  }
}

TEST_CASE("one standby at a time loads ahead for a worker") {
  auto n = gpus(1, 2);
  run(n, "node-0/worker-0");
  n.make_ready("node-0/standby-0");
  n.done();
  n.make_ready("node-0/standby-1");
  CHECK(n.done() == steps{"prepare node-0/standby-1#1", "hello"});
  const std::string next = "prepare node-0/standby-1#1 replica-0/stage-0 on cuda:0";
  SECTION("the first has loaded") {
    n.say("node-0/standby-0", 1, proto::RUNNING);
    CHECK(n.done() == steps{next, "hello"});
  }
  SECTION("the first could not") {
    n.say("node-0/standby-0", 1, proto::FAILED);
    CHECK(n.done().back() == next);
  }
}

TEST_CASE("when a worker is to run other actors, who has loaded the old ones is killed") {
  auto n = gpus(1, 1);
  n.make_ready("node-0/standby-0");
  run(n, "node-0/worker-0");
  n.say("node-0/standby-0", 1, proto::RUNNING);
  n.done();
  n.plan(0, {1});
  n.reassign();
  const auto done = n.done();
  CHECK(std::count(done.begin(), done.end(), "kill node-0/standby-0#1") == 1);
  n.die("node-0/worker-0#1"); // first: the standby takes no place any more
  CHECK(n.done().back() == "report node-0/worker-0#2 STARTING");
  n.die("node-0/standby-0#1");
  n.done();
  n.pass(node_policy::standby_pause + 1ms);
  CHECK(n.done() == steps{"start node-0/standby-1#1"});
}

TEST_CASE("a standby whose loading fails is one that has loaded nothing else, and stays") {
  auto n = gpus(1, 1);
  n.make_ready("node-0/standby-0");
  run(n, "node-0/worker-0");
  n.say("node-0/standby-0", 1, proto::RUNNING); // it says so whether it could or not
  n.done();
  n.die("node-0/worker-0#1");
  CHECK(n.done()[1]
        == "assign node-0/standby-0#1 as node-0/worker-0#2 replica-0/stage-0 on cuda:0");
}
