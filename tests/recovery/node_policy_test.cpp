#include "node_fixture.hpp"

#include "troupe/recovery/restart_policy.hpp"

#include <algorithm>

using namespace troupe;
using namespace troupe::test;
using recovery::restart_policy;

TEST_CASE("a worker is started with memory, told what it is, and reported as it comes up") {
  node n;
  n.plan(0, {0, 1});
  n.plan(1, {});
  CHECK(n.done() == steps{"hello"});
  n.assign();
  CHECK(n.done()
        == steps{"memory of replica-0/stage-0", "memory of replica-0/stage-1",
                 "start node-0/worker-0#1", "report node-0/worker-0#1 STARTING"});
  CHECK(n.last.restored_by() == "restart");
  CHECK(n.last.worker().pid() == 100);
  CHECK(n.last.worker().host() == "10.0.0.1");
  REQUIRE(n.last.worker().kv_size() == 2);
  CHECK(n.last.worker().kv(0).generation() != 0);
  CHECK(n.last.worker().kv(0).generation() != n.last.worker().kv(1).generation());
  CHECK(n.view(1).state() == proto::IDLE);

  REQUIRE(n.greet("node-0/worker-0", 1));
  CHECK(n.done()
        == steps{"assign node-0/worker-0#1 as node-0/worker-0#1 replica-0/stage-0 "
                 "replica-0/stage-1",
                 "view to node-0/worker-0#1"});
  n.say("node-0/worker-0", 1, proto::LOADING);
  n.say("node-0/worker-0", 1, proto::RUNNING);
  CHECK(n.done() == steps{"report node-0/worker-0#1 LOADING", "report node-0/worker-0#1 RUNNING"});
  CHECK(n.last.worker().port() == 4000);
  CHECK(n.last.worker().pid() == 77);
}

TEST_CASE("a process is told its device, which a standby learns from the one that it replaces") {
  node n;
  n.plan(0, {0});
  n.assignment.mutable_known(0)->mutable_plan()->set_device("cuda:3");
  n.assignment.mutable_plan()->set_standbys(1);
  n.assign();
  REQUIRE(n.greet("node-0/worker-0", 1));
  n.say("node-0/worker-0", 1, proto::RUNNING);
  REQUIRE(n.greet("node-0/standby-0", 1));
  n.say("node-0/standby-0", 1, proto::RUNNING);
  const auto before = n.done();
  CHECK(std::count(before.begin(), before.end(),
                   "assign node-0/worker-0#1 as node-0/worker-0#1 replica-0/stage-0 on cuda:3")
        == 1);
  n.carry_out(
    n.policy.process_exited({"node-0/worker-0#1", "killed by signal 9", "", n.now}, n.now));
  const auto after = n.done();
  CHECK(std::count(after.begin(), after.end(),
                   "assign node-0/standby-0#1 as node-0/worker-0#2 replica-0/stage-0 on cuda:3")
        == 1);
}

TEST_CASE("a node without an assignment starts nothing") {
  node n;
  n.done();
  n.assignment.mutable_plan()->set_standbys(1);
  n.pass(10s);
  CHECK(n.done().empty());
  CHECK_FALSE(n.greet("node-0/worker-0", 1));
}

TEST_CASE("a worker that dies is lost, started anew and keeps its memory") {
  auto n = running();
  auto kv = n.view().kv(0).generation();
  auto verdict = GENERATE(std::string(), std::string("no beat for 812 ms"));
  std::vector<proto::WorkerChanged> reports;
  auto todo = n.policy.process_exited(
    {"node-0/worker-0#1", "killed by signal 9", verdict, n.now - 3ms}, n.now);
  for (const auto& e : todo)
    if (const auto* change = std::get_if<proto::WorkerChanged>(&e))
      reports.push_back(*change);
  n.carry_out(todo);
  REQUIRE(reports.size() == 1);
  const auto& lost = reports.front();
  CHECK(lost.worker().state() == proto::LOST);
  CHECK(lost.worker().incarnation() == 1);
  CHECK(lost.cause() == (verdict.empty() ? "killed by signal 9" : verdict + "; it was killed"));
  CHECK(lost.detected_by() == (verdict.empty() ? "exit" : "pulse"));
  CHECK(lost.detect_ms() == Approx(3));
  CHECK(lost.detected_ns()
        == static_cast<std::uint64_t>(std::chrono::nanoseconds(1h - 3ms).count()));
  CHECK(n.done()
        == steps{"report node-0/worker-0#1 LOST", "start node-0/worker-0#2",
                 "report node-0/worker-0#2 STARTING"});
  CHECK(n.view().kv(0).generation() == kv);
  CHECK(n.view().port() == 0); // the old one's
}

TEST_CASE("a worker that is killed while it starts is started anew") {
  node n;
  n.plan(0, {0});
  n.assign();
  SECTION("before it says hello") {}
  SECTION("before it has loaded") {
    REQUIRE(n.greet("node-0/worker-0", 1));
    n.say("node-0/worker-0", 1, proto::LOADING);
  }
  n.done();
  n.die("node-0/worker-0#1");
  CHECK(n.done()
        == steps{"report node-0/worker-0#1 LOST", "start node-0/worker-0#2",
                 "report node-0/worker-0#2 STARTING"});
  CHECK_FALSE(n.greet("node-0/worker-0", 1)); // late words of the dead
  CHECK(n.greet("node-0/worker-0", 2));
}

TEST_CASE("what an old incarnation says is ignored") {
  auto n = running();
  n.die("node-0/worker-0#1");
  n.done();
  n.say("node-0/worker-0", 1, proto::RUNNING);
  n.say("node-0/worker-0", 1, proto::FAILED, error_code::invalid_model);
  n.say("node-0/worker-9", 1, proto::RUNNING);
  n.die("node-0/worker-0#1");
  CHECK(n.done().empty());
  CHECK(n.view().state() == proto::STARTING);
}

TEST_CASE("a crash loop ends in giving up, with the last reason") {
  node n;
  n.plan(0, {0});
  n.assign();
  for (std::uint64_t i = 1; i <= 3; ++i)
    n.die(fmt::format("node-0/worker-0#{}", i));
  n.say("node-0/worker-0", 4, proto::FAILED, error_code::io_failed);
  n.done();
  n.die("node-0/worker-0#4");
  CHECK(n.done() == steps{"report node-0/worker-0#4 LOST", "report node-0/worker-0#4 FAILED"});
  CHECK(n.last.cause() == "node-0/worker-0 died more than 3 times in 60 s, last: the model is bad");
  CHECK(n.last.worker().error().code() == static_cast<std::uint32_t>(error_code::unavailable));

  SECTION("it stays given up, also under the same assignment") {
    n.reassign();
    n.pass(10min);
    n.say("node-0/worker-0", 4, proto::RUNNING); // sent before it died
    CHECK(n.done().empty());
    CHECK(n.view().state() == proto::FAILED);
  }
  SECTION("another assignment is another beginning") {
    n.plan(0, {1});
    n.reassign();
    CHECK(n.done()
          == steps{"drop memory of replica-0/stage-0", "memory of replica-0/stage-1",
                   "start node-0/worker-0#5", "report node-0/worker-0#5 STARTING"});
    CHECK_FALSE(n.view().has_error());
    n.pass(1min); // what it has died before counts no more
    n.done();
    n.die("node-0/worker-0#5");
    CHECK(n.done().at(1) == "start node-0/worker-0#6");
  }
}

TEST_CASE("deaths that lie far apart are no crash loop") {
  node n;
  n.plan(0, {0});
  n.assign();
  for (std::uint64_t i = 1; i <= 20; ++i) {
    n.pass(20s);
    n.die(fmt::format("node-0/worker-0#{}", i));
  }
  CHECK(n.view().state() == proto::STARTING);
  CHECK(n.view().incarnation() == 21);
}

TEST_CASE("a worker that can never work is given up at once") {
  auto n = running();
  n.die("node-0/worker-0#1");
  n.done();
  n.say("node-0/worker-0", 2, proto::FAILED, error_code::invalid_model);
  CHECK(n.done() == steps{"report node-0/worker-0#2 FAILED"});
  CHECK(n.last.cause() == "the model is bad");
  n.die("node-0/worker-0#2");
  n.pass(10s);
  CHECK(n.done().empty());
  CHECK(n.view().state() == proto::FAILED);
}

TEST_CASE("a worker that failed for now is restarted when it exits") {
  auto n = running();
  n.say("node-0/worker-0", 1, proto::FAILED, error_code::io_failed);
  CHECK(n.done().empty());
  n.die("node-0/worker-0#1");
  CHECK(n.done().at(1) == "start node-0/worker-0#2");
}

TEST_CASE("a process that cannot be started is tried again after a pause, each time under a new "
          "incarnation") {
  auto n = running();
  n.refuse_processes = true;
  n.die("node-0/worker-0#1");
  CHECK(n.done()
        == steps{"report node-0/worker-0#1 LOST", "refuse node-0/worker-0#2",
                 "report node-0/worker-0#2 LOST"});
  CHECK(n.last.cause() == "fork: no");
  CHECK(n.last.detected_by() == "exit");
  n.pass(restart_policy::spawn_retry_interval - 1ms);
  CHECK(n.done().empty());

  SECTION("until it can") {
    n.refuse_processes = false;
    n.pass(1ms);
    CHECK(n.done() == steps{"start node-0/worker-0#3", "report node-0/worker-0#3 STARTING"});
    n.pass(10s);
    CHECK(n.done().empty());
  }
  SECTION("until it was tried too often") {
    n.pass(1ms);
    CHECK(n.done() == steps{"refuse node-0/worker-0#3", "report node-0/worker-0#3 LOST"});
    n.pass(restart_policy::spawn_retry_interval);
    CHECK(n.done()
          == steps{"refuse node-0/worker-0#4", "report node-0/worker-0#4 LOST",
                   "report node-0/worker-0#4 FAILED"});
    CHECK(n.last.cause() == "node-0/worker-0 died more than 3 times in 60 s, last: fork: no");
    n.pass(10s);
    CHECK(n.done().empty());
  }
  SECTION("or until it is to run something else, which is tried at once") {
    n.refuse_processes = false;
    n.plan(0, {1});
    n.reassign();
    CHECK(n.done()
          == steps{"drop memory of replica-0/stage-0", "memory of replica-0/stage-1",
                   "start node-0/worker-0#3", "report node-0/worker-0#3 STARTING"});
    n.pass(10s); // the retry is forgotten
    CHECK(n.done().empty());
  }
  SECTION("or until it is to run nothing") {
    n.plan(0, {});
    n.reassign();
    n.pass(10s);
    CHECK(n.done() == steps{"drop memory of replica-0/stage-0"});
    CHECK(n.view().state() == proto::IDLE);
  }
}

TEST_CASE("an assignment is carried out once, and an older one not at all") {
  auto n = running();
  n.reassign();
  n.assign();
  CHECK(n.done().empty());
  CHECK(n.policy.heartbeat().assignment_version() == 2);
  n.plan(0, {1});
  n.assignment.set_version(1);
  n.assign();
  CHECK(n.done().empty());
  CHECK(n.policy.heartbeat().assignment_version() == 2);
}

TEST_CASE("a worker with other actors is killed first and begins when it is gone") {
  auto n = running();
  auto kv = n.view().kv(0).generation();
  SECTION("while it runs") {}
  SECTION("while it starts") {
    n.die("node-0/worker-0#1");
    n.done();
  }
  auto incarnation = n.view().incarnation();
  auto process = fmt::format("node-0/worker-0#{}", incarnation);
  n.plan(0, {0, 1});
  n.reassign();
  CHECK(n.done() == steps{"kill " + process});
  n.say("node-0/worker-0", incarnation, proto::RUNNING); // before the signal came
  CHECK_FALSE(n.greet("node-0/worker-0", incarnation));
  CHECK(n.done().empty());
  n.die(process);
  auto next = fmt::format("node-0/worker-0#{}", incarnation + 1);
  CHECK(n.done()
        == steps{"memory of replica-0/stage-1", "start " + next, "report " + next + " STARTING"});
  CHECK(n.view().kv(0).generation() == kv); // stage 0 is still here
}

TEST_CASE("a change of mind while a worker is being replaced") {
  auto n = running();
  n.plan(0, {1});
  n.reassign();
  CHECK(n.done() == steps{"drop memory of replica-0/stage-0", "kill node-0/worker-0#1"});
  auto stages = GENERATE(std::vector<std::uint32_t>{}, std::vector<std::uint32_t>{0});
  n.plan(0, stages);
  n.reassign();
  CHECK(n.done() == steps{"kill node-0/worker-0#1"});
  n.die("node-0/worker-0#1");
  if (stages.empty()) {
    CHECK(n.done().empty());
    CHECK(n.view().state() == proto::IDLE);
    CHECK(n.view().pid() == 0);
  } else {
    CHECK(n.done()
          == steps{"memory of replica-0/stage-0", "start node-0/worker-0#2",
                   "report node-0/worker-0#2 STARTING"});
  }
}

TEST_CASE("memory that was dropped comes back under another generation") {
  auto n = running();
  auto before = n.view().kv(0).generation();
  n.plan(0, {});
  n.reassign();
  n.die("node-0/worker-0#1");
  n.plan(0, {0});
  n.reassign();
  CHECK(n.view().kv(0).generation() != before);
}

TEST_CASE("an actor that moves to another worker of the node keeps its memory") {
  node n;
  n.plan(0, {0});
  n.plan(1, {});
  n.assign();
  auto before = n.view(0).kv(0).generation();
  n.plan(0, {});
  n.plan(1, {0});
  n.done();
  n.reassign();
  CHECK(n.done()
        == steps{"kill node-0/worker-0#1", "start node-0/worker-1#1",
                 "report node-0/worker-1#1 STARTING"});
  CHECK(n.view(1).kv(0).generation() == before);
}

TEST_CASE("a worker without memory is given up; the others are not") {
  node n;
  n.assignment.mutable_plan()->set_standbys(1);
  n.plan(0, {0});
  n.refuse_memory = true;
  n.done();
  n.assign();
  CHECK(n.done()
        == steps{"refuse memory of replica-0/stage-0", "drop memory of replica-0/stage-0",
                 "report node-0/worker-0#0 FAILED", "start node-0/standby-0#1"});
  CHECK(n.last.cause() == "no memory");
  n.refuse_memory = false;
  n.plan(1, {1});
  n.reassign();
  CHECK(n.done()
        == steps{"memory of replica-0/stage-1", "start node-0/worker-1#1",
                 "report node-0/worker-1#1 STARTING"});
  CHECK(n.view(0).state() == proto::FAILED);
  n.carry_out(n.policy.memory_kept("node-0/worker-0")); // nobody waits for it
  CHECK(n.done().empty());
}

TEST_CASE("incarnations go on from the highest that anybody knows of") {
  SECTION("the controller's") {
    node n;
    n.plan(0, {0});
    n.assignment.mutable_known(0)->set_incarnation(41);
    n.assign();
    CHECK(n.view().incarnation() == 42);
    n.die("node-0/worker-0#42");
    n.assignment.mutable_known(0)->set_incarnation(7); // from an old journal
    n.reassign();
    CHECK(n.view().incarnation() == 43);
  }
  SECTION("those of a node that was restarted begin far above the ones before") {
    node n(3);
    n.plan(0, {0});
    n.assign();
    CHECK(n.view().incarnation() == 2 * node_policy::incarnations_of_a_node + 1);
  }
}

TEST_CASE("views go to connected workers, the newest only") {
  node n;
  n.plan(0, {0});
  n.assign();
  n.done();
  proto::ClusterView view;
  view.set_version(5);
  n.carry_out(n.policy.view_changed(view));
  CHECK(n.done().empty()); // it gets the view with its assignment
  n.run_worker();
  n.done();
  view.set_version(6);
  n.carry_out(n.policy.view_changed(view));
  CHECK(n.done() == steps{"view to node-0/worker-0#1"});
  n.carry_out(n.policy.view_changed(view));
  view.set_version(4);
  n.carry_out(n.policy.view_changed(view));
  CHECK(n.done().empty());
  CHECK(n.policy.view().version() == 6);
  CHECK(n.policy.heartbeat().view_version() == 6);
  n.die("node-0/worker-0#1");
  n.done();
  view.set_version(7);
  n.carry_out(n.policy.view_changed(view));
  CHECK(n.done().empty());
}

TEST_CASE("what happens without a controller is said in the next hello") {
  auto n = running(1);
  n.policy.disconnected();
  n.die("node-0/worker-0#1");
  n.make_ready("node-0/standby-1");
  n.die("node-0/standby-1#1");
  n.carry_out(n.policy.hello_wanted());
  CHECK(n.done()
        == steps{"assign node-0/standby-0#1 as node-0/worker-0#2 replica-0/stage-0",
                 "view to node-0/standby-0#1", "start node-0/standby-1#1",
                 "prepare node-0/standby-1#1"});
  n.carry_out(n.policy.connected());
  CHECK(n.done() == steps{"hello"});
  CHECK(n.hello.name() == "node-0");
  CHECK(n.hello.incarnation() == 1);
  REQUIRE(n.hello.workers_size() == 1);
  CHECK(n.hello.workers(0).state() == proto::STARTING);
  CHECK(n.hello.workers(0).incarnation() == 2);
}

TEST_CASE("a heartbeat counts hellos and changes, so that any that is lost is missed") {
  auto n = running();
  CHECK(n.policy.heartbeat().num_changes() == n.num_changes);
  CHECK(n.num_changes == 4); // a hello and three changes
  n.die("node-0/worker-0#1");
  CHECK(n.policy.heartbeat().num_changes() == 6);
  n.policy.disconnected();
  n.die("node-0/worker-0#2");
  CHECK(n.policy.heartbeat().num_changes() == 6);
  n.carry_out(n.policy.connected());
  CHECK(n.policy.heartbeat().num_changes() == 7);
  CHECK(n.hello.num_changes() == 7);
  n.carry_out(n.policy.hello_wanted());
  CHECK(n.policy.heartbeat().num_changes() == 8);
}
