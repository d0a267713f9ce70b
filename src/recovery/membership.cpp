#include "troupe/recovery/membership.hpp"

#include "troupe/base/error.hpp"

#include <algorithm>
#include <utility>

#include <fmt/format.h>

namespace troupe::recovery {

namespace {

/// Records kept for the status page.
constexpr std::size_t max_records = 200;

double milliseconds_between(membership::time_point from, membership::time_point to) {
  return std::chrono::duration<double, std::milli>(to - from).count();
}

} // namespace

membership::membership(proto::ClusterPlan plan, std::uint64_t incarnation, std::uint32_t pid)
  : plan_(std::move(plan)), incarnation_(incarnation), pid_(pid) {
  view_.set_epoch(1);
  view_.set_version(1);
  std::set<std::string> nodes;
  for (const auto& worker : plan_.workers()) {
    auto* w = view_.add_workers();
    *w->mutable_plan() = worker;
    w->set_state(proto::STARTING);
    if (nodes.insert(worker.node()).second) {
      auto* n = view_.add_nodes();
      n->set_name(worker.node());
      n->set_state(proto::STARTING);
    }
  }
}

proto::WorkerView* membership::find_worker(const std::string& name) {
  for (auto& worker : *view_.mutable_workers())
    if (worker.plan().name() == name)
      return &worker;
  return nullptr;
}

void membership::catch_up(std::uint64_t epoch, std::uint64_t version) {
  view_.set_epoch(std::max(view_.epoch(), epoch));
  view_.set_version(std::max(view_.version(), version));
}

membership::effects membership::node_hello(const proto::NodeHello& hello, time_point now) {
  effects result;
  catch_up(hello.epoch(), hello.view_version());
  for (auto& node : *view_.mutable_nodes()) {
    if (node.name() != hello.name() || hello.incarnation() < node.incarnation())
      continue;
    bool restarted = node.incarnation() != 0 && node.incarnation() != hello.incarnation();
    node.set_host(hello.host());
    node.set_pid(hello.pid());
    node.set_incarnation(hello.incarnation());
    node.set_state(proto::RUNNING);
    result.view_changed = true;
    if (hello.workers().empty())
      result.assign.push_back(node.name());
    if (restarted) {
      for (auto& worker : *view_.mutable_workers())
        if (worker.plan().node() == hello.name() && worker.state() == proto::RUNNING)
          lose(worker, "its node process died", 0, now);
    }
  }
  for (const auto& worker : hello.workers()) {
    auto* known = find_worker(worker.plan().name());
    if (known == nullptr || worker.incarnation() < known->incarnation())
      continue;
    bool is_another = worker.incarnation() > known->incarnation();
    bool is_dead = worker.state() == proto::LOST || worker.state() == proto::FAILED;
    if (known->state() == proto::RUNNING && (is_another || is_dead))
      lose(*known, "died while its node could not say so", 0, now);
    auto plan = known->plan();
    *known = worker;
    *known->mutable_plan() = plan;
    if (known->state() == proto::FAILED)
      error_ = known->error();
    if (known->state() == proto::RUNNING)
      restored(*known, now);
  }
  if (result.view_changed)
    view_.set_version(view_.version() + 1);
  return result;
}

membership::effects membership::node_disconnected(const std::string& name) {
  effects result;
  for (auto& node : *view_.mutable_nodes()) {
    if (node.name() == name && node.state() == proto::RUNNING) {
      node.set_state(proto::LOST);
      view_.set_version(view_.version() + 1);
      result.view_changed = true;
    }
  }
  return result;
}

void membership::lose(proto::WorkerView& worker, const std::string& cause, double detect_ms,
                      time_point now) {
  worker.set_state(proto::LOST);
  worker.clear_port();
  worker.clear_transport_address();
  view_.set_epoch(view_.epoch() + 1);
  open_recovery open;
  open.worker = worker.plan().name();
  open.detected = now
                  - std::chrono::duration_cast<std::chrono::steady_clock::duration>(
                    std::chrono::duration<double, std::milli>(detect_ms));
  open.record.set_id(next_recovery_++);
  open.record.set_level("process");
  open.record.set_cause(worker.plan().name() + ": " + cause);
  open.record.set_epoch(view_.epoch());
  open.record.set_detect_ms(detect_ms);
  // The new epoch is in force with the view that carries it, which leaves with this change.
  open.record.set_fence_ms(milliseconds_between(open.detected, now));
  open.record.set_phase(proto::RESTORING);
  recoveries_.push_back(std::move(open));
  if (recoveries_.size() > max_records)
    recoveries_.erase(recoveries_.begin());
}

membership::effects membership::worker_changed(const proto::WorkerChanged& change, time_point now) {
  effects result;
  const auto& reported = change.worker();
  auto* worker = find_worker(reported.plan().name());
  if (worker == nullptr || reported.incarnation() < worker->incarnation())
    return result;
  result.view_changed = true;
  auto previous = worker->state();
  if (reported.state() == proto::LOST) {
    // Only what has served can be missed; a worker that dies while it starts is restarted by its
    // node alone.
    bool was_serving =
      previous == proto::RUNNING && worker->incarnation() == reported.incarnation();
    worker->set_incarnation(reported.incarnation());
    if (was_serving)
      lose(*worker, change.cause(), change.detect_ms(), now);
    else
      worker->set_state(proto::LOST);
  } else {
    auto plan = worker->plan();
    *worker = reported;
    *worker->mutable_plan() = plan;
    if (reported.state() == proto::FAILED) {
      error_ = reported.error();
      if (previous == proto::RUNNING)
        lose(*worker, change.cause(), change.detect_ms(), now);
      worker->set_state(proto::FAILED);
    }
    if (reported.state() == proto::RUNNING)
      restored(*worker, now);
  }
  view_.set_version(view_.version() + 1);
  return result;
}

void membership::restored(const proto::WorkerView& worker, time_point now) {
  for (auto& open : recoveries_) {
    if (open.worker != worker.plan().name() || open.record.phase() != proto::RESTORING)
      continue;
    open.record.set_restore_ms(milliseconds_between(open.detected, now));
    open.record.set_phase(proto::REPLAYING);
    close_served(open, now);
  }
}

void membership::frontend_hello(const proto::FrontendHello& hello) {
  catch_up(hello.epoch(), hello.view_version());
  frontend_ = hello.frontend();
  view_.set_version(view_.version() + 1);
}

void membership::close_served(open_recovery& open, time_point now) {
  if (open.record.phase() != proto::REPLAYING || open.served.size() < plan_.num_replicas())
    return;
  open.record.set_first_token_ms(milliseconds_between(open.detected, now));
  open.record.set_phase(proto::SERVING);
}

void membership::replay(const proto::ReplayReport& report, time_point now) {
  for (auto& open : recoveries_) {
    if (open.record.phase() == proto::SERVING || report.epoch() < open.record.epoch())
      continue;
    if (report.phase() == proto::REPLAYING) {
      open.replays[report.replica()] = report;
      std::uint32_t requests = 0;
      std::uint32_t tokens = 0;
      for (const auto& [replica, replay] : open.replays) {
        requests += replay.requests();
        tokens += replay.tokens_replayed();
      }
      open.record.set_requests(requests);
      open.record.set_tokens_replayed(tokens);
    } else if (report.phase() == proto::SERVING) {
      open.served.insert(report.replica());
      close_served(open, now);
    }
  }
}

proto::ClusterStatus membership::status() const {
  proto::ClusterStatus result;
  result.set_cluster(plan_.cluster());
  result.set_controller_pid(pid_);
  result.set_controller_incarnation(incarnation_);
  *result.mutable_frontend() = frontend_;
  *result.mutable_view() = view_;
  for (const auto& open : recoveries_)
    *result.add_recoveries() = open.record;
  bool all_run = std::all_of(view_.workers().begin(), view_.workers().end(),
                             [](const auto& w) { return w.state() == proto::RUNNING; });
  result.set_ready(all_run && !frontend_.endpoint().empty());
  if (error_.code() != 0)
    *result.mutable_error() = error_;
  return result;
}

} // namespace troupe::recovery
