#include "node_fixture.hpp"

using namespace troupe;
using namespace troupe::test;

// Between the last thing that a process does and its being gone.

TEST_CASE("the successor of a process that ends is started at once") {
  auto n = running();
  auto kv = n.view().kv(0).generation();
  n.end("node-0/worker-0#1");
  CHECK(n.done()
        == steps{"report node-0/worker-0#1 LOST", "start node-0/worker-0#2",
                 "report node-0/worker-0#2 STARTING"});
  CHECK(n.view().kv(0).generation() == kv);
  SECTION("and told what it is, gone or not") {
    auto is_gone = GENERATE(true, false);
    if (is_gone)
      n.die("node-0/worker-0#1");
    CHECK(n.done().empty());
    REQUIRE(n.greet("node-0/worker-0", 2));
    CHECK(n.done()
          == steps{"assign node-0/worker-0#2 as node-0/worker-0#2 replica-0/stage-0",
                   "view to node-0/worker-0#2"});
    n.die("node-0/worker-0#1");
    CHECK(n.done().empty());
  }
  SECTION("what the one that ends still says is ignored") {
    CHECK_FALSE(n.greet("node-0/worker-0", 1));
    n.say("node-0/worker-0", 1, proto::RUNNING);
    n.end("node-0/worker-0#1"); // or is said twice
    CHECK(n.done().empty());
    CHECK(n.view().state() == proto::STARTING);
  }
}

TEST_CASE("what is reported of an end is what is known of it") {
  auto n = running();
  std::vector<proto::WorkerChanged> reports;
  auto verdict = GENERATE(std::string(), std::string("no beat for 812 ms"));
  for (const auto& e :
       n.policy.process_ending({"node-0/worker-0#1", "ended", verdict, n.now - 1ms}, n.now))
    if (const auto* change = std::get_if<proto::WorkerChanged>(&e))
      reports.push_back(*change);
  REQUIRE(reports.size() == 1);
  CHECK(reports[0].cause() == (verdict.empty() ? "ended" : verdict + "; it was killed"));
  CHECK(reports[0].detected_by() == (verdict.empty() ? "exit" : "pulse"));
  CHECK(reports[0].detect_ms() == Approx(1));
}

TEST_CASE("a standby takes the place of a process that ends, on a GPU as well") {
  auto n = running_on_gpu(1);
  n.end("node-0/worker-0#1");
  CHECK(n.done()
        == steps{"report node-0/worker-0#1 LOST",
                 "assign node-0/standby-0#1 as node-0/worker-0#2 replica-0/stage-0 on cuda:0",
                 "view to node-0/standby-0#1", "report node-0/worker-0#2 STARTING",
                 "start node-0/standby-1#1"});
  n.die("node-0/worker-0#1");
  CHECK(n.done().empty());
  SECTION("a new process is told when both that came before it are gone") {
    n.say("node-0/worker-0", 2, proto::RUNNING);
    n.done();
    n.end("node-0/standby-0#1");
    CHECK(n.done()
          == steps{"report node-0/worker-0#2 LOST", "start node-0/worker-0#3",
                   "report node-0/worker-0#3 STARTING"});
    REQUIRE(n.greet("node-0/worker-0", 3));
    CHECK(n.done().empty());
    n.end("node-0/worker-0#3"); // it ends, too
    CHECK(n.done()
          == steps{"report node-0/worker-0#3 LOST", "start node-0/worker-0#4",
                   "report node-0/worker-0#4 STARTING"});
    REQUIRE(n.greet("node-0/worker-0", 4));
    n.die("node-0/worker-0#3");
    CHECK(n.done().empty());
    n.die("node-0/standby-0#1");
    CHECK(n.done()
          == steps{"assign node-0/worker-0#4 as node-0/worker-0#4 replica-0/stage-0 on cuda:0",
                   "view to node-0/worker-0#4"});
  }
}

TEST_CASE("on a GPU some are told what to run when their predecessor is gone") {
  steps told;
  node n = running_on_gpu(0);
  SECTION("new processes: the memory has to be free") {
    n.end("node-0/worker-0#1");
    CHECK(n.done()
          == steps{"report node-0/worker-0#1 LOST", "start node-0/worker-0#2",
                   "report node-0/worker-0#2 STARTING"});
    SECTION("which says hello before that") {
      REQUIRE(n.greet("node-0/worker-0", 2));
      CHECK(n.done().empty());
      REQUIRE(n.greet("node-0/worker-0", 2)); // its connection broke
      CHECK(n.done().empty());
      n.die("node-0/worker-0#1");
    }
    SECTION("or after it") {
      n.die("node-0/worker-0#1");
      CHECK(n.done().empty());
      REQUIRE(n.greet("node-0/worker-0", 2));
    }
    told = {"assign node-0/worker-0#2 as node-0/worker-0#2 replica-0/stage-0 on cuda:0",
            "view to node-0/worker-0#2"};
  }
  SECTION("standbys, with drafts") {
    n = running_on_gpu(1, 2);
    n.end("node-0/worker-0#1");
  }
  SECTION("standbys, where it was stuck") {
    n = running_on_gpu(1);
    n.end("node-0/worker-0#1", "no beat for 812 ms");
  }
  if (told.empty()) {
    CHECK(n.done()
          == steps{"report node-0/worker-0#1 LOST", "report node-0/worker-0#2 STARTING",
                   "start node-0/standby-1#1"});
    n.die("node-0/worker-0#1");
    told = {"assign node-0/standby-0#1 as node-0/worker-0#2 replica-0/stage-0 on cuda:0",
            "view to node-0/standby-0#1"};
  }
  CHECK(n.done() == told);
  n.die("node-0/worker-0#1");
  CHECK(n.done().empty());
}

TEST_CASE("rows for the next stage have two places, so that every other incarnation has to wait") {
  auto n = running_on_gpu(3, 0, 2);
  auto assigned = [&](std::uint64_t incarnation) {
    auto done = n.done();
    return std::any_of(done.begin(), done.end(), [&](const auto& step) {
      return step.find(fmt::format("as node-0/worker-0#{} ", incarnation)) != std::string::npos;
    });
  };
  n.end("node-0/worker-0#1");
  CHECK(assigned(2));
  n.end("node-0/standby-0#1"); // the second
  CHECK_FALSE(assigned(3));
  SECTION("for the one before the last") {
    n.die("node-0/standby-0#1");
    CHECK_FALSE(assigned(3));
    n.die("node-0/worker-0#1");
    CHECK(assigned(3));
  }
  SECTION("and no longer than for the last") {
    n.die("node-0/worker-0#1");
    CHECK_FALSE(assigned(3));
    n.die("node-0/standby-0#1");
    CHECK(assigned(3));
  }
}

TEST_CASE("a standby of one that has given its GPU up begins at once") {
  auto n = running_on_gpu(1);
  n.carry_out(
    n.policy.process_ending({"node-0/worker-0#1", "exited with code 6", "", n.now}, n.now));
  CHECK(n.done()
        == steps{"report node-0/worker-0#1 LOST",
                 "assign node-0/standby-0#1 as node-0/worker-0#2 replica-0/stage-0 on cuda:0",
                 "view to node-0/standby-0#1", "report node-0/worker-0#2 STARTING",
                 "start node-0/standby-1#1"});
  n.die("node-0/worker-0#1");
  CHECK(n.done().empty());
}

TEST_CASE("the successor may end before its predecessor is gone") {
  auto n = running_on_gpu(1, 1);
  n.end("node-0/worker-0#1");
  n.done();
  n.die("node-0/standby-0#1"); // before it was told whose place it takes
  CHECK(n.done()
        == steps{"report node-0/worker-0#2 LOST", "start node-0/worker-0#3",
                 "report node-0/worker-0#3 STARTING"});
  n.die("node-0/worker-0#1");
  CHECK(n.done().empty());
  REQUIRE(n.greet("node-0/worker-0", 3));
  CHECK(n.done().size() == 2);
}

TEST_CASE("who is replaced for other actors is gone before they begin") {
  auto n = running();
  n.plan(0, {1});
  n.reassign();
  CHECK(n.done() == steps{"drop memory of replica-0/stage-0", "kill node-0/worker-0#1"});
  n.end("node-0/worker-0#1");
  CHECK(n.done().empty());
  n.die("node-0/worker-0#1");
  CHECK(n.done()
        == steps{"memory of replica-0/stage-1", "start node-0/worker-0#2",
                 "report node-0/worker-0#2 STARTING"});
}

TEST_CASE("a standby that ends takes no place any more") {
  auto n = running(1);
  n.end("node-0/standby-0#1");
  CHECK(n.done() == steps{"hello"});
  n.end("node-0/worker-0#1");
  CHECK(n.done()
        == steps{"report node-0/worker-0#1 LOST", "start node-0/worker-0#2",
                 "report node-0/worker-0#2 STARTING", "start node-0/standby-1#1"});
  n.die("node-0/standby-0#1");
  n.die("node-0/worker-0#1");
  CHECK(n.done().empty());
}

TEST_CASE("a crash loop of processes that end is given up like any other") {
  node n;
  n.plan(0, {0});
  n.assign();
  for (std::uint64_t i = 1; i <= 4; ++i)
    n.end(fmt::format("node-0/worker-0#{}", i));
  CHECK(n.view().state() == proto::FAILED);
  n.done();
  for (std::uint64_t i = 1; i <= 4; ++i)
    n.die(fmt::format("node-0/worker-0#{}", i));
  CHECK(n.done().empty());
}
