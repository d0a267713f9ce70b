#include "troupe/recovery/membership.hpp"

#include "troupe/base/error.hpp"

#include <algorithm>
#include <functional>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace troupe::recovery {

namespace {

using namespace std::chrono_literals;

/// Records kept for the status page.
constexpr std::size_t max_records = 200;

/// Of those, how many a later controller is told of.
constexpr std::size_t max_journal_records = 50;

/// What a controller that was restarted gives nodes to find it, beyond their usual grace.
constexpr auto dial_time = 1500ms;

/// A node that came back has to stay this long before actors go home to it.
constexpr auto settling_time = 2000ms;

/// Heartbeats in a row that must stay away on all sides before the controller takes itself for cut
/// off: more than chance, and far fewer than make a peer suspicious.
constexpr auto deaf_heartbeats = 3;

/// Heartbeats in a row that must tell of something missed before it is said again: what is on
/// its way at the moment is not missed.
constexpr unsigned patience_heartbeats = 3;

/// Readings of GPUs that are older than this are shown to nobody.
constexpr auto readings_lifetime = 5000ms;

double milliseconds_between(membership::time_point from, membership::time_point to) {
  return std::chrono::duration<double, std::milli>(to - from).count();
}

std::uint64_t nanoseconds(membership::time_point t) {
  return static_cast<std::uint64_t>(
    std::chrono::duration_cast<std::chrono::nanoseconds>(t.time_since_epoch()).count());
}

/// Nothing of the worker's process can be reached any more.
void forget_process(proto::WorkerView& worker, proto::ProcessState state) {
  worker.set_state(state);
  worker.clear_port();
  worker.clear_transport_address();
  worker.clear_error();
  if (state == proto::IDLE)
    worker.clear_pid();
}

/// A node knows how its workers are; what they are to be is not its business.
void take_report(proto::WorkerView& known, const proto::WorkerView& reported) {
  auto plan = known.plan();
  known = reported;
  *known.mutable_plan() = std::move(plan);
}

void remove_actor(proto::WorkerPlan& plan, const std::string& id) {
  auto* actors = plan.mutable_actors();
  for (int i = 0; i < actors->size(); ++i)
    if (actors->Get(i).id() == id)
      actors->DeleteSubrange(i--, 1);
}

/// True when it is news. What a GPU has does not change; the first report after a start tells it.
bool note_gpu_bytes(proto::NodeView& node, const proto::DeviceReport& report) {
  bool is_news = false;
  for (const auto& gpu : report.gpus()) {
    if (!gpu.has_memory_total_bytes())
      continue;
    auto& known = (*node.mutable_gpu_bytes())[gpu.device()];
    is_news |= known != gpu.memory_total_bytes();
    known = gpu.memory_total_bytes();
  }
  return is_news;
}

} // namespace

void membership::effects::operator|=(const effects& more) {
  view_changed = view_changed || more.view_changed;
  assign.insert(more.assign.begin(), more.assign.end());
}

membership::membership(proto::ClusterPlan plan, std::uint64_t incarnation, std::uint32_t pid)
  : plan_(std::move(plan)), incarnation_(incarnation), pid_(pid) {
  plan_digest_ = fmt::format("{:x}", std::hash<std::string>{}(plan_.SerializeAsString()));
  view_.set_epoch(1);
  view_.set_version(1);
  for (const auto& worker : plan_.workers()) {
    auto* w = view_.add_workers();
    *w->mutable_plan() = worker;
    w->set_state(worker.actors().empty() ? proto::IDLE : proto::STARTING);
    if (find_node(worker.node()) == nullptr) {
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

proto::NodeView* membership::find_node(const std::string& name) {
  for (auto& node : *view_.mutable_nodes())
    if (node.name() == name)
      return &node;
  return nullptr;
}

membership::node_watch& membership::watch(const std::string& node) {
  auto found = watches_.find(node);
  if (found == watches_.end()) {
    auto interval = std::chrono::milliseconds(std::max(1U, plan_.heartbeat_ms()));
    auto patience = std::chrono::milliseconds(plan_.hang_ms());
    node_watch fresh{accrual_detector(interval, patience)};
    fresh.grace = std::chrono::milliseconds(plan_.node_grace_ms());
    found = watches_.emplace(node, std::move(fresh)).first;
  }
  return found->second;
}

void membership::restore(const proto::ControllerState& state, time_point now) {
  if (state.plan_digest() != plan_digest_)
    return;
  next_recovery_ = state.next_recovery();
  for (const auto& record : state.recoveries()) {
    open_recovery known;
    known.record = record;
    // How it ended was seen by nobody.
    known.record.set_phase(proto::SERVING);
    recoveries_.push_back(std::move(known));
  }
  catch_up(state.view(), now);
}

proto::ControllerState membership::state() const {
  proto::ControllerState result;
  result.set_format(1);
  *result.mutable_view() = view_;
  result.set_next_recovery(next_recovery_);
  result.set_plan_digest(plan_digest_);
  auto first = recoveries_.size() - std::min(recoveries_.size(), max_journal_records);
  for (auto i = first; i < recoveries_.size(); ++i)
    *result.add_recoveries() = recoveries_[i].record;
  return result;
}

membership::effects membership::catch_up(const proto::ClusterView& seen, time_point now) {
  effects result;
  // Whatever else is known better here: nobody has to hear of an epoch that falls.
  view_.set_epoch(std::max(view_.epoch(), seen.epoch()));
  if (seen.version() <= view_.version())
    return result;
  view_.set_version(seen.version());
  for (const auto& worker : seen.workers()) {
    auto* known = find_worker(worker.plan().name());
    if (known == nullptr)
      continue;
    auto& w = watch(known->plan().node());
    if (!w.connected && worker.incarnation() >= known->incarnation()) {
      *known = worker;
      continue;
    }
    // How it is was told by its node, later than that view; what it is to run says the view.
    if (same_actors(known->plan(), worker.plan()))
      continue;
    if (known->state() == proto::RUNNING)
      view_.set_epoch(view_.epoch() + 1);
    *known->mutable_plan() = worker.plan();
    known->set_incarnation(std::max(known->incarnation(), worker.incarnation()));
    known->clear_kv();
    forget_process(*known, worker.plan().actors().empty() ? proto::IDLE : proto::STARTING);
    if (known->plan().actors().empty())
      restored(*known, "move", now); // nobody waits for it any more
    if (w.connected)
      result.assign.insert(known->plan().node());
  }
  for (const auto& node : seen.nodes()) {
    auto* known = find_node(node.name());
    if (known == nullptr || node.incarnation() < known->incarnation()
        || watch(node.name()).connected)
      continue;
    *known = node;
    if (node.state() != proto::RUNNING && node.state() != proto::LOST)
      continue;
    // It was there when that view was made; whether it still is will show.
    known->set_state(proto::LOST);
    auto& w = watch(node.name());
    w.lost_since = now;
    w.grace = std::chrono::milliseconds(plan_.node_grace_ms()) + dial_time;
  }
  for (const auto& name : result.assign)
    watch(name).assignment_version = view_.version();
  result.view_changed = true;
  return result;
}

membership::effects membership::node_hello(const proto::NodeHello& hello, time_point now) {
  auto result = catch_up(hello.view(), now);
  auto* node = find_node(hello.name());
  if (node == nullptr || hello.incarnation() < node->incarnation())
    return result;
  bool restarted = node->incarnation() != 0 && node->incarnation() != hello.incarnation();
  bool was_given_up = node->state() == proto::FAILED;
  auto& w = watch(hello.name());
  auto since = node->state() == proto::LOST && !w.connected && w.lost_since != time_point{}
                 ? w.lost_since
                 : now;
  w.connected = true;
  w.heard = now;
  w.num_changes = hello.num_changes();
  w.num_behind = 0;
  w.grace = std::chrono::milliseconds(plan_.node_grace_ms());
  if (restarted)
    w.devices.reset(); // its keepers are gone
  w.detector.reset();
  w.detector.heartbeat(now);
  if (was_given_up)
    w.returned = now;
  node->set_host(hello.host());
  node->set_pid(hello.pid());
  node->set_incarnation(hello.incarnation());
  node->set_state(proto::RUNNING);
  node->set_memory_bytes(hello.memory_bytes());
  *node->mutable_standbys() = hello.standbys();
  result.view_changed = true;
  result.assign.insert(hello.name());

  std::set<std::string> lost_with_node;
  for (auto& worker : *view_.mutable_workers()) {
    if (worker.plan().node() != hello.name())
      continue;
    if (worker.plan().actors().empty()) {
      if (worker.state() != proto::FAILED)
        forget_process(worker, proto::IDLE);
    } else if (restarted && worker.state() == proto::RUNNING) {
      lost_with_node.insert(worker.plan().name());
    }
  }
  if (!lost_with_node.empty())
    lose(
      lost_with_node,
      {"node", hello.name() + ": its process died", "connection", milliseconds_between(since, now)},
      now);
  for (const auto& worker : hello.workers()) {
    auto* known = find_worker(worker.plan().name());
    if (known == nullptr || worker.incarnation() < known->incarnation())
      continue;
    if (!same_actors(worker.plan(), known->plan())) {
      known->set_incarnation(worker.incarnation());
      continue; // the assignment that follows replaces it
    }
    if (known->plan().actors().empty())
      continue;
    bool is_another = worker.incarnation() > known->incarnation();
    bool is_dead = worker.state() == proto::LOST || worker.state() == proto::FAILED;
    if (known->state() == proto::RUNNING && (is_another || is_dead))
      lose(
        {known->plan().name()},
        {"process", known->plan().name() + ": died while its node could not say so", "connection"},
        now);
    take_report(*known, worker);
    if (known->state() == proto::FAILED)
      result |= give_up_worker(*known, now);
    if (known->state() == proto::RUNNING)
      restored(*known, "restart", now);
  }
  touch();
  // Above that of any assignment of an earlier controller, which the node may hold.
  w.assignment_version = view_.version();
  return result;
}

membership::effects membership::node_heartbeat(const proto::NodeHeartbeat& heartbeat,
                                               time_point now, proto::NodeHeartbeat& answer) {
  effects result;
  answer.set_name(heartbeat.name());
  answer.set_incarnation(heartbeat.incarnation());
  answer.set_view_version(view_.version());
  auto* node = find_node(heartbeat.name());
  if (node == nullptr || heartbeat.incarnation() < node->incarnation())
    return result;
  auto& w = watch(heartbeat.name());
  w.heard = now;
  answer.set_assignment_version(w.assignment_version);
  if (node->state() != proto::RUNNING || node->incarnation() != heartbeat.incarnation()) {
    answer.set_say_hello(true);
    return result;
  }
  w.detector.heartbeat(now);
  if (heartbeat.has_devices()) {
    w.devices = heartbeat.devices();
    w.devices->set_node(heartbeat.name());
    w.devices_heard = now;
    result.view_changed = note_gpu_bytes(*node, heartbeat.devices());
    if (result.view_changed)
      touch();
  }
  bool is_behind = heartbeat.num_changes() != w.num_changes
                   || heartbeat.view_version() < view_.version()
                   || heartbeat.assignment_version() != w.assignment_version;
  w.num_behind = is_behind ? w.num_behind + 1 : 0;
  if (w.num_behind >= patience_heartbeats) {
    // The hello brings its changes here, and view and assignment there.
    w.num_behind = 0;
    answer.set_say_hello(true);
  }
  return result;
}

membership::effects membership::node_disconnected(const std::string& name, time_point now) {
  effects result;
  auto* node = find_node(name);
  if (node == nullptr || node->state() != proto::RUNNING)
    return result;
  node->set_state(proto::LOST);
  auto& w = watch(name);
  w.connected = false;
  w.lost_since = now;
  touch();
  result.view_changed = true;
  return result;
}

void membership::lose(const std::set<std::string>& workers, const fault& what, time_point now) {
  open_recovery open;
  open.interrupts = false;
  for (const auto& name : workers) {
    auto* worker = find_worker(name);
    bool covered = is_covered(view_, *worker);
    if (covered)
      open.record.set_restored_by("replica");
    open.interrupts = open.interrupts || !covered;
    forget_process(*worker, proto::LOST);
    open.workers.insert(name);
  }
  if (open.interrupts)
    view_.set_epoch(view_.epoch() + 1);
  open.detected = now
                  - std::chrono::duration_cast<std::chrono::steady_clock::duration>(
                    std::chrono::duration<double, std::milli>(what.detect_ms));
  auto& record = open.record;
  record.set_id(next_recovery_++);
  record.set_level(what.level);
  record.set_cause(what.cause);
  record.set_detected_by(what.detected_by);
  record.set_detected_ns(what.detected_ns != 0 ? what.detected_ns : nanoseconds(open.detected));
  record.set_epoch(view_.epoch());
  record.set_detect_ms(what.detect_ms);
  // The new epoch is in force with the view that carries it, which leaves with this change.
  record.set_fence_ms(milliseconds_between(open.detected, now));
  record.set_phase(proto::RESTORING);
  recoveries_.push_back(std::move(open));
  if (recoveries_.size() > max_records)
    recoveries_.erase(recoveries_.begin());
}

membership::effects membership::apply(const relocation& found) {
  effects result;
  result.view_changed = true;
  std::set<std::string> changed;
  std::vector<std::pair<std::string, proto::ActorPlan>> arriving;
  for (const auto& m : found.moves) {
    proto::ActorPlan actor;
    for (const auto& planned : plan_.workers())
      for (const auto& a : planned.actors())
        if (a.id() == m.actor)
          actor = a;
    arriving.emplace_back(m.to, std::move(actor));
    if (auto* from = find_worker(m.from)) {
      remove_actor(*from->mutable_plan(), m.actor);
      changed.insert(m.from);
    }
    // Who waited for the old place now waits for the new one.
    for (auto& open : recoveries_)
      if (open.record.phase() == proto::RESTORING && open.workers.count(m.from) != 0)
        open.workers.insert(m.to);
  }
  for (auto& [to, actor] : arriving) {
    *find_worker(to)->mutable_plan()->add_actors() = std::move(actor);
    changed.insert(to);
  }
  for (const auto& id : found.dropped)
    for (auto& worker : *view_.mutable_workers()) {
      auto before = worker.plan().actors_size();
      remove_actor(*worker.mutable_plan(), id);
      if (worker.plan().actors_size() != before)
        changed.insert(worker.plan().name());
    }
  touch();
  for (const auto& name : changed) {
    auto& worker = *find_worker(name);
    const auto* node = find_node(worker.plan().node());
    bool is_there = node->state() == proto::RUNNING;
    if (!worker.plan().actors().empty())
      forget_process(worker, proto::STARTING);
    else if (worker.state() != proto::FAILED)
      forget_process(worker, is_there ? proto::IDLE : proto::LOST);
    if (worker.plan().actors().empty())
      for (auto& open : recoveries_)
        open.workers.erase(name);
    watch(worker.plan().node()).assignment_version = view_.version();
    if (is_there)
      result.assign.insert(worker.plan().node());
  }
  return result;
}

membership::effects membership::give_up_node(proto::NodeView& node, const fault& what,
                                             time_point now) {
  effects result;
  std::set<std::string> lost;
  for (const auto& worker : view_.workers())
    if (worker.plan().node() == node.name() && !worker.plan().actors().empty())
      lost.insert(worker.plan().name());
  auto previous = node.state();
  node.set_state(proto::FAILED);
  auto found = relocate(view_, lost);
  auto& w = watch(node.name());
  w.connected = false;
  w.lost_since = now; // where there is no place, it is looked for again after another grace
  if (!found.problem.empty()) {
    node.set_state(proto::LOST);
    result.view_changed = previous != proto::LOST;
    if (result.view_changed)
      touch();
    return result;
  }
  if (!lost.empty()) {
    std::set<std::string> gone = lost;
    for (const auto& m : found.moves)
      gone.insert(m.to);
    bool serves_on = found.moves.empty();
    lose(gone, what, now);
    result |= apply(found);
    recoveries_.back().record.set_restored_by(serves_on ? "replica" : "move");
    if (serves_on) {
      recoveries_.back().record.set_restore_ms(
        milliseconds_between(recoveries_.back().detected, now));
      recoveries_.back().record.set_phase(recoveries_.back().interrupts ? proto::REPLAYING
                                                                        : proto::SERVING);
    }
  }
  touch();
  result.view_changed = true;
  return result;
}

membership::effects membership::give_up_worker(proto::WorkerView& worker, time_point now) {
  effects result;
  result.view_changed = true;
  auto why = worker.error();
  auto name = worker.plan().name();
  if (is_permanent(static_cast<error_code>(why.code()))) {
    error_ = why;
    return result;
  }
  auto found = relocate(view_, {name});
  if (!found.problem.empty()) {
    error_ = why;
    return result;
  }
  std::set<std::string> gone;
  for (const auto& m : found.moves)
    gone.insert(m.to);
  if (!gone.empty()) {
    gone.insert(name);
    lose(gone, {"process", name + " is given up: " + why.cause(), "exit"}, now);
    recoveries_.back().record.set_restored_by("move");
  }
  auto* given_up = find_worker(name);
  given_up->set_state(proto::FAILED);
  result |= apply(found);
  *find_worker(name)->mutable_error() = why;
  return result;
}

membership::effects membership::worker_changed(const proto::WorkerChanged& change, time_point now) {
  effects result;
  const auto& reported = change.worker();
  if (auto* node = find_node(reported.plan().node())) {
    ++watch(node->name()).num_changes;
    *node->mutable_standbys() = change.standbys();
  }
  auto* worker = find_worker(reported.plan().name());
  if (worker == nullptr || reported.incarnation() < worker->incarnation())
    return result;
  if (!same_actors(reported.plan(), worker->plan())) {
    // Of before the last assignment: it says nothing about what is to run now.
    worker->set_incarnation(reported.incarnation());
    return result;
  }
  auto previous = worker->state();
  if (worker->plan().actors().empty() || previous == proto::FAILED)
    return result;
  result.view_changed = true;
  fault what{"process", reported.plan().name() + ": " + change.cause(),
             change.detected_by().empty() ? "exit" : change.detected_by(), change.detect_ms(),
             change.detected_ns()};
  if (reported.state() == proto::LOST) {
    // Only what has served can be missed; a worker that dies while it starts is restarted by its
    // node alone.
    bool was_serving =
      previous == proto::RUNNING && worker->incarnation() == reported.incarnation();
    worker->set_incarnation(reported.incarnation());
    if (was_serving)
      lose({worker->plan().name()}, what, now);
    else
      forget_process(*worker, proto::LOST);
  } else {
    if (previous == proto::RUNNING
        && (reported.state() == proto::FAILED || reported.incarnation() > worker->incarnation()))
      lose({worker->plan().name()}, what, now);
    take_report(*worker, reported);
    if (reported.state() == proto::FAILED)
      result |= give_up_worker(*worker, now);
    if (reported.state() == proto::STARTING && !change.restored_by().empty())
      for (auto& open : recoveries_)
        if (open.record.phase() == proto::RESTORING
            && open.workers.count(reported.plan().name()) != 0 && open.record.restored_by().empty())
          open.record.set_restored_by(change.restored_by());
    if (reported.state() == proto::RUNNING)
      restored(*find_worker(reported.plan().name()), "restart", now);
  }
  touch();
  return result;
}

void membership::restored(const proto::WorkerView& worker, const std::string& how, time_point now) {
  for (auto& open : recoveries_) {
    if (open.record.phase() != proto::RESTORING || open.workers.erase(worker.plan().name()) == 0
        || !open.workers.empty())
      continue;
    if (open.record.restored_by().empty())
      open.record.set_restored_by(how);
    open.record.set_restore_ms(milliseconds_between(open.detected, now));
    open.record.set_phase(open.interrupts ? proto::REPLAYING : proto::SERVING);
    close_served(open);
  }
}

membership::effects membership::frontend_hello(const proto::FrontendHello& hello, time_point now) {
  auto result = catch_up(hello.view(), now);
  frontend_ = hello.frontend();
  touch();
  result.view_changed = true;
  return result;
}

void membership::close_served(open_recovery& open) {
  if (open.record.phase() != proto::REPLAYING || !open.first_served)
    return;
  open.record.set_first_token_ms(milliseconds_between(open.detected, *open.first_served));
  open.record.set_phase(proto::SERVING);
}

void membership::replay(const proto::ReplayReport& report, time_point now) {
  for (auto& open : recoveries_) {
    if (open.record.phase() == proto::SERVING || !open.interrupts
        || report.epoch() < open.record.epoch())
      continue;
    if (report.phase() == proto::REPLAYING || report.tokens_replayed() > 0) {
      open.replays[report.replica()] = report;
      std::uint32_t requests = 0;
      std::uint32_t tokens = 0;
      for (const auto& [replica, replay] : open.replays) {
        requests += replay.requests();
        tokens += replay.tokens_replayed();
      }
      open.record.set_requests(requests);
      open.record.set_tokens_replayed(tokens);
    }
    if (report.phase() == proto::SERVING) {
      open.served.insert(report.replica());
      if (!open.first_served && open.served.size() >= plan_.num_replicas())
        open.first_served = now;
      close_served(open);
    }
  }
}

membership::effects membership::go_home(time_point now) {
  effects result;
  bool any_returned = false;
  for (auto& [name, w] : watches_)
    any_returned =
      any_returned || (w.connected && w.returned && now - *w.returned >= settling_time);
  bool recovering = std::any_of(recoveries_.begin(), recoveries_.end(), [](const auto& open) {
    return open.record.phase() != proto::SERVING;
  });
  if (!any_returned || recovering)
    return result;
  for (auto& [name, w] : watches_)
    w.returned.reset();
  relocation found;
  found.moves = moves_home(view_, plan_);
  if (found.moves.empty())
    return result;
  std::set<std::string> moved;
  std::vector<std::string> what;
  for (const auto& m : found.moves)
    if (!m.from.empty()) {
      moved.insert(m.from);
      moved.insert(m.to);
      what.push_back(m.actor);
    }
  if (!moved.empty()) {
    lose(
      moved,
      {"node", fmt::format("{} goes home to a node that is back", fmt::join(what, ", ")), "plan"},
      now);
    recoveries_.back().record.set_restored_by("move");
  }
  result |= apply(found);
  return result;
}

/// Where nobody at all is heard, it is this controller that is cut off: such time is nobody's
/// silence, also not that of a peer that is heard again a little later than the others.
bool membership::is_deaf(time_point now) const {
  auto heard = frontend_heard_;
  for (const auto& [name, w] : watches_)
    if (w.heard && (!heard || *w.heard > *heard))
      heard = w.heard;
  return heard && now - *heard > std::chrono::milliseconds(plan_.heartbeat_ms()) * deaf_heartbeats;
}

membership::effects membership::tick(time_point now, std::chrono::steady_clock::duration paused) {
  effects result;
  auto phi_limit = plan_.suspicion() > 0 ? plan_.suspicion() : 8.0;
  auto uncounted = is_deaf(now) && last_tick_ ? now - *last_tick_ : paused;
  last_tick_ = now;
  for (auto& node : *view_.mutable_nodes()) {
    auto& w = watch(node.name());
    w.detector.observer_paused(uncounted);
    if (w.devices && now - w.devices_heard > readings_lifetime)
      w.devices.reset();
    if (w.lost_since != time_point{})
      w.lost_since += paused;
    auto silence = std::chrono::duration<double, std::milli>(w.detector.silence(now)).count();
    if (node.state() == proto::RUNNING && w.detector.phi(now) > phi_limit) {
      result |= give_up_node(
        node,
        {"node", fmt::format("{}: no heartbeat for {:.0f} ms", node.name(), silence), "heartbeat"},
        now);
    } else if (node.state() == proto::LOST && w.lost_since != time_point{}
               && now - w.lost_since >= w.grace) {
      auto gone = milliseconds_between(w.lost_since, now);
      result |=
        give_up_node(node,
                     {"node",
                      fmt::format("{}: its connection broke and it did not come back in {:.0f} ms",
                                  node.name(), gone),
                      "connection", gone},
                     now);
    }
  }
  result |= go_home(now);
  return result;
}

proto::NodeAssignment membership::assignment_for(const std::string& node) const {
  proto::NodeAssignment result;
  *result.mutable_plan() = plan_;
  for (const auto& worker : view_.workers())
    if (worker.plan().node() == node)
      *result.add_known() = worker;
  auto w = watches_.find(node);
  result.set_version(w == watches_.end() ? 0 : w->second.assignment_version);
  return result;
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
  std::set<std::string> placed;
  bool all_run = true;
  for (const auto& worker : view_.workers()) {
    all_run = all_run && (worker.plan().actors().empty() || worker.state() == proto::RUNNING);
    for (const auto& actor : worker.plan().actors())
      placed.insert(actor.id());
    if (worker.state() == proto::FAILED && error_.code() == 0)
      result.add_warnings(worker.error().cause());
  }
  for (const auto& worker : plan_.workers())
    for (const auto& actor : worker.actors())
      if (placed.count(actor.id()) == 0)
        result.add_warnings(fmt::format("{} runs nowhere: its group has fewer copies", actor.id()));
  for (const auto& node : view_.nodes())
    if (node.state() == proto::LOST || node.state() == proto::FAILED)
      result.add_warnings(fmt::format("{} is lost", node.name()));
  for (const auto& node : view_.nodes())
    if (auto w = watches_.find(node.name());
        w != watches_.end() && w->second.devices && node.state() == proto::RUNNING)
      *result.add_devices() = *w->second.devices;
  result.set_ready(all_run && !frontend_.endpoint().empty());
  if (error_.code() != 0)
    *result.mutable_error() = error_;
  return result;
}

} // namespace troupe::recovery
