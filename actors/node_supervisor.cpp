#include "troupe/actors/node_supervisor.hpp"

#include "troupe/actors/convert.hpp"
#include "troupe/actors/dial.hpp"
#include "troupe/base/fault_point.hpp"
#include "troupe/base/identity.hpp"
#include "troupe/recovery/relocation.hpp"

#include <algorithm>
#include <chrono>
#include <csignal>
#include <random>
#include <set>

#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

namespace troupe::actors {

using namespace messages;
using namespace std::chrono_literals;

namespace {

/// Pause between two attempts to reach the controller.
constexpr auto redial_interval = 200ms;

/// What running workers get to end by themselves.
constexpr auto stop_grace = 1000ms;

/// Pause before a process that could not be started is tried again.
constexpr auto spawn_retry_interval = 200ms;

/// Pause after a standby has died by itself.
constexpr auto standby_pause = 1000ms;

/// What a new process gets until its first beat.
constexpr auto birth_time = 10s;

/// How far apart the incarnations lie that two incarnations of a node begin to count from.
constexpr std::uint64_t incarnations_of_a_node = 100'000;

constexpr const char* controller_name = "controller";

/// Names memory that was never there before.
std::uint64_t new_generation() {
  std::random_device random;
  return (std::uint64_t{random()} << 32U | random()) | 1U;
}

} // namespace

node_supervisor::node_supervisor(caf::actor_config& config, node_options options)
  : node_supervisor_local::base(config), options_(std::move(options)) {
  set_down_handler([this](caf::down_msg& down) {
    if (controller_ && controller_.address() == down.source) {
      spdlog::warn("the connection to the controller broke; the workers go on");
      controller_ = nullptr;
      delayed_send(this, redial_interval, redial_atom::value);
    }
  });
}

node_supervisor::~node_supervisor() = default;

void node_supervisor::dial_controller() {
  dial<cluster_supervisor_actor>(
    this, options_.controller_host, options_.controller_port, 2000ms,
    [this](cluster_supervisor_actor controller) {
      controller_ = std::move(controller);
      monitor(controller_);
      say_hello();
    },
    [this](const error& e) {
      spdlog::debug("{}", e.text());
      delayed_send(this, redial_interval, redial_atom::value);
    });
}

void node_supervisor::add_standbys(
  google::protobuf::RepeatedPtrField<proto::StandbyView>& to) const {
  for (const auto& [name, s] : standbys_) {
    auto* view = to.Add();
    view->set_name(name);
    view->set_pid(static_cast<std::uint32_t>(s.process.pid));
    view->set_state(s.ready ? proto::RUNNING : proto::STARTING);
  }
}

void node_supervisor::say_hello() {
  proto::NodeHello hello;
  hello.set_name(options_.name);
  hello.set_host(host_name());
  hello.set_pid(static_cast<std::uint32_t>(::getpid()));
  hello.set_incarnation(options_.incarnation);
  hello.set_memory_bytes(host_memory_bytes());
  *hello.mutable_view() = view_;
  add_standbys(*hello.mutable_standbys());
  for (const auto& [name, w] : workers_)
    *hello.add_workers() = w.view;
  num_changes_ = 0;
  send(controller_, node_hello{std::move(hello)});
}

void node_supervisor::send_heartbeat() {
  proto::NodeHeartbeat heartbeat;
  heartbeat.set_name(options_.name);
  heartbeat.set_incarnation(options_.incarnation);
  heartbeat.set_view_version(view_.version());
  heartbeat.set_assignment_version(assignment_version_);
  heartbeat.set_num_changes(num_changes_);
  send(controller_, node_heartbeat{std::move(heartbeat)});
}

void node_supervisor::report(const worker& w, proto::WorkerChanged change) {
  if (!controller_)
    return; // said again in the next hello
  *change.mutable_worker() = w.view;
  add_standbys(*change.mutable_standbys());
  ++num_changes_;
  send(controller_, worker_changed{std::move(change)});
}

void node_supervisor::adopt(const proto::NodeAssignment& assignment) {
  if (assigned_ && assignment.version() < assignment_version_)
    return;
  assigned_ = true;
  assignment_version_ = assignment.version();
  plan_ = assignment.plan();
  std::set<std::string> here;
  std::vector<worker*> changed;
  for (const auto& known : assignment.known()) {
    const auto& name = known.plan().name();
    recovery::restart_policy policy(plan_.max_restarts(), std::chrono::seconds(plan_.within_s()));
    auto [found, is_new] = workers_.try_emplace(name, policy);
    auto& w = found->second;
    for (const auto& actor : known.plan().actors())
      here.insert(actor.id());
    // A controller that forgot everything must not have a name and a number given twice.
    w.view.set_incarnation(std::max({w.view.incarnation(), known.incarnation(),
                                     (options_.incarnation - 1) * incarnations_of_a_node}));
    if (!is_new && recovery::same_actors(w.view.plan(), known.plan()))
      continue;
    *w.view.mutable_plan() = known.plan();
    w.view.set_host(options_.bind);
    changed.push_back(&w);
  }
  std::erase_if(kv_, [&](const auto& entry) { return here.count(entry.first) == 0; });
  for (auto* w : changed) {
    w->gave_up = false;
    w->last_error.reset();
    w->retry.reset();
    if (w->process) {
      spdlog::info("{} is to run other actors; replacing it", w->view.plan().name());
      w->replacing = true;
      children_->signal(w->process->name, SIGKILL);
    } else {
      begin(*w);
    }
  }
  keep_standbys();
}

/// Starts what the worker is assigned, from nothing.
void node_supervisor::begin(worker& w) {
  w.view.clear_kv();
  w.view.clear_error();
  w.handle = nullptr;
  if (w.view.plan().actors().empty()) {
    w.view.set_state(proto::IDLE);
    w.view.clear_pid();
    return;
  }
  if (auto kept = keep_memory(w); !kept) {
    give_up(w, kept.error());
    return;
  }
  start_worker(w, "restart");
}

/// Sees to it that there is memory for the KV pages of each stage; what is there stays.
expected<void> node_supervisor::keep_memory(worker& w) {
  w.view.clear_kv();
  for (const auto& actor : w.view.plan().actors()) {
    if (actor.kv_bytes() == 0)
      continue;
    auto found = kv_.find(actor.id());
    if (found == kv_.end()) {
      auto segment =
        memory::segment::create("troupe:" + plan_.cluster() + "/" + actor.id(), actor.kv_bytes());
      if (!segment)
        return tl::unexpected(segment.error());
      found = kv_.emplace(actor.id(), kv_memory{std::move(*segment), new_generation()}).first;
    }
    auto* kv = w.view.add_kv();
    kv->set_actor(actor.id());
    kv->set_generation(found->second.generation);
  }
  return {};
}

expected<node_supervisor::child> node_supervisor::spawn(const std::string& name,
                                                        std::uint64_t incarnation) {
  child c;
  c.name = fmt::format("{}#{}", name, incarnation);
  child_spec spec;
  spec.name = c.name;
  spec.arguments = {"worker",
                    "--name",
                    name,
                    "--incarnation",
                    std::to_string(incarnation),
                    "--node",
                    fmt::format("{}:{}", options_.bind, port_),
                    "--heartbeat-ms",
                    std::to_string(options_.heartbeat_ms),
                    "--log-level",
                    options_.log_level};
  if (!plan_.unprotected()) {
    auto page = memory::pulse_page::create();
    if (!page)
      return tl::unexpected(page.error());
    spec.inherited_fds.push_back(page->fd());
    spec.arguments.insert(spec.arguments.end(), {"--pulse-fd", std::to_string(page->fd())});
    c.page = std::move(*page);
    auto patience = std::chrono::milliseconds(plan_.hang_ms());
    c.monitor.emplace(patience, birth_time, patience / 8);
    c.monitor->born(std::chrono::steady_clock::now());
  }
  if (!options_.log_directory.empty())
    spec.log_path =
      fmt::format("{}/{}.log", options_.log_directory,
                  name.substr(0, name.find('/')) + "-" + name.substr(name.find('/') + 1));
  auto pid = children_->spawn(std::move(spec));
  if (!pid)
    return tl::unexpected(pid.error());
  c.pid = *pid;
  return c;
}

void node_supervisor::keep_standbys() {
  if (!assigned_ || !children_)
    return;
  while (standbys_.size() < plan_.standbys()) {
    auto name = fmt::format("{}/standby-{}", options_.name, next_standby_++);
    auto started = spawn(name, 1);
    if (!started) {
      spdlog::warn("{}", started.error().text());
      standby_lost_ = std::chrono::steady_clock::now();
      return;
    }
    standbys_.emplace(name, standby{std::move(*started), {}, false});
  }
}

proto::WorkerAssignment node_supervisor::assignment_of(const worker& w) const {
  proto::WorkerAssignment assignment;
  *assignment.mutable_plan() = plan_;
  assignment.set_name(w.view.plan().name());
  assignment.set_incarnation(w.view.incarnation());
  *assignment.mutable_actors() = w.view.plan().actors();
  for (const auto& actor : w.view.plan().actors()) {
    auto found = kv_.find(actor.id());
    if (found == kv_.end())
      continue;
    auto* kv = assignment.add_kv();
    kv->set_actor(actor.id());
    kv->set_owner_pid(static_cast<std::uint32_t>(::getpid()));
    kv->set_owner_fd(found->second.segment.fd());
    kv->set_bytes(found->second.segment.size());
  }
  return assignment;
}

void node_supervisor::start_worker(worker& w, const std::string& how) {
  w.view.set_incarnation(w.view.incarnation() + 1);
  w.view.set_state(proto::STARTING);
  w.view.clear_port();
  w.view.clear_transport_address();
  w.handle = nullptr;
  w.retry.reset();
  proto::WorkerChanged change;
  change.set_restored_by(how);
  auto ready =
    std::find_if(standbys_.begin(), standbys_.end(), [](const auto& s) { return s.second.ready; });
  if (ready != standbys_.end()) {
    w.process = std::move(ready->second.process);
    w.handle = ready->second.handle;
    spdlog::info("{} takes the place of {}", ready->first, w.view.plan().name());
    standbys_.erase(ready);
    w.view.set_pid(static_cast<std::uint32_t>(w.process->pid));
    send(w.handle, worker_assignment{assignment_of(w)});
    send(w.handle, cluster_view{view_});
    change.set_restored_by("standby");
    report(w, std::move(change));
    return;
  }
  auto started = spawn(w.view.plan().name(), w.view.incarnation());
  if (!started) {
    spdlog::error("{}", started.error().text());
    w.last_error = started.error();
    lose(w, started.error().cause, "exit", std::chrono::steady_clock::now());
    return;
  }
  w.process = std::move(*started);
  w.view.set_pid(static_cast<std::uint32_t>(w.process->pid));
  report(w, std::move(change));
}

void node_supervisor::give_up(worker& w, const error& why) {
  spdlog::error("{} is given up: {}", w.view.plan().name(), why.text());
  w.gave_up = true;
  w.view.set_state(proto::FAILED);
  *w.view.mutable_error() = to_proto(why);
  proto::WorkerChanged change;
  change.set_cause(why.cause);
  report(w, std::move(change));
}

/// The worker's process is gone, or could not be started: what is next.
void node_supervisor::lose(worker& w, const std::string& cause, const std::string& detected_by,
                           time_point detected) {
  auto now = std::chrono::steady_clock::now();
  const auto name = w.view.plan().name();
  bool was_started = w.process.has_value();
  w.process.reset();
  w.handle = nullptr;
  if (w.gave_up)
    return;
  w.view.set_state(proto::LOST);
  proto::WorkerChanged change;
  change.set_cause(cause);
  change.set_detected_by(detected_by);
  change.set_detect_ms(std::chrono::duration<double, std::milli>(now - detected).count());
  change.set_detected_ns(static_cast<std::uint64_t>(
    std::chrono::duration_cast<std::chrono::nanoseconds>(detected.time_since_epoch()).count()));
  report(w, std::move(change));
  if (!w.restarts.allow(now)) {
    give_up(w, error{error_code::unavailable,
                     fmt::format("{} died more than {} times in {} s, last: {}", name,
                                 plan_.max_restarts(), plan_.within_s(),
                                 w.last_error ? w.last_error->cause : cause),
                     "see its log; recovery.max_restarts and within_s bound the restarts",
                     host_name() + "/" + process_name()});
    return;
  }
  if (was_started)
    start_worker(w, "restart");
  else
    w.retry = now + spawn_retry_interval;
}

void node_supervisor::child_exited(const child_exit& exit) {
  faults::suffer(faults::point::node_exit_seen, exit.name);
  for (auto i = standbys_.begin(); i != standbys_.end(); ++i) {
    if (i->second.process.pid != exit.pid)
      continue;
    spdlog::warn("{} (pid {}) {}", i->first, exit.pid, exit.text());
    standbys_.erase(i);
    // Not at once: a standby that cannot live must not keep the node busy.
    standby_lost_ = std::chrono::steady_clock::now();
    if (controller_)
      say_hello(); // which tells of the standbys
    return;
  }
  for (auto& [name, w] : workers_) {
    if (!w.process || w.process->pid != exit.pid)
      continue;
    const auto& c = *w.process;
    auto cause = c.verdict.empty() ? exit.text() : c.verdict + "; it was killed";
    spdlog::warn("{} (pid {}) {}", name, exit.pid, cause);
    if (w.replacing) {
      w.replacing = false;
      w.process.reset();
      begin(w);
    } else {
      lose(w, cause, c.verdict.empty() ? "exit" : "pulse",
           c.verdict.empty() ? exit.detected : c.judged);
    }
    keep_standbys();
    return;
  }
}

void node_supervisor::judge(child& c, time_point now) {
  if (!c.page || !c.monitor || !c.verdict.empty())
    return;
  c.page->sample(sample_);
  auto state = [&] { return task_state(c.pid, sample_.beat_thread); };
  auto why = c.monitor->look(sample_, now, [&] { return state() == 'R' || state() == 'D'; });
  if (!why)
    return;
  c.verdict = *why;
  if (state() == 'T')
    c.verdict += ", it was stopped by a signal";
  c.judged = now;
  spdlog::error("{} (pid {}): {}; killing it", c.name, c.pid, c.verdict);
  children_->signal(c.name, SIGKILL);
}

void node_supervisor::look_at_pulses(time_point now) {
  for (auto& [name, w] : workers_)
    if (w.process)
      judge(*w.process, now);
  for (auto& [name, s] : standbys_)
    judge(s.process, now);
}

node_supervisor::behavior_type node_supervisor::make_behavior() {
  return {
    [this](const node_assignment& assignment) {
      if (!faults::is_cut_off(controller_name))
        adopt(assignment.body);
    },
    [this](const cluster_view& view) {
      if (faults::is_cut_off(controller_name) || view->version() <= view_.version())
        return;
      view_ = view.body;
      for (auto& [name, w] : workers_)
        if (w.handle)
          send(w.handle, view);
    },
    [this](const node_heartbeat& answer) {
      if (!faults::is_cut_off(controller_name) && controller_ && answer->say_hello())
        say_hello();
    },
    [this](const worker_hello& hello) {
      auto sender = caf::actor_cast<worker_actor>(current_sender());
      if (auto s = standbys_.find(hello->name()); s != standbys_.end()) {
        s->second.handle = sender;
        proto::WorkerAssignment prepare;
        *prepare.mutable_plan() = plan_;
        send(sender, worker_assignment{std::move(prepare)});
        return;
      }
      auto found = workers_.find(hello->name());
      if (found == workers_.end() || found->second.view.incarnation() != hello->incarnation()) {
        spdlog::warn("refused a worker {} of incarnation {}", hello->name(), hello->incarnation());
        return;
      }
      auto& w = found->second;
      w.handle = sender;
      send(w.handle, worker_assignment{assignment_of(w)});
      send(w.handle, cluster_view{view_});
    },
    [this](const worker_report& said) {
      const auto& reported = said->worker();
      if (auto s = standbys_.find(reported.plan().name()); s != standbys_.end()) {
        s->second.ready = reported.state() == proto::RUNNING;
        if (reported.state() == proto::FAILED)
          spdlog::error("{}: {}", s->first, from_proto(reported.error()).text());
        else if (controller_)
          say_hello();
        return;
      }
      auto found = workers_.find(reported.plan().name());
      if (found == workers_.end() || found->second.view.incarnation() != reported.incarnation()
          || found->second.replacing)
        return;
      auto& w = found->second;
      if (reported.state() == proto::FAILED) {
        // It exits next and is restarted, unless a restart cannot help.
        w.last_error = from_proto(reported.error());
        spdlog::error("{} cannot start: {}", reported.plan().name(), w.last_error->text());
        if (is_permanent(w.last_error->code))
          give_up(w, *w.last_error);
        return;
      }
      w.view.set_state(reported.state());
      w.view.set_pid(reported.pid());
      w.view.set_port(reported.port());
      w.view.set_transport_address(reported.transport_address());
      report(w);
      if (reported.state() == proto::RUNNING)
        keep_standbys();
    },
    [this](start_atom, std::uint16_t port) {
      port_ = port;
      auto self = caf::actor_cast<node_supervisor_local>(this);
      auto children =
        child_processes::start([self](const child_exit& exit) { caf::anon_send(self, exit); });
      if (!children) {
        spdlog::critical("{}", children.error().text());
        quit(caf::exit_reason::kill);
        return;
      }
      children_ = std::move(*children);
      dial_controller();
      delayed_send(this, 1ms, tick_atom::value);
    },
    [this](redial_atom) {
      if (!controller_)
        dial_controller();
    },
    [this](tick_atom) {
      auto now = std::chrono::steady_clock::now();
      auto heartbeat = std::chrono::milliseconds(options_.heartbeat_ms);
      auto look = std::chrono::milliseconds(plan_.hang_ms() == 0 ? 800 : plan_.hang_ms()) / 8;
      delayed_send(this, std::min(heartbeat, look), tick_atom::value);
      if (controller_ && now - last_heartbeat_ >= heartbeat * 9 / 10) {
        last_heartbeat_ = now;
        send_heartbeat();
      }
      look_at_pulses(now);
      for (auto& [name, w] : workers_)
        if (w.retry && *w.retry <= now)
          start_worker(w, "restart");
      if (now - standby_lost_ > standby_pause)
        keep_standbys();
    },
    [this](knock_atom) {
      if (options_.pulse)
        options_.pulse->answered();
    },
    [this](const child_exit& exit) { child_exited(exit); },
    [this](stop_atom) {
      if (children_)
        children_->stop_all(stop_grace);
      children_.reset();
      quit();
    },
  };
}

} // namespace troupe::actors
