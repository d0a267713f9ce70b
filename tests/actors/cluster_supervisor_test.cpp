#include "deterministic.hpp"

#include "troupe/actors/cluster_supervisor.hpp"

#include <catch2/catch.hpp>

#include <memory>
#include <vector>

using namespace troupe;
using namespace troupe::messages;

namespace {

proto::ActorPlan stage_0() {
  proto::ActorPlan actor;
  actor.set_id("replica-0/stage-0");
  actor.set_kind(proto::STAGE);
  return actor;
}

proto::ClusterPlan one_worker() {
  proto::ClusterPlan plan;
  plan.set_cluster("test");
  plan.set_num_replicas(1);
  plan.set_heartbeat_ms(100);
  plan.set_hang_ms(800);
  plan.set_node_grace_ms(500);
  auto* w = plan.add_workers();
  w->set_name("node-0/worker-0");
  w->set_node("node-0");
  *w->add_actors() = stage_0();
  return plan;
}

/// What a fake node or frontend has heard.
struct heard {
  std::vector<proto::ClusterView> views;
  std::vector<proto::ClusterPlan> plans;
  std::vector<proto::NodeHeartbeat> answers;
};

node_supervisor_actor::behavior_type fake_node(node_supervisor_actor::pointer,
                                               std::shared_ptr<heard> h) {
  return {[h](const node_assignment& a) { h->plans.push_back(a->plan()); },
          [h](const cluster_view& v) { h->views.push_back(v.body); },
          [h](const node_heartbeat& a) { h->answers.push_back(a.body); },
          [](const worker_hello&) {}, [](const worker_report&) {}};
}

frontend_actor::behavior_type fake_frontend(frontend_actor::pointer, std::shared_ptr<heard> h) {
  return {[h](const cluster_plan& p) { h->plans.push_back(p.body); },
          [h](const cluster_view& v) { h->views.push_back(v.body); },
          [](const frontend_heartbeat&) {}};
}

struct fixture : test::deterministic_system {
  std::shared_ptr<heard> at_node = std::make_shared<heard>();
  std::shared_ptr<heard> at_frontend = std::make_shared<heard>();
  cluster_supervisor_actor supervisor = caf::actor_cast<cluster_supervisor_actor>(
    system.spawn<actors::cluster_supervisor>(recovery::membership(one_worker(), 1, 7)));
  node_supervisor_actor node = system.spawn(fake_node, at_node);
  frontend_actor frontend = system.spawn(fake_frontend, at_frontend);

  ~fixture() {
    caf::anon_send_exit(supervisor, caf::exit_reason::user_shutdown);
    caf::anon_send_exit(node, caf::exit_reason::user_shutdown);
    caf::anon_send_exit(frontend, caf::exit_reason::user_shutdown);
    run();
  }

  /// Delivers a message as if `sender` had sent it.
  template <class Sender, class Message>
  void tell(const Sender& sender, Message message) {
    supervisor->enqueue(caf::actor_cast<caf::strong_actor_ptr>(sender), caf::make_message_id(),
                        caf::make_message(std::move(message)), nullptr);
    run();
  }

  void node_says_hello() {
    proto::NodeHello hello;
    hello.set_name("node-0");
    hello.set_incarnation(1);
    tell(node, node_hello{hello});
  }

  void worker_is(proto::ProcessState state, std::uint64_t incarnation) {
    proto::WorkerChanged change;
    auto* plan = change.mutable_worker()->mutable_plan();
    plan->set_name("node-0/worker-0");
    plan->set_node("node-0");
    *plan->add_actors() = stage_0();
    change.mutable_worker()->set_incarnation(incarnation);
    change.mutable_worker()->set_state(state);
    change.set_cause("killed by signal 9");
    tell(node, worker_changed{change});
  }

  proto::ClusterStatus status() {
    proto::ClusterStatus result;
    auto request = self->request(supervisor, caf::infinite, status_atom::value);
    run();
    request.receive([&](const cluster_status& s) { result = s.body; },
                    [](caf::error&) { FAIL("the supervisor did not answer"); });
    return result;
  }
};

} // namespace

TEST_CASE_METHOD(fixture, "a node is given the plan and every view from then on") {
  node_says_hello();
  REQUIRE(at_node->plans.size() == 1);
  CHECK(at_node->plans[0].workers_size() == 1);
  auto before = at_node->views.size();
  worker_is(proto::RUNNING, 1);
  REQUIRE(at_node->views.size() == before + 1);
  CHECK(at_node->views.back().workers(0).state() == proto::RUNNING);
  CHECK(at_node->views.back().version() > at_node->views.front().version());
}

TEST_CASE_METHOD(fixture, "a frontend that comes late is told everything at once") {
  node_says_hello();
  worker_is(proto::RUNNING, 1);
  proto::FrontendHello hello;
  hello.mutable_frontend()->set_endpoint("http://here");
  tell(frontend, frontend_hello{hello});
  REQUIRE(at_frontend->plans.size() == 1);
  REQUIRE(at_frontend->views.size() == 1);
  CHECK(at_frontend->views[0].workers(0).state() == proto::RUNNING);
  CHECK(status().ready());
}

TEST_CASE_METHOD(fixture, "a death reaches nodes and frontend as a view of a new epoch") {
  node_says_hello();
  proto::FrontendHello hello;
  hello.mutable_frontend()->set_endpoint("http://here");
  tell(frontend, frontend_hello{hello});
  worker_is(proto::RUNNING, 1);
  worker_is(proto::LOST, 1);
  CHECK(at_node->views.back().epoch() == 2);
  CHECK(at_frontend->views.back().epoch() == 2);
  CHECK(at_frontend->views.back().workers(0).state() == proto::LOST);
  CHECK(status().recoveries_size() == 1);
  CHECK_FALSE(status().ready());
}

TEST_CASE_METHOD(fixture, "a node that is cut off is shown as lost, and its workers are not") {
  node_says_hello();
  worker_is(proto::RUNNING, 1);
  caf::anon_send_exit(node, caf::exit_reason::kill);
  run();
  auto now = status();
  CHECK(now.view().nodes(0).state() == proto::LOST);
  CHECK(now.view().workers(0).state() == proto::RUNNING);
  CHECK(now.view().epoch() == 1);
}

TEST_CASE_METHOD(fixture,
                 "a heartbeat is answered, and one of a node that was lost asks for a hello") {
  node_says_hello();
  proto::NodeHeartbeat beat;
  beat.set_name("node-0");
  beat.set_incarnation(1);
  tell(node, node_heartbeat{beat});
  REQUIRE(at_node->answers.size() == 1);
  CHECK_FALSE(at_node->answers[0].say_hello());
  for (int i = 0; i < 50; ++i) {
    tell(frontend, frontend_heartbeat{});
    advance(std::chrono::milliseconds(100)); // the node is silent; there is nowhere to move to
  }
  CHECK(status().view().nodes(0).state() == proto::LOST);
  tell(node, node_heartbeat{beat});
  CHECK(at_node->answers.back().say_hello());
}

TEST_CASE_METHOD(fixture, "what a node's heartbeat tells of its GPUs is in the status") {
  node_says_hello();
  proto::NodeHeartbeat beat;
  beat.set_name("node-0");
  beat.set_incarnation(1);
  auto* gpu = beat.mutable_devices()->add_gpus();
  gpu->set_device("cuda:0");
  gpu->set_utilization(0.5);
  auto* keeper = beat.mutable_devices()->add_keepers();
  keeper->set_pid(42);
  keeper->set_kept_bytes(1000);
  tell(node, node_heartbeat{beat});
  CHECK_FALSE(at_node->answers.back().has_devices());
  const auto now = status();
  REQUIRE(now.devices_size() == 1);
  CHECK(now.devices(0).node() == "node-0");
  CHECK(now.devices(0).gpus(0).utilization() == 0.5);
  CHECK_FALSE(now.devices(0).gpus(0).has_power_watts());
  CHECK(now.devices(0).keepers(0).pid() == 42);
  CHECK(now.devices(0).keepers(0).kept_bytes() == 1000);
}
