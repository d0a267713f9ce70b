#pragma once

#include "troupe/recovery/node_policy.hpp"

#include <catch2/catch.hpp>

#include <chrono>
#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include <fmt/format.h>

namespace troupe::test {

using recovery::node_policy;
using namespace std::chrono_literals;

inline constexpr std::uint64_t kv_bytes_of_a_stage = 4096;

inline proto::ActorPlan stage(std::uint32_t index) {
  proto::ActorPlan actor;
  actor.set_id("replica-0/stage-" + std::to_string(index));
  actor.set_kind(proto::STAGE);
  actor.set_index(index);
  actor.set_kv_bytes(kv_bytes_of_a_stage);
  return actor;
}

/// Carries out everything at once, as a node does, and remembers it. Time is virtual.
struct node {
  explicit node(std::uint64_t incarnation = 1) : policy("node-0", incarnation, "10.0.0.1", 7) {
    assignment.set_version(1);
    auto* plan = assignment.mutable_plan();
    plan->set_max_restarts(3);
    plan->set_within_s(60);
    carry_out(policy.connected());
  }

  void carry_out(const node_policy::effects& todo) {
    for (const auto& effect : todo)
      std::visit([this](const auto& what) { happen(what); }, effect);
  }
  void happen(const node_policy::start_process& what) {
    if (refuse_processes) {
      log.push_back("refuse " + what.process);
      carry_out(policy.not_started(what.process, {error_code::io_failed, "fork: no", "", ""}, now));
      return;
    }
    CHECK(what.process == fmt::format("{}#{}", what.name, what.incarnation));
    CHECK(all.insert(what.process).second); // a process is named once
    log.push_back("start " + what.process);
    carry_out(policy.started(what.process, next_pid++));
  }
  void happen(const node_policy::kill_process& what) { log.push_back("kill " + what.process); }
  void happen(const node_policy::assign& what) {
    const auto& a = what.assignment;
    std::string actors;
    for (const auto& actor : a.actors())
      actors += " " + actor.id();
    if (!a.device().empty())
      actors += " on " + a.device();
    log.push_back(a.name().empty() ? fmt::format("prepare {}{}", what.process, actors)
                                   : fmt::format("assign {} as {}#{}{}", what.process, a.name(),
                                                 a.incarnation(), actors));
  }
  void happen(const node_policy::send_view& what) { log.push_back("view to " + what.process); }
  void happen(const node_policy::keep_memory& what) {
    for (const auto& [actor, bytes] : what.actors) {
      CHECK(bytes == kv_bytes_of_a_stage);
      log.push_back((refuse_memory ? "refuse memory of " : "memory of ") + actor);
    }
    carry_out(refuse_memory ? policy.memory_refused(
                what.worker, {error_code::resource_exhausted, "no memory", "", ""})
                            : policy.memory_kept(what.worker));
  }
  void happen(const node_policy::drop_memory& what) {
    log.push_back("drop memory of " + what.actor);
  }
  void happen(const node_policy::note& what) { CHECK_FALSE(what.text.empty()); }
  void happen(const proto::NodeHello& said) {
    log.push_back("hello");
    hello = said;
    num_changes = said.num_changes();
  }
  void happen(const proto::WorkerChanged& change) {
    const auto& w = change.worker();
    log.push_back(fmt::format("report {}#{} {}", w.plan().name(), w.incarnation(),
                              proto::ProcessState_Name(w.state())));
    last = change;
    ++num_changes;
  }

  /// The worker of that number is to run these stages.
  void plan(std::uint32_t index, std::vector<std::uint32_t> stages) {
    auto name = "node-0/worker-" + std::to_string(index);
    proto::WorkerView* w = nullptr;
    for (auto& known : *assignment.mutable_known())
      if (known.plan().name() == name)
        w = &known;
    if (w == nullptr)
      w = assignment.add_known();
    w->mutable_plan()->set_name(name);
    w->mutable_plan()->clear_actors();
    for (auto s : stages)
      *w->mutable_plan()->add_actors() = stage(s);
  }
  void assign() { carry_out(policy.assigned(assignment)); }
  /// The same, as a later one.
  void reassign() {
    assignment.set_version(assignment.version() + 1);
    assign();
  }

  /// A process says hello under a name; false: it is refused.
  bool greet(const std::string& name, std::uint64_t incarnation) {
    proto::WorkerHello said;
    said.set_name(name);
    said.set_incarnation(incarnation);
    auto process = policy.process_of(said);
    if (process)
      carry_out(policy.process_connected(*process));
    return process.has_value();
  }
  void say(const std::string& name, std::uint64_t incarnation, proto::ProcessState state,
           error_code code = error_code::none) {
    proto::WorkerReport said;
    auto* w = said.mutable_worker();
    w->mutable_plan()->set_name(name);
    w->set_incarnation(incarnation);
    w->set_pid(77);
    w->set_port(4000);
    w->set_state(state);
    if (code != error_code::none) {
      w->mutable_error()->set_code(static_cast<std::uint32_t>(code));
      w->mutable_error()->set_cause("the model is bad");
    }
    carry_out(policy.process_reported(said));
  }
  void die(const std::string& process, const std::string& verdict = {}) {
    carry_out(policy.process_exited({process, "killed by signal 9", verdict, now - 3ms}, now));
  }
  /// It computes no more, and is not gone.
  void end(const std::string& process, const std::string& verdict = {}) {
    carry_out(policy.process_ending({process, "killed by signal 9", verdict, now - 1ms}, now));
  }
  void pass(std::chrono::milliseconds time) {
    now += time;
    carry_out(policy.tick(now));
  }
  /// A standby connects, prepares and is ready.
  void make_ready(const std::string& name) {
    REQUIRE(greet(name, 1));
    say(name, 1, proto::RUNNING);
  }
  void run_worker(std::uint64_t incarnation = 1) {
    REQUIRE(greet("node-0/worker-0", incarnation));
    say("node-0/worker-0", incarnation, proto::LOADING);
    say("node-0/worker-0", incarnation, proto::RUNNING);
  }

  /// What has been done since the last time.
  std::vector<std::string> done() { return std::exchange(log, {}); }
  /// What the controller would be told of the worker now.
  proto::WorkerView view(std::uint32_t index = 0) {
    carry_out(policy.hello_wanted());
    log.pop_back();
    for (const auto& w : hello.workers())
      if (w.plan().name() == "node-0/worker-" + std::to_string(index))
        return w;
    return {};
  }

  node_policy policy;
  node_policy::time_point now = node_policy::time_point{} + 1h;
  proto::NodeAssignment assignment;
  bool refuse_processes = false;
  bool refuse_memory = false;
  std::uint32_t next_pid = 100;
  std::vector<std::string> log;
  std::set<std::string> all;
  proto::NodeHello hello;
  proto::WorkerChanged last;
  std::uint64_t num_changes = 0;
};

/// One worker with stage 0; it runs, and so do the standbys.
inline node running(std::uint32_t num_standbys = 0) {
  node n;
  n.assignment.mutable_plan()->set_standbys(num_standbys);
  n.plan(0, {0});
  n.assign();
  for (std::uint32_t i = 0; i < num_standbys; ++i)
    n.make_ready("node-0/standby-" + std::to_string(i));
  n.run_worker();
  n.done();
  return n;
}

/// The same, where worker 0 runs on a GPU.
inline node running_on_gpu(std::uint32_t num_standbys, std::uint32_t draft_tokens = 0,
                           std::uint32_t num_stages = 1) {
  node n;
  n.assignment.mutable_plan()->set_standbys(num_standbys);
  n.assignment.mutable_plan()->set_draft_tokens(draft_tokens);
  n.assignment.mutable_plan()->set_num_stages(num_stages);
  n.plan(0, {0});
  auto* plan = n.assignment.mutable_known(0)->mutable_plan();
  plan->set_device("cuda:0");
  for (auto& actor : *plan->mutable_actors())
    actor.set_kind(proto::STAGE);
  n.assign();
  for (std::uint32_t i = 0; i < num_standbys; ++i)
    n.make_ready("node-0/standby-" + std::to_string(i));
  n.run_worker();
  for (std::uint32_t i = 0; i < num_standbys; ++i)
    n.say("node-0/standby-" + std::to_string(i), 1, proto::RUNNING); // it has loaded ahead
  n.done();
  return n;
}

using steps = std::vector<std::string>;

} // namespace troupe::test
