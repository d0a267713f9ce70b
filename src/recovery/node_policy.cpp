#include "troupe/recovery/node_policy.hpp"

#include "troupe/recovery/error_message.hpp"
#include "troupe/recovery/relocation.hpp"

#include <algorithm>
#include <set>

#include <fmt/format.h>

namespace troupe::recovery {

namespace {

/// The first incarnation of a standby, and the only one: the next one has another name.
constexpr std::uint64_t standby_incarnation = 1;

std::string process_name_of(const std::string& name, std::uint64_t incarnation) {
  return fmt::format("{}#{}", name, incarnation);
}

std::uint64_t nanoseconds(node_policy::time_point t) {
  return static_cast<std::uint64_t>(
    std::chrono::duration_cast<std::chrono::nanoseconds>(t.time_since_epoch()).count());
}

} // namespace

node_policy::node_policy(std::string node, std::uint64_t incarnation, std::string host,
                         std::uint64_t seed)
  : node_(std::move(node)), incarnation_(incarnation), host_(std::move(host)), generations_(seed) {}

node_policy::worker* node_policy::worker_of(const std::string& process) {
  for (auto& [name, w] : workers_)
    if (w.process == process)
      return &w;
  return nullptr;
}

std::map<std::string, node_policy::standby>::iterator
node_policy::standby_of(const std::string& process) {
  return std::find_if(standbys_.begin(), standbys_.end(),
                      [&](const auto& s) { return s.second.process == process; });
}

node_policy::effects node_policy::connected() {
  connected_ = true;
  return hello_wanted();
}

node_policy::effects node_policy::hello_wanted() {
  effects out;
  say_hello(out);
  return out;
}

void node_policy::say_hello(effects& out) {
  if (!connected_)
    return;
  proto::NodeHello hello;
  hello.set_name(node_);
  hello.set_incarnation(incarnation_);
  *hello.mutable_view() = view_;
  add_standbys(*hello.mutable_standbys());
  for (const auto& [name, w] : workers_)
    *hello.add_workers() = w.view;
  hello.set_num_changes(++num_changes_);
  out.emplace_back(std::move(hello));
}

void node_policy::report(const worker& w, proto::WorkerChanged change, effects& out) {
  if (!connected_)
    return;
  *change.mutable_worker() = w.view;
  add_standbys(*change.mutable_standbys());
  ++num_changes_;
  out.emplace_back(std::move(change));
}

proto::NodeHeartbeat node_policy::heartbeat() const {
  proto::NodeHeartbeat result;
  result.set_name(node_);
  result.set_incarnation(incarnation_);
  result.set_view_version(view_.version());
  result.set_assignment_version(assignment_version_);
  result.set_num_changes(num_changes_);
  return result;
}

void node_policy::add_standbys(google::protobuf::RepeatedPtrField<proto::StandbyView>& to) const {
  for (const auto& [name, s] : standbys_) {
    if (s.pid == 0)
      continue;
    auto* view = to.Add();
    view->set_name(name);
    view->set_pid(s.pid);
    view->set_state(!s.ready ? proto::STARTING : s.is_loading ? proto::LOADING : proto::RUNNING);
  }
}

node_policy::effects node_policy::assigned(const proto::NodeAssignment& assignment) {
  effects out;
  if (assigned_ && assignment.version() < assignment_version_)
    return out;
  assigned_ = true;
  assignment_version_ = assignment.version();
  plan_ = assignment.plan();
  std::set<std::string> here;
  std::vector<worker*> changed;
  for (const auto& known : assignment.known()) {
    restart_policy policy(plan_.max_restarts(), std::chrono::seconds(plan_.within_s()));
    auto [found, is_new] = workers_.try_emplace(known.plan().name(), policy);
    auto& w = found->second;
    for (const auto& actor : known.plan().actors())
      here.insert(actor.id());
    // A controller that forgot everything must not have a name and a number given twice.
    w.view.set_incarnation(std::max(
      {w.view.incarnation(), known.incarnation(), (incarnation_ - 1) * incarnations_of_a_node}));
    if (!is_new && same_actors(w.view.plan(), known.plan()))
      continue;
    *w.view.mutable_plan() = known.plan();
    w.view.set_host(host_);
    changed.push_back(&w);
  }
  std::erase_if(kv_, [&](const auto& entry) {
    if (here.count(entry.first) != 0)
      return false;
    out.emplace_back(drop_memory{entry.first});
    return true;
  });
  for (const auto* w : changed)
    for (auto& [name, s] : standbys_)
      if (s.loads_for == w->view.plan().name()) {
        s.ready = false;
        out.emplace_back(kill_process{s.process});
      }
  for (auto* w : changed) {
    w->gave_up = false;
    w->last_error.reset();
    w->retry.reset();
    if (w->process) {
      out.emplace_back(
        note{false, fmt::format("{} is to run other actors; replacing it", w->view.plan().name())});
      w->replacing = true;
      out.emplace_back(kill_process{*w->process});
    } else {
      begin(*w, out);
    }
  }
  keep_standbys(out);
  return out;
}

node_policy::effects node_policy::view_changed(const proto::ClusterView& view) {
  effects out;
  if (view.version() <= view_.version())
    return out;
  view_ = view;
  for (const auto& [name, w] : workers_)
    if (w.is_connected)
      out.emplace_back(send_view{*w.process});
  return out;
}

/// Starts what the worker is assigned, from nothing; memory that is there stays.
void node_policy::begin(worker& w, effects& out) {
  w.view.clear_kv();
  w.view.clear_error();
  w.awaits_memory = false;
  if (w.view.plan().actors().empty()) {
    w.view.set_state(proto::IDLE);
    w.view.clear_pid();
    return;
  }
  keep_memory missing{w.view.plan().name(), {}};
  for (const auto& actor : w.view.plan().actors())
    if (actor.kv_bytes() != 0 && kv_.count(actor.id()) == 0)
      missing.actors.emplace_back(actor.id(), actor.kv_bytes());
  if (missing.actors.empty()) {
    begin_with_memory(w, out);
    return;
  }
  w.awaits_memory = true;
  out.emplace_back(std::move(missing));
}

void node_policy::begin_with_memory(worker& w, effects& out) {
  for (const auto& actor : w.view.plan().actors()) {
    if (actor.kv_bytes() == 0)
      continue;
    auto [known, is_new] = kv_.try_emplace(actor.id(), 0);
    if (is_new)
      known->second = generations_() | 1U;
    auto* kv = w.view.add_kv();
    kv->set_actor(actor.id());
    kv->set_generation(known->second);
  }
  start(w, out);
}

node_policy::effects node_policy::memory_kept(const std::string& worker) {
  effects out;
  auto found = workers_.find(worker);
  if (found == workers_.end() || !found->second.awaits_memory)
    return out;
  found->second.awaits_memory = false;
  begin_with_memory(found->second, out);
  keep_standbys(out);
  return out;
}

node_policy::effects node_policy::memory_refused(const std::string& worker, const error& why) {
  effects out;
  auto found = workers_.find(worker);
  if (found == workers_.end() || !found->second.awaits_memory)
    return out;
  auto& w = found->second;
  w.awaits_memory = false;
  for (const auto& actor : w.view.plan().actors())
    if (actor.kv_bytes() != 0 && kv_.count(actor.id()) == 0)
      out.emplace_back(drop_memory{actor.id()}); // some of it may have been had
  give_up(w, why, out);
  keep_standbys(out);
  return out;
}

proto::WorkerAssignment node_policy::assignment_of(const worker& w) const {
  proto::WorkerAssignment assignment;
  *assignment.mutable_plan() = plan_;
  assignment.set_name(w.view.plan().name());
  assignment.set_incarnation(w.view.incarnation());
  *assignment.mutable_actors() = w.view.plan().actors();
  assignment.set_device(w.view.plan().device());
  return assignment;
}

/// What a process needs to know to be this worker.
void node_policy::assign_to(const worker& w, effects& out) const {
  out.emplace_back(assign{*w.process, assignment_of(w)});
  out.emplace_back(send_view{*w.process});
}

bool node_policy::needs_predecessor_gone(const worker& w, bool is_new_process) const {
  if (w.ending.empty() || !w.view.plan().device().starts_with("cuda:"))
    return false;
  const auto& actors = w.view.plan().actors();
  const bool shares_memory = std::any_of(w.ending.begin(), w.ending.end(), [&](const auto& e) {
    const bool same_outbox = e.second.incarnation % 2 == w.view.incarnation() % 2;
    return std::any_of(actors.begin(), actors.end(), [&](const auto& a) {
      const bool leaves_rows = a.index() + 1 < plan_.num_stages();
      return a.kind() == proto::STAGE
             && (e.second.was_stuck || plan_.draft_tokens() > 0 || (leaves_rows && same_outbox));
    });
  });
  return is_new_process || shares_memory;
}

/// The next incarnation: a standby where one is ready, else a new process.
void node_policy::start(worker& w, effects& out) {
  w.view.set_incarnation(w.view.incarnation() + 1);
  w.view.set_state(proto::STARTING);
  w.view.clear_port();
  w.view.clear_transport_address();
  w.is_connected = false;
  w.retry.reset();
  const auto& name = w.view.plan().name();
  auto ready = standby_for(name);
  w.awaits_end = needs_predecessor_gone(w, ready == standbys_.end());
  if (ready == standbys_.end()) {
    w.process = process_name_of(name, w.view.incarnation());
    out.emplace_back(start_process{*w.process, name, w.view.incarnation()});
    return;
  }
  out.emplace_back(note{false, fmt::format("{} takes the place of {}", ready->first, name)});
  w.process = ready->second.process;
  w.view.set_pid(ready->second.pid);
  w.is_connected = true;
  standbys_.erase(ready);
  if (!w.awaits_end)
    assign_to(w, out);
  proto::WorkerChanged change;
  change.set_restored_by("standby");
  report(w, std::move(change), out);
}

node_policy::effects node_policy::started(const std::string& process, std::uint32_t pid) {
  effects out;
  if (auto s = standby_of(process); s != standbys_.end()) {
    s->second.pid = pid;
    keep_standbys(out);
  } else if (auto* w = worker_of(process)) {
    w->view.set_pid(pid);
    proto::WorkerChanged change;
    change.set_restored_by("restart");
    report(*w, std::move(change), out);
  }
  return out;
}

node_policy::effects node_policy::not_started(const std::string& process, const error& why,
                                              time_point now) {
  effects out;
  out.emplace_back(note{true, why.text()});
  if (auto s = standby_of(process); s != standbys_.end()) {
    standbys_.erase(s);
    standby_lost_ = now;
  } else if (auto* w = worker_of(process)) {
    w->last_error = why;
    lose(*w, {why.cause, "exit", now, false}, now, out);
  }
  return out;
}

/// The one that has least to do yet.
std::map<std::string, node_policy::standby>::iterator
node_policy::standby_for(const std::string& worker) {
  auto work_left = [&](const standby& s) {
    if (s.loads_for == worker)
      return s.is_loading ? 1 : 0;
    return s.loads_for.empty() ? 2 : 3;
  };
  auto best = standbys_.end();
  for (auto s = standbys_.begin(); s != standbys_.end(); ++s)
    if (s->second.ready
        && (best == standbys_.end() || work_left(s->second) < work_left(best->second)))
      best = s;
  return best;
}

/// Weights are there only once a worker runs. One standby at a time for each worker: what it
/// computes meanwhile slows down a GPU that is judged by how long it takes.
void node_policy::load_ahead(effects& out) {
  for (auto& [name, s] : standbys_) {
    if (!s.ready || !s.loads_for.empty())
      continue;
    const worker* chosen = nullptr;
    std::ptrdiff_t fewest = 0;
    for (const auto& [of, w] : workers_) {
      if (w.view.state() != proto::RUNNING || !w.process || w.replacing
          || !w.view.plan().device().starts_with("cuda:"))
        continue;
      std::ptrdiff_t others = 0;
      bool is_taken = false;
      for (const auto& [_, other] : standbys_)
        if (other.loads_for == of) {
          ++others;
          is_taken |= other.is_loading;
        }
      if (is_taken)
        continue;
      if (chosen == nullptr || others < fewest) {
        chosen = &w;
        fewest = others;
      }
    }
    if (chosen == nullptr)
      return;
    s.loads_for = chosen->view.plan().name();
    s.is_loading = true;
    auto assignment = assignment_of(*chosen);
    assignment.clear_name();
    assignment.clear_incarnation();
    out.emplace_back(assign{s.process, std::move(assignment)});
  }
}

/// One at a time, so that a system that starts no process is asked once.
void node_policy::keep_standbys(effects& out) {
  bool is_waiting =
    std::any_of(standbys_.begin(), standbys_.end(), [](const auto& s) { return s.second.pid == 0; })
    || std::any_of(workers_.begin(), workers_.end(),
                   [](const auto& w) { return w.second.awaits_memory; }); // workers go first
  if (!assigned_ || is_waiting || standbys_.size() >= plan_.standbys())
    return;
  auto name = fmt::format("{}/standby-{}", node_, next_standby_++);
  auto process = process_name_of(name, standby_incarnation);
  standbys_.emplace(name, standby{process});
  out.emplace_back(start_process{std::move(process), std::move(name), standby_incarnation});
}

std::optional<std::string> node_policy::process_of(const proto::WorkerHello& hello) const {
  if (auto s = standbys_.find(hello.name()); s != standbys_.end())
    return s->second.process;
  auto started_as = process_name_of(hello.name(), hello.incarnation());
  for (const auto& [name, w] : workers_) {
    if (!w.process || w.replacing)
      continue;
    // A standby whose connection broke just then does not know yet whom it replaces.
    if ((name == hello.name() && w.view.incarnation() == hello.incarnation())
        || *w.process == started_as)
      return w.process;
  }
  return std::nullopt;
}

node_policy::effects node_policy::process_connected(const std::string& process) {
  effects out;
  if (standby_of(process) != standbys_.end()) {
    proto::WorkerAssignment prepare;
    *prepare.mutable_plan() = plan_;
    out.emplace_back(assign{process, std::move(prepare)});
  } else if (auto* w = worker_of(process)) {
    w->is_connected = true;
    if (!w->awaits_end)
      assign_to(*w, out);
  }
  return out;
}

void node_policy::take_standby_report(const std::string& name, const proto::WorkerView& said,
                                      effects& out) {
  auto& s = standbys_.at(name);
  s.ready = said.state() == proto::RUNNING;
  s.is_loading = false;
  if (said.state() == proto::FAILED) {
    out.emplace_back(note{true, fmt::format("{}: {}", name, from_proto(said.error()).text())});
    load_ahead(out);
    return;
  }
  load_ahead(out);
  say_hello(out); // which tells of the standbys
}

node_policy::effects node_policy::process_reported(const proto::WorkerReport& report_of_it) {
  effects out;
  const auto& said = report_of_it.worker();
  const auto& name = said.plan().name();
  if (standbys_.count(name) != 0) {
    take_standby_report(name, said, out);
    return out;
  }
  auto found = workers_.find(name);
  if (found == workers_.end() || found->second.view.incarnation() != said.incarnation()
      || !found->second.process || found->second.replacing)
    return out;
  auto& w = found->second;
  if (said.state() == proto::FAILED) {
    // It exits next and is restarted, unless a restart cannot help.
    w.last_error = from_proto(said.error());
    out.emplace_back(note{true, fmt::format("{} cannot start: {}", name, w.last_error->text())});
    if (is_permanent(w.last_error->code))
      give_up(w, *w.last_error, out);
    return out;
  }
  w.view.set_state(said.state());
  w.view.set_pid(said.pid());
  w.view.set_port(said.port());
  w.view.set_transport_address(said.transport_address());
  report(w, {}, out);
  if (said.state() == proto::RUNNING) {
    keep_standbys(out);
    load_ahead(out);
  }
  return out;
}

void node_policy::give_up(worker& w, const error& why, effects& out) {
  out.emplace_back(note{true, fmt::format("{} is given up: {}", w.view.plan().name(), why.text())});
  w.gave_up = true;
  w.view.set_state(proto::FAILED);
  *w.view.mutable_error() = to_proto(why);
  proto::WorkerChanged change;
  change.set_cause(why.cause);
  report(w, std::move(change), out);
}

/// The worker's process is gone, or could not be started: what is next.
void node_policy::lose(worker& w, const loss& what, time_point now, effects& out) {
  w.process.reset();
  w.is_connected = false;
  if (w.gave_up)
    return;
  w.view.set_state(proto::LOST);
  proto::WorkerChanged change;
  change.set_cause(what.cause);
  change.set_detected_by(what.detected_by);
  change.set_detect_ms(std::chrono::duration<double, std::milli>(now - what.detected).count());
  change.set_detected_ns(nanoseconds(what.detected));
  report(w, std::move(change), out);
  if (!w.restarts.allow(now)) {
    auto why = fail(error_code::unavailable,
                    fmt::format("{} died more than {} times in {} s, last: {}",
                                w.view.plan().name(), plan_.max_restarts(), plan_.within_s(),
                                w.last_error ? w.last_error->cause : what.cause),
                    "see its log; recovery.max_restarts and within_s bound the restarts");
    give_up(w, why.value(), out);
  } else if (what.was_running) {
    start(w, out);
  } else {
    w.retry = now + restart_policy::spawn_retry_interval;
  }
}

node_policy::effects node_policy::process_ending(const process_end& end, time_point now) {
  auto* w = worker_of(end.process);
  if (w == nullptr)
    return process_exited(end, now); // nobody takes the place of a standby
  if (w->replacing)
    return {}; // what it has may be too much beside what its successor is to have
  w->ending.emplace(end.process, ending_process{w->view.incarnation(), !end.verdict.empty()});
  return process_lost(*w, end, now);
}

node_policy::effects node_policy::process_lost(worker& w, const process_end& end, time_point now) {
  effects out;
  auto cause = end.verdict.empty() ? end.text : end.verdict + "; it was killed";
  out.emplace_back(
    note{true, fmt::format("{} (pid {}) {}", w.view.plan().name(), w.view.pid(), cause)});
  if (w.replacing) {
    w.replacing = false;
    w.process.reset();
    w.is_connected = false;
    begin(w, out);
  } else {
    lose(w, {cause, end.verdict.empty() ? "exit" : "pulse", end.detected}, now, out);
  }
  keep_standbys(out);
  return out;
}

node_policy::effects node_policy::process_exited(const process_end& end, time_point now) {
  effects out;
  for (auto& [name, w] : workers_)
    if (w.ending.erase(end.process) > 0) {
      if (w.ending.empty() && std::exchange(w.awaits_end, false) && w.process && w.is_connected)
        assign_to(w, out);
      return out;
    }
  auto cause = end.verdict.empty() ? end.text : end.verdict + "; it was killed";
  if (auto s = standby_of(end.process); s != standbys_.end()) {
    out.emplace_back(note{true, fmt::format("{} (pid {}) {}", s->first, s->second.pid, cause)});
    standbys_.erase(s);
    standby_lost_ = now;
    say_hello(out); // which tells of the standbys
    return out;
  }
  auto* w = worker_of(end.process);
  return w == nullptr ? out : process_lost(*w, end, now);
}

node_policy::effects node_policy::tick(time_point now) {
  effects out;
  for (auto& [name, w] : workers_)
    if (w.retry && *w.retry <= now)
      start(w, out);
  if (!standby_lost_ || now - *standby_lost_ > standby_pause)
    keep_standbys(out);
  return out;
}

} // namespace troupe::recovery
