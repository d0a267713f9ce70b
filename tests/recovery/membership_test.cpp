#include "troupe/recovery/membership.hpp"
#include "troupe/recovery/restart_policy.hpp"

#include <catch2/catch.hpp>

using namespace troupe;
using namespace std::chrono_literals;
using recovery::membership;

namespace {

const membership::time_point start = membership::time_point{} + 1h;

proto::ActorPlan stage(std::uint32_t index) {
  proto::ActorPlan actor;
  actor.set_id("replica-0/stage-" + std::to_string(index));
  actor.set_kind(proto::STAGE);
  actor.set_index(index);
  return actor;
}

proto::ClusterPlan two_workers() {
  proto::ClusterPlan plan;
  plan.set_cluster("test");
  plan.set_num_replicas(1);
  plan.set_heartbeat_ms(100);
  plan.set_hang_ms(800);
  plan.set_node_grace_ms(500);
  plan.set_suspicion(8);
  for (std::uint32_t i = 0; i < 2; ++i) {
    auto* w = plan.add_workers();
    w->set_name("node-0/worker-" + std::to_string(i));
    w->set_node("node-0");
    *w->add_actors() = stage(i);
  }
  return plan;
}

proto::WorkerChanged change(const std::string& name, std::uint64_t incarnation,
                            proto::ProcessState state, const std::string& cause = {}) {
  proto::WorkerChanged result;
  auto* plan = result.mutable_worker()->mutable_plan();
  plan->set_name(name);
  plan->set_node(name.substr(0, name.find('/')));
  *plan->add_actors() = stage(name.back() - '0');
  result.mutable_worker()->set_incarnation(incarnation);
  result.mutable_worker()->set_state(state);
  result.mutable_worker()->set_port(1000);
  result.set_cause(cause);
  result.set_detect_ms(0.5);
  return result;
}

proto::NodeHello hello(std::uint64_t incarnation, const std::string& name = "node-0") {
  proto::NodeHello result;
  result.set_name(name);
  result.set_incarnation(incarnation);
  return result;
}

proto::ReplayReport replay(std::uint64_t epoch, proto::RecoveryPhase phase,
                           std::uint32_t requests = 0, std::uint32_t tokens = 0) {
  proto::ReplayReport result;
  result.set_epoch(epoch);
  result.set_phase(phase);
  result.set_requests(requests);
  result.set_tokens_replayed(tokens);
  return result;
}

/// One copy each of the only expert group on two nodes.
proto::ClusterPlan two_copies() {
  auto plan = two_workers();
  plan.clear_workers();
  for (std::uint32_t i = 0; i < 2; ++i) {
    auto* w = plan.add_workers();
    w->set_node("node-" + std::to_string(i));
    w->set_name(w->node() + "/worker-0");
    auto* a = w->add_actors();
    a->set_id("expert-group-0/copy-" + std::to_string(i));
    a->set_kind(proto::EXPERT_GROUP);
    a->set_copy(i);
  }
  return plan;
}

proto::WorkerChanged copy_change(const std::string& name, std::uint64_t incarnation,
                                 proto::ProcessState state) {
  auto result = change(name, incarnation, state, "killed by signal 9");
  auto* plan = result.mutable_worker()->mutable_plan();
  plan->clear_actors();
  plan->add_actors()->set_id("expert-group-0/copy-" + std::string(1, name[5]));
  plan->mutable_actors(0)->set_kind(proto::EXPERT_GROUP);
  return result;
}

/// A stage on each of two nodes; `spares` more devices on the first.
proto::ClusterPlan two_nodes(std::uint32_t spares) {
  auto plan = two_workers();
  plan.clear_workers();
  auto add = [&](const std::string& node, std::uint32_t device) {
    auto* w = plan.add_workers();
    w->set_node(node);
    w->set_name(node + "/worker-" + std::to_string(device));
    return w;
  };
  *add("node-0", 0)->add_actors() = stage(0);
  for (std::uint32_t i = 0; i < spares; ++i)
    add("node-0", i + 1);
  *add("node-1", 0)->add_actors() = stage(1);
  for (auto& w : *plan.mutable_workers())
    for (auto& a : *w.mutable_actors())
      a.set_weight_bytes(600);
  return plan;
}

proto::WorkerChanged on_node_1(std::uint64_t incarnation, proto::ProcessState state) {
  auto result = change("node-1/worker-0", incarnation, state);
  *result.mutable_worker()->mutable_plan()->mutable_actors(0) = stage(1);
  return result;
}

membership two_nodes_running(std::uint32_t spares) {
  membership m(two_nodes(spares), 1, 42);
  m.node_hello(hello(1), start);
  m.node_hello(hello(1, "node-1"), start);
  m.worker_changed(change("node-0/worker-0", 1, proto::RUNNING), start);
  m.worker_changed(on_node_1(1, proto::RUNNING), start);
  proto::FrontendHello frontend;
  frontend.mutable_frontend()->set_endpoint("http://here");
  m.frontend_hello(frontend, start);
  return m;
}

/// Heartbeats of the named nodes every 100 ms, `count` times, and a tick after each.
membership::effects beat_until(membership& m, const std::string& name, int count,
                               membership::time_point from = start, const std::string& other = {}) {
  membership::effects all;
  for (int i = 1; i <= count; ++i) {
    for (const auto& node : {name, other}) {
      proto::NodeHeartbeat beat;
      for (const auto& known : m.view().nodes())
        if (known.name() == node)
          beat.set_incarnation(known.incarnation());
      beat.set_name(node);
      beat.set_view_version(m.view().version());
      proto::NodeHeartbeat answer;
      if (!node.empty())
        all |= m.node_heartbeat(beat, from + i * 100ms, answer);
    }
    all |= m.tick(from + i * 100ms);
  }
  return all;
}

const proto::WorkerView* holder_of(const membership& m, const std::string& actor) {
  const proto::WorkerView* found = nullptr;
  for (const auto& w : m.view().workers())
    for (const auto& a : w.plan().actors())
      if (a.id() == actor) {
        CHECK(found == nullptr); // never two owners
        found = &w;
      }
  return found;
}

proto::ProcessState node_state(const membership& m, const std::string& name) {
  for (const auto& n : m.view().nodes())
    if (n.name() == name)
      return n.state();
  return proto::PROCESS_STATE_UNKNOWN;
}

membership running_cluster() {
  membership m(two_workers(), 1, 42);
  m.node_hello(hello(1), start);
  m.worker_changed(change("node-0/worker-0", 1, proto::RUNNING), start);
  m.worker_changed(change("node-0/worker-1", 1, proto::RUNNING), start);
  proto::FrontendHello frontend;
  frontend.mutable_frontend()->set_endpoint("http://here");
  m.frontend_hello(frontend, start);
  return m;
}

} // namespace

TEST_CASE("a node that says hello is given its assignment, and what runs is taken as it is") {
  membership m(two_workers(), 1, 42);
  auto effects = m.node_hello(hello(1), start);
  CHECK(effects.assign == std::set<std::string>{"node-0"});
  CHECK(effects.view_changed);
  CHECK(m.assignment_for("node-0").known_size() == 2);
  CHECK(m.assignment_for("node-0").known(1).plan().actors(0).id() == "replica-0/stage-1");
  auto again = hello(1);
  *again.add_workers() = change("node-0/worker-0", 1, proto::RUNNING).worker();
  m.node_hello(again, start);
  CHECK(m.view().workers(0).state() == proto::RUNNING);
}

TEST_CASE("the cluster is ready when every worker runs and a frontend is there") {
  auto m = running_cluster();
  CHECK(m.status().ready());
  CHECK(m.view().epoch() == 1);
  m.worker_changed(change("node-0/worker-1", 1, proto::LOST, "killed by signal 9"), start);
  CHECK_FALSE(m.status().ready());
}

TEST_CASE("a lost worker raises the epoch and its recovery is followed to the first token") {
  auto m = running_cluster();
  auto version = m.view().version();
  auto effects =
    m.worker_changed(change("node-0/worker-0", 1, proto::LOST, "killed by signal 9"), start);
  CHECK(effects.view_changed);
  CHECK(m.view().epoch() == 2);
  CHECK(m.view().version() == version + 1);
  CHECK(m.view().workers(0).port() == 0);
  CHECK(m.status().recoveries(0).phase() == proto::RESTORING);

  m.worker_changed(change("node-0/worker-0", 2, proto::STARTING), start + 5ms);
  m.worker_changed(change("node-0/worker-0", 2, proto::RUNNING), start + 100ms);
  CHECK(m.view().epoch() == 2);
  CHECK(m.status().recoveries(0).phase() == proto::REPLAYING);
  m.replay(replay(2, proto::REPLAYING, 3, 12), start + 101ms);
  m.replay(replay(1, proto::SERVING), start + 102ms); // of the epoch before: says nothing
  CHECK(m.status().recoveries(0).phase() == proto::REPLAYING);
  m.replay(replay(2, proto::SERVING), start + 110ms);

  auto status = m.status();
  REQUIRE(status.recoveries_size() == 1);
  const auto& record = status.recoveries(0);
  CHECK(record.phase() == proto::SERVING);
  CHECK(record.cause() == "node-0/worker-0: killed by signal 9");
  CHECK(record.epoch() == 2);
  CHECK(record.requests() == 3);
  CHECK(record.tokens_replayed() == 12);
  CHECK(record.restore_ms() == Approx(100.5));
  CHECK(record.first_token_ms() == Approx(110.5));
  CHECK(status.ready());
}

TEST_CASE("a second death during a recovery is a recovery of its own") {
  auto m = running_cluster();
  m.worker_changed(change("node-0/worker-0", 1, proto::LOST, "killed by signal 9"), start);
  m.worker_changed(change("node-0/worker-1", 1, proto::LOST, "killed by signal 11"), start + 10ms);
  CHECK(m.view().epoch() == 3);
  m.worker_changed(change("node-0/worker-0", 2, proto::RUNNING), start + 50ms);
  m.worker_changed(change("node-0/worker-1", 2, proto::RUNNING), start + 60ms);
  m.replay(replay(3, proto::SERVING), start + 70ms);
  auto status = m.status();
  REQUIRE(status.recoveries_size() == 2);
  CHECK(status.recoveries(0).phase() == proto::SERVING);
  CHECK(status.recoveries(1).phase() == proto::SERVING);
}

TEST_CASE("a worker that dies before it served raises no epoch") {
  membership m(two_workers(), 1, 42);
  m.node_hello(hello(1), start);
  m.worker_changed(change("node-0/worker-0", 1, proto::LOADING), start);
  m.worker_changed(change("node-0/worker-0", 1, proto::LOST, "exited with code 1"), start);
  CHECK(m.view().epoch() == 1);
  CHECK(m.status().recoveries_size() == 0);
}

TEST_CASE("reports of an earlier incarnation change nothing") {
  auto m = running_cluster();
  m.worker_changed(change("node-0/worker-0", 1, proto::LOST, "killed by signal 9"), start);
  m.worker_changed(change("node-0/worker-0", 2, proto::RUNNING), start);
  auto version = m.view().version();
  auto effects = m.worker_changed(change("node-0/worker-0", 1, proto::LOST, "late"), start);
  CHECK_FALSE(effects.view_changed);
  CHECK(m.view().version() == version);
  CHECK(m.view().workers(0).state() == proto::RUNNING);
}

TEST_CASE("a worker that is given up says why in the status") {
  membership m(two_workers(), 1, 42);
  auto failed = change("node-0/worker-0", 1, proto::FAILED);
  failed.mutable_worker()->mutable_error()->set_code(61);
  failed.mutable_worker()->mutable_error()->set_cause("the shard is truncated");
  m.node_hello(hello(1), start);
  m.worker_changed(failed, start);
  CHECK(m.view().workers(0).state() == proto::FAILED);
  CHECK(m.status().error().cause() == "the shard is truncated");
  CHECK_FALSE(m.status().ready());
}

TEST_CASE("a controller that restarted takes epoch, version and workers from those who remember") {
  membership m(two_workers(), 2, 43);
  auto back = hello(1);
  back.mutable_view()->set_epoch(7);
  back.mutable_view()->set_version(20);
  *back.add_workers() = change("node-0/worker-0", 3, proto::RUNNING).worker();
  *back.add_workers() = change("node-0/worker-1", 1, proto::RUNNING).worker();
  m.node_hello(back, start);
  CHECK(m.view().epoch() == 7);
  CHECK(m.view().version() > 20);
  CHECK(m.view().workers(0).incarnation() == 3);
  m.worker_changed(change("node-0/worker-0", 3, proto::LOST, "killed by signal 9"), start);
  CHECK(m.view().epoch() == 8);
}

TEST_CASE("a death that could not be told is found when the node says hello again") {
  auto m = running_cluster();
  auto back = hello(1);
  *back.add_workers() = change("node-0/worker-0", 2, proto::RUNNING).worker();
  *back.add_workers() = change("node-0/worker-1", 1, proto::RUNNING).worker();
  m.node_hello(back, start);
  CHECK(m.view().epoch() == 2);
  auto status = m.status();
  REQUIRE(status.recoveries_size() == 1);
  CHECK(status.recoveries(0).cause().find("node-0/worker-0: ") == 0);
  CHECK(status.recoveries(0).phase() == proto::REPLAYING);
  CHECK(status.ready());
}

TEST_CASE("a node process that died took its workers with it: one recovery for all of them") {
  auto m = running_cluster();
  m.node_disconnected("node-0", start);
  m.node_hello(hello(2), start + 100ms);
  CHECK(m.view().epoch() == 2);
  CHECK(m.view().workers(0).state() == proto::LOST);
  CHECK(m.view().workers(1).state() == proto::LOST);
  m.worker_changed(change("node-0/worker-0", 2, proto::RUNNING), start + 200ms);
  CHECK(m.status().recoveries(0).phase() == proto::RESTORING);
  m.worker_changed(change("node-0/worker-1", 2, proto::RUNNING), start + 250ms);
  m.replay(replay(2, proto::SERVING), start + 300ms);
  const auto record = m.status().recoveries(0);
  CHECK(record.level() == "node");
  CHECK(record.cause() == "node-0: its process died");
  CHECK(record.phase() == proto::SERVING);
  CHECK(record.restore_ms() == Approx(250)); // from the broken connection on
}

TEST_CASE("a covered loss interrupts nobody") {
  membership m(two_copies(), 1, 42);
  m.node_hello(hello(1), start);
  m.node_hello(hello(1, "node-1"), start);
  for (const char* name : {"node-0/worker-0", "node-1/worker-0"})
    m.worker_changed(copy_change(name, 1, proto::RUNNING), start);
  CHECK(
    m.worker_changed(copy_change("node-0/worker-0", 1, proto::LOST), start + 10ms).view_changed);
  CHECK(m.status().recoveries(0).phase() == proto::RESTORING);
  m.replay(replay(1, proto::SERVING), start + 20ms); // of another recovery
  CHECK(m.status().recoveries(0).phase() == proto::RESTORING);
  m.worker_changed(copy_change("node-0/worker-0", 2, proto::RUNNING), start + 500ms);
  const auto record = m.status().recoveries(0);
  CHECK(record.phase() == proto::SERVING);
  CHECK(record.restored_by() == "replica");
  CHECK(record.restore_ms() > 400);
  CHECK(m.view().epoch() == 1); // neither going nor coming back
}

TEST_CASE("the loss of the last copy interrupts, whatever became of the others") {
  membership m(two_copies(), 1, 42);
  m.node_hello(hello(1), start);
  m.node_hello(hello(1, "node-1"), start);
  for (const char* name : {"node-0/worker-0", "node-1/worker-0"})
    m.worker_changed(copy_change(name, 1, proto::RUNNING), start);
  m.worker_changed(copy_change("node-0/worker-0", 1, proto::LOST), start + 10ms);
  m.worker_changed(copy_change("node-1/worker-0", 1, proto::LOST), start + 20ms);
  CHECK(m.view().epoch() == 2);
  m.worker_changed(copy_change("node-0/worker-0", 2, proto::RUNNING), start + 30ms);
  CHECK(m.status().recoveries(0).phase() == proto::SERVING);
  m.worker_changed(copy_change("node-1/worker-0", 2, proto::RUNNING), start + 40ms);
  CHECK(m.status().recoveries(1).phase() == proto::REPLAYING);
  m.replay(replay(2, proto::SERVING), start + 50ms);
  CHECK(m.status().recoveries(1).phase() == proto::SERVING);
  CHECK(m.view().epoch() == 2);
}

TEST_CASE("the actors of a silent node move to a spare device") {
  auto m = two_nodes_running(1);
  auto epoch = m.view().epoch();
  auto effects = beat_until(m, "node-0", 60); // node-1 is silent
  CHECK(m.view().epoch() == epoch + 1);
  CHECK(effects.assign.count("node-0") == 1);
  const auto* holder = holder_of(m, "replica-0/stage-1");
  REQUIRE(holder != nullptr);
  CHECK(holder->plan().name() == "node-0/worker-1");
  CHECK(holder->state() == proto::STARTING);
  CHECK(node_state(m, "node-1") == proto::FAILED);
  CHECK(m.assignment_for("node-1").known(0).plan().actors_size() == 0);
  const auto record = m.status().recoveries(0);
  CHECK(record.detected_by() == "heartbeat");
  CHECK(record.cause().find("node-1: no heartbeat for ") == 0);
  CHECK(record.restored_by() == "move");
}

TEST_CASE("without a spare they are packed, and go home when the node is back to stay") {
  auto m = two_nodes_running(0);
  m.node_disconnected("node-1", start);
  beat_until(m, "node-0", 10);
  const auto* holder = holder_of(m, "replica-0/stage-1");
  REQUIRE(holder->plan().name() == "node-0/worker-0");
  REQUIRE(holder->plan().actors_size() == 2);
  CHECK(holder->port() == 0); // its process is replaced
  auto both = change("node-0/worker-0", 2, proto::RUNNING);
  *both.mutable_worker()->mutable_plan()->add_actors() = stage(1);
  m.worker_changed(both, start + 2s);
  m.replay(replay(m.view().epoch(), proto::SERVING), start + 2s);
  CHECK(m.status().recoveries(0).phase() == proto::SERVING);
  CHECK(m.status().ready());

  auto back = hello(2, "node-1");
  m.node_hello(back, start + 3s);
  CHECK(node_state(m, "node-1") == proto::RUNNING);
  CHECK(holder_of(m, "replica-0/stage-1")->plan().name() == "node-0/worker-0");
  auto epoch = m.view().epoch();
  CHECK(beat_until(m, "node-0", 15, start + 3s, "node-1").assign.empty());
  CHECK(m.view().epoch() == epoch);
  auto effects = beat_until(m, "node-0", 10, start + 4500ms, "node-1");
  CHECK(effects.assign == std::set<std::string>{"node-0", "node-1"});
  CHECK(holder_of(m, "replica-0/stage-1")->plan().name() == "node-1/worker-0");
  CHECK(m.view().epoch() == epoch + 1);
}

TEST_CASE("a node whose actors fit nowhere else is waited for") {
  membership m(two_nodes(0), 1, 42);
  auto small = hello(1);
  small.set_memory_bytes(1000);
  m.node_hello(small, start);
  m.node_hello(hello(1, "node-1"), start);
  m.worker_changed(change("node-0/worker-0", 1, proto::RUNNING), start);
  m.worker_changed(on_node_1(1, proto::RUNNING), start);
  m.node_disconnected("node-1", start);
  beat_until(m, "node-0", 30);
  CHECK(m.view().epoch() == 1);
  CHECK(node_state(m, "node-1") == proto::LOST);
  CHECK(holder_of(m, "replica-0/stage-1")->plan().name() == "node-1/worker-0");
  // Its workers never stopped.
  CHECK(holder_of(m, "replica-0/stage-1")->state() == proto::RUNNING);
}

TEST_CASE("a node whose actors fit on no GPU that is left is waited for") {
  const auto lose_node_1 = [](std::uint64_t bytes_of_node_0) {
    auto plan = two_nodes(0);
    for (auto& worker : *plan.mutable_workers()) {
      worker.set_device("cuda:0");
      worker.mutable_actors(0)->set_device_bytes(600);
    }
    membership m(plan, 1, 42);
    m.node_hello(hello(1), start);
    m.node_hello(hello(1, "node-1"), start);
    m.worker_changed(change("node-0/worker-0", 1, proto::RUNNING), start);
    m.worker_changed(on_node_1(1, proto::RUNNING), start);
    proto::NodeHeartbeat beat;
    beat.set_name("node-0");
    beat.set_incarnation(1);
    auto* gpu = beat.mutable_devices()->add_gpus();
    gpu->set_device("cuda:0");
    gpu->set_memory_total_bytes(bytes_of_node_0);
    proto::NodeHeartbeat answer;
    const auto version = m.view().version();
    CHECK(m.node_heartbeat(beat, start, answer).view_changed);
    CHECK(m.view().version() == version + 1);
    CHECK_FALSE(m.node_heartbeat(beat, start, answer).view_changed); // no news the second time
    CHECK(m.view().version() == version + 1);
    m.node_disconnected("node-1", start);
    beat_until(m, "node-0", 30);
    CHECK(m.status().error().code() == 0);
    return holder_of(m, "replica-0/stage-1")->plan().name();
  };
  CHECK(lose_node_1(1400) == "node-0/worker-0");
  CHECK(lose_node_1(1300) == "node-1/worker-0");
}

TEST_CASE(
  "a node that was taken for dead is told what it is to run now, and its reports count no more") {
  auto m = two_nodes_running(1);
  beat_until(m, "node-0", 60);
  auto version = m.view().version();
  m.worker_changed(on_node_1(1, proto::RUNNING), start + 7s);
  CHECK(m.view().version() == version);
  proto::NodeHeartbeat beat;
  beat.set_name("node-1");
  beat.set_incarnation(1);
  proto::NodeHeartbeat answer;
  m.node_heartbeat(beat, start + 7s, answer);
  CHECK(answer.say_hello());
  auto back = hello(1, "node-1");
  *back.add_workers() = on_node_1(1, proto::RUNNING).worker();
  auto effects = m.node_hello(back, start + 7s);
  CHECK(effects.assign.count("node-1") == 1);
  CHECK(holder_of(m, "replica-0/stage-1")->plan().name() == "node-0/worker-1");
  CHECK(m.assignment_for("node-1").known(0).plan().actors_size() == 0);
}

TEST_CASE("a controller that was away gives up a node that does not come back") {
  auto m = two_nodes_running(1);
  membership next(two_nodes(1), 2, 43);
  next.restore(m.state(), start + 1s);
  CHECK(next.view().epoch() == 1);
  auto back = hello(1);
  *back.mutable_view() = m.view();
  *back.add_workers() = change("node-0/worker-0", 1, proto::RUNNING).worker();
  next.node_hello(back, start + 1200ms);
  beat_until(next, "node-0", 40, start + 1200ms);
  CHECK(next.view().epoch() == 2);
  CHECK(holder_of(next, "replica-0/stage-1")->plan().name() == "node-0/worker-1");
}

TEST_CASE("a controller with an old journal learns of moves from those who saw them") {
  auto m = two_nodes_running(1);
  auto old = m.state();
  beat_until(m, "node-0", 60);
  membership next(two_nodes(1), 2, 43);
  next.restore(old, start + 10s);
  CHECK(holder_of(next, "replica-0/stage-1")->plan().name() == "node-1/worker-0");
  auto back = hello(1);
  *back.mutable_view() = m.view();
  next.node_hello(back, start + 10s);
  CHECK(next.view().epoch() == m.view().epoch());
  CHECK(holder_of(next, "replica-0/stage-1")->plan().name() == "node-0/worker-1");
}

TEST_CASE("how a worker is says its node, not what others remember of it") {
  auto old = two_nodes_running(0);
  membership m(two_nodes(0), 2, 43); // without a journal
  m.node_hello(hello(2, "node-1"), start);
  m.worker_changed(on_node_1(1, proto::RUNNING), start);
  auto late = hello(1, "node-0");
  *late.mutable_view() = old.view();
  for (auto& w : *late.mutable_view()->mutable_workers())
    w.set_state(proto::LOADING);
  m.node_hello(late, start + 1s);
  CHECK(holder_of(m, "replica-0/stage-1")->state() == proto::RUNNING);
  CHECK(m.view().version() > old.view().version());
}

TEST_CASE("what a worker is to run says the newest view, also when it was told otherwise") {
  auto old = two_nodes_running(1);
  old.node_disconnected("node-1", start);
  beat_until(old, "node-0", 10);
  REQUIRE(holder_of(old, "replica-0/stage-1")->plan().name() == "node-0/worker-1");
  membership m(two_nodes(1), 2, 43);
  m.node_hello(hello(2, "node-1"), start + 2s); // is told to run its stage again
  m.worker_changed(on_node_1(9, proto::RUNNING), start + 2s);
  auto before = m.view().epoch();
  auto late = hello(1, "node-0");
  *late.mutable_view() = old.view();
  auto effects = m.node_hello(late, start + 3s);
  CHECK(effects.assign.count("node-1") == 1);
  CHECK(m.view().epoch() > std::max(before, old.view().epoch()));
  int num_owners = 0;
  for (const auto& w : m.view().workers())
    for (const auto& a : w.plan().actors())
      num_owners += a.id() == "replica-0/stage-1" ? 1 : 0;
  CHECK(num_owners == 1);
  CHECK(holder_of(m, "replica-0/stage-1")->plan().name() == "node-0/worker-1");
}

TEST_CASE("an epoch never falls, whoever remembers it") {
  auto m = two_nodes_running(0);
  proto::FrontendHello frontend;
  frontend.mutable_view()->set_epoch(m.view().epoch() + 7); // an older version of it, though
  auto effects = m.frontend_hello(frontend, start);
  CHECK(effects.view_changed);
  CHECK(m.view().epoch() == frontend.view().epoch());
}

TEST_CASE("the assignments of a later controller count more than those of the one before") {
  auto m = two_nodes_running(1);
  beat_until(m, "node-0", 60);
  auto before = m.assignment_for("node-0").version();
  CHECK(before > 0);
  membership next(two_nodes(1), 2, 43);
  auto back = hello(1);
  *back.mutable_view() = m.view();
  next.node_hello(back, start + 10s);
  CHECK(next.assignment_for("node-0").version() > before);
}

TEST_CASE("a controller that hears nobody is itself cut off, and that time counts against nobody") {
  auto m = two_nodes_running(1);
  beat_until(m, "node-0", 5, start, "node-1");
  for (int i = 6; i < 100; ++i)
    CHECK_FALSE(m.tick(start + i * 100ms).view_changed);
  // The way is free again. Whoever is heard a little later than the first one was not silent.
  m.frontend_heartbeat(start + 10s);
  for (int i = 100; i < 104; ++i) {
    m.frontend_heartbeat(start + i * 100ms);
    CHECK_FALSE(m.tick(start + i * 100ms).view_changed);
  }
  proto::NodeHeartbeat answer;
  proto::NodeHeartbeat beat;
  beat.set_name("node-0");
  beat.set_incarnation(1);
  m.node_heartbeat(beat, start + 10400ms, answer);
  // But one that stays silent from here on is lost, and the other is not.
  for (int i = 104; i < 125; ++i) {
    m.frontend_heartbeat(start + i * 100ms);
    m.node_heartbeat(beat, start + i * 100ms, answer);
    m.tick(start + i * 100ms);
  }
  CHECK(m.view().epoch() == 2);
  for (const auto& node : m.view().nodes())
    CHECK((node.state() == proto::RUNNING) == (node.name() == "node-0"));
}

TEST_CASE("time in which the controller did not run makes nobody suspicious") {
  auto m = two_nodes_running(1);
  beat_until(m, "node-0", 5, start, "node-1");
  auto effects = m.tick(start + 20s, 19s);
  CHECK_FALSE(effects.view_changed);
  CHECK(m.view().epoch() == 1);
}

TEST_CASE("what a heartbeat shows to be missed is asked for, but not at the first sight of it") {
  auto m = running_cluster();
  proto::NodeHeartbeat beat;
  beat.set_name("node-0");
  beat.set_incarnation(1);
  beat.set_view_version(m.view().version());
  beat.set_assignment_version(m.assignment_for("node-0").version());
  beat.set_num_changes(2); // as many as were heard
  proto::NodeHeartbeat answer;
  for (int i = 0; i < 5; ++i)
    m.node_heartbeat(beat, start, answer);
  CHECK_FALSE(answer.say_hello());
  beat.set_num_changes(3);
  m.node_heartbeat(beat, start, answer);
  CHECK_FALSE(answer.say_hello());
  m.node_heartbeat(beat, start, answer);
  m.node_heartbeat(beat, start, answer);
  CHECK(answer.say_hello());

  // A hello counts too: one that is lost, with changes before and after it, is missed.
  proto::NodeHello hello;
  hello.set_name("node-0");
  hello.set_incarnation(1);
  hello.set_num_changes(4);
  m.node_hello(hello, start);
  beat.set_view_version(m.view().version());
  beat.set_assignment_version(m.assignment_for("node-0").version());
  beat.set_num_changes(4);
  answer.Clear();
  for (int i = 0; i < 5; ++i)
    m.node_heartbeat(beat, start, answer);
  CHECK_FALSE(answer.say_hello());
  beat.set_num_changes(8);
  for (int i = 0; i < 3; ++i)
    m.node_heartbeat(beat, start, answer);
  CHECK(answer.say_hello());
}

TEST_CASE("readings of GPUs are in the status as long as they are fresh, and in no view") {
  membership members(two_nodes(0), 1, 7);
  proto::NodeHeartbeat answer;
  const auto beat = [&](const std::string& node, std::uint64_t incarnation, bool with_readings,
                        membership::time_point now) {
    proto::NodeHeartbeat heartbeat;
    heartbeat.set_name(node);
    heartbeat.set_incarnation(incarnation);
    if (with_readings)
      heartbeat.mutable_devices()->add_gpus()->set_device("cuda:0");
    return members.node_heartbeat(heartbeat, now, answer);
  };
  const auto nodes_with_readings = [&] {
    std::string names;
    const auto status = members.status();
    for (const auto& report : status.devices())
      names += report.node() + " ";
    return names;
  };
  members.node_hello(hello(5, "node-0"), start);
  members.node_hello(hello(5, "node-1"), start);
  CHECK(nodes_with_readings().empty());
  const auto version = members.view().version();
  CHECK_FALSE(beat("node-0", 5, true, start).view_changed);
  beat("node-1", 5, true, start + 1s);
  beat("node-1", 4, true, start + 1s); // of a process before: not taken for this one's
  CHECK(members.view().version() == version);
  CHECK(nodes_with_readings() == "node-0 node-1 ");
  REQUIRE(members.status().devices(0).gpus_size() == 1);
  CHECK(members.status().devices(0).gpus(0).device() == "cuda:0");
  CHECK(members.state().SerializeAsString().find("cuda:0") == std::string::npos);

  auto now = start;
  const auto pass = [&](std::chrono::milliseconds time, bool with_readings) {
    for (const auto end = now + time; now < end; now += 100ms) {
      beat("node-0", 5, with_readings, now);
      beat("node-1", 5, false, now);
      members.tick(now);
    }
  };
  pass(5500ms, true);
  CHECK(nodes_with_readings() == "node-0 node-1 ");
  pass(1000ms, true);
  CHECK(nodes_with_readings() == "node-0 "); // those of the other are too old
  members.node_disconnected("node-0", now);
  CHECK(nodes_with_readings().empty());
  members.node_hello(hello(5, "node-0"), now);
  CHECK(nodes_with_readings() == "node-0 ");
  members.node_hello(hello(6, "node-0"), now); // another process, with other keepers
  CHECK(nodes_with_readings().empty());
}

TEST_CASE("the actors of a worker that died too often move, as far as there is room") {
  auto m = two_nodes_running(1);
  auto failed = change("node-0/worker-0", 6, proto::FAILED);
  failed.mutable_worker()->mutable_error()->set_code(40);
  failed.mutable_worker()->mutable_error()->set_cause("it died too often");
  auto effects = m.worker_changed(failed, start);
  CHECK(effects.assign.count("node-0") == 1);
  CHECK(holder_of(m, "replica-0/stage-0")->plan().name() == "node-0/worker-1");
  CHECK(m.status().error().code() == 0);
  CHECK(m.status().warnings(0) == "it died too often");
}

TEST_CASE("a state made for another plan is not taken over") {
  auto m = two_nodes_running(1);
  membership other(two_nodes(0), 2, 43);
  other.restore(m.state(), start);
  CHECK(other.view().version() == 1);
}

TEST_CASE("restarts are bounded within their period") {
  recovery::restart_policy policy(3, 10s);
  CHECK(policy.allow(start));
  CHECK(policy.allow(start + 1s));
  CHECK(policy.allow(start + 2s));
  CHECK_FALSE(policy.allow(start + 9s));
  CHECK(policy.allow(start + 10s)); // the first is out of the period
  CHECK_FALSE(policy.allow(start + 10s));
}
