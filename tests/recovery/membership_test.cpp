#include "troupe/recovery/membership.hpp"
#include "troupe/recovery/restart_policy.hpp"

#include <catch2/catch.hpp>

using namespace troupe;
using namespace std::chrono_literals;
using recovery::membership;

namespace {

const membership::time_point start = membership::time_point{} + 1h;

proto::ClusterPlan two_workers() {
  proto::ClusterPlan plan;
  plan.set_cluster("test");
  plan.set_num_replicas(1);
  for (int i = 0; i < 2; ++i) {
    auto* w = plan.add_workers();
    w->set_name("node-0/worker-" + std::to_string(i));
    w->set_node("node-0");
  }
  return plan;
}

proto::WorkerChanged change(const std::string& name, std::uint64_t incarnation,
                            proto::ProcessState state, const std::string& cause = {}) {
  proto::WorkerChanged result;
  result.mutable_worker()->mutable_plan()->set_name(name);
  result.mutable_worker()->set_incarnation(incarnation);
  result.mutable_worker()->set_state(state);
  result.mutable_worker()->set_port(1000);
  result.set_cause(cause);
  result.set_detect_ms(0.5);
  return result;
}

proto::NodeHello hello(std::uint64_t incarnation) {
  proto::NodeHello result;
  result.set_name("node-0");
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

membership running_cluster() {
  membership m(two_workers(), 1, 42);
  m.node_hello(hello(1), start);
  m.worker_changed(change("node-0/worker-0", 1, proto::RUNNING), start);
  m.worker_changed(change("node-0/worker-1", 1, proto::RUNNING), start);
  proto::FrontendHello frontend;
  frontend.mutable_frontend()->set_endpoint("http://here");
  m.frontend_hello(frontend);
  return m;
}

} // namespace

TEST_CASE("a node that says hello is given its assignment once") {
  membership m(two_workers(), 1, 42);
  auto effects = m.node_hello(hello(1), start);
  CHECK(effects.assign == std::vector<std::string>{"node-0"});
  CHECK(effects.view_changed);
  auto again = hello(1);
  *again.add_workers() = change("node-0/worker-0", 1, proto::RUNNING).worker();
  effects = m.node_hello(again, start);
  CHECK(effects.assign.empty());
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
  m.worker_changed(failed, start);
  CHECK(m.status().error().cause() == "the shard is truncated");
  CHECK_FALSE(m.status().ready());
}

TEST_CASE("a controller that restarted takes epoch, version and workers from those who remember") {
  membership m(two_workers(), 2, 43);
  auto back = hello(1);
  back.set_epoch(7);
  back.set_view_version(20);
  *back.add_workers() = change("node-0/worker-0", 3, proto::RUNNING).worker();
  *back.add_workers() = change("node-0/worker-1", 1, proto::RUNNING).worker();
  auto effects = m.node_hello(back, start);
  CHECK(effects.assign.empty());
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

TEST_CASE("a worker given up while nobody could be told is lost and named all the same") {
  auto m = running_cluster();
  auto back = hello(1);
  *back.add_workers() = change("node-0/worker-0", 1, proto::FAILED).worker();
  back.mutable_workers(0)->mutable_error()->set_code(40);
  back.mutable_workers(0)->mutable_error()->set_cause("it died too often");
  m.node_hello(back, start);
  CHECK(m.view().epoch() == 2);
  CHECK(m.view().workers(0).state() == proto::FAILED);
  CHECK(m.status().error().cause() == "it died too often");
}

TEST_CASE("a node process that died took its workers with it") {
  auto m = running_cluster();
  m.node_hello(hello(2), start);
  CHECK(m.view().epoch() == 3);
  CHECK(m.view().workers(0).state() == proto::LOST);
  CHECK(m.view().workers(1).state() == proto::LOST);
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
