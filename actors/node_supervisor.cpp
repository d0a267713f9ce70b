#include "troupe/actors/node_supervisor.hpp"

#include "troupe/actors/convert.hpp"
#include "troupe/actors/dial.hpp"
#include "troupe/base/identity.hpp"

#include <chrono>

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

} // namespace

node_supervisor::node_supervisor(caf::actor_config& config, node_options options)
  : node_supervisor_local::base(config), options_(std::move(options)) {
  set_down_handler([this](caf::down_msg& down) {
    if (controller_ && controller_.address() == down.source) {
      spdlog::warn("the connection to the controller broke; the workers go on");
      controller_ = nullptr;
      delayed_send(this, redial_interval, tick_atom::value);
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
      delayed_send(this, redial_interval, tick_atom::value);
    });
}

void node_supervisor::say_hello() {
  proto::NodeHello hello;
  hello.set_name(options_.name);
  hello.set_host(host_name());
  hello.set_pid(static_cast<std::uint32_t>(::getpid()));
  hello.set_incarnation(options_.incarnation);
  hello.set_epoch(view_.epoch());
  hello.set_view_version(view_.version());
  for (const auto& [name, w] : workers_)
    *hello.add_workers() = w.view;
  send(controller_, node_hello{std::move(hello)});
}

void node_supervisor::report(const worker& w, const std::string& cause, double detect_ms) {
  if (!controller_)
    return; // said again in the next hello
  proto::WorkerChanged change;
  *change.mutable_worker() = w.view;
  change.set_cause(cause);
  change.set_detect_ms(detect_ms);
  send(controller_, worker_changed{std::move(change)});
}

void node_supervisor::adopt(const proto::NodeAssignment& assignment) {
  if (!workers_.empty())
    return; // a controller that came back repeats what it said
  plan_ = assignment.plan();
  for (const auto& planned : plan_.workers()) {
    if (planned.node() != options_.name)
      continue;
    worker w{{},
             {},
             recovery::restart_policy(plan_.max_restarts(), std::chrono::seconds(plan_.within_s())),
             {},
             {},
             false};
    *w.view.mutable_plan() = planned;
    w.view.set_host(options_.bind);
    w.view.set_kv_generation(options_.incarnation);
    for (const auto& known : assignment.known())
      if (known.plan().name() == planned.name())
        w.view.set_incarnation(known.incarnation());
    auto& kept = workers_.emplace(planned.name(), std::move(w)).first->second;
    for (const auto& actor : planned.actors()) {
      if (actor.kv_bytes() == 0)
        continue;
      auto segment =
        memory::segment::create("troupe:" + plan_.cluster() + "/" + actor.id(), actor.kv_bytes());
      if (!segment) {
        give_up(kept, segment.error());
        return;
      }
      kept.kv.emplace_back(actor.id(), std::move(*segment));
    }
    start_worker(kept);
  }
}

void node_supervisor::start_worker(worker& w) {
  w.view.set_incarnation(w.view.incarnation() + 1);
  w.view.set_state(proto::STARTING);
  w.view.clear_port();
  w.view.clear_transport_address();
  w.handle = nullptr;
  const auto& name = w.view.plan().name();

  child_spec spec;
  spec.name = name;
  spec.arguments = {"worker",
                    "--name",
                    name,
                    "--incarnation",
                    std::to_string(w.view.incarnation()),
                    "--node",
                    fmt::format("{}:{}", options_.bind, port_),
                    "--heartbeat-ms",
                    std::to_string(plan_.heartbeat_ms()),
                    "--log-level",
                    options_.log_level};
  for (const auto& [actor, segment] : w.kv)
    spec.inherited_fds.push_back(segment.fd());
  if (!options_.log_directory.empty())
    spec.log_path =
      fmt::format("{}/{}.log", options_.log_directory,
                  name.substr(0, name.find('/')) + "-" + name.substr(name.find('/') + 1));
  auto pid = children_->spawn(std::move(spec));
  if (!pid) {
    give_up(w, pid.error());
    return;
  }
  w.view.set_pid(static_cast<std::uint32_t>(*pid));
  report(w, "", 0);
}

void node_supervisor::give_up(worker& w, const error& why) {
  spdlog::error("{} is given up: {}", w.view.plan().name(), why.text());
  w.gave_up = true;
  w.view.set_state(proto::FAILED);
  *w.view.mutable_error() = to_proto(why);
  report(w, why.cause, 0);
}

void node_supervisor::worker_exited(const child_exit& exit) {
  auto found = workers_.find(exit.name);
  if (found == workers_.end() || found->second.view.pid() != static_cast<std::uint32_t>(exit.pid))
    return;
  auto& w = found->second;
  w.handle = nullptr;
  if (w.gave_up)
    return;
  auto now = std::chrono::steady_clock::now();
  auto detect_ms = std::chrono::duration<double, std::milli>(now - exit.detected).count();
  spdlog::warn("{} (pid {}) {}", exit.name, exit.pid, exit.text());
  w.view.set_state(proto::LOST);
  report(w, exit.text(), detect_ms);
  if (!w.restarts.allow(now)) {
    give_up(w, error{error_code::unavailable,
                     fmt::format("{} died more than {} times in {} s, last: {}", exit.name,
                                 plan_.max_restarts(), plan_.within_s(),
                                 w.last_error ? w.last_error->cause : exit.text()),
                     "see its log; recovery.max_restarts and within_s bound the restarts",
                     host_name() + "/" + process_name()});
    return;
  }
  start_worker(w);
}

node_supervisor::behavior_type node_supervisor::make_behavior() {
  return {
    [this](const node_assignment& assignment) { adopt(assignment.body); },
    [this](const cluster_view& view) {
      if (view->version() <= view_.version())
        return;
      view_ = view.body;
      for (auto& [name, w] : workers_)
        if (w.handle)
          send(w.handle, view);
    },
    [this](const worker_hello& hello) {
      auto found = workers_.find(hello->name());
      if (found == workers_.end() || found->second.view.incarnation() != hello->incarnation()) {
        spdlog::warn("refused a worker {} of incarnation {}", hello->name(), hello->incarnation());
        return;
      }
      auto& w = found->second;
      w.handle = caf::actor_cast<worker_actor>(current_sender());
      proto::WorkerAssignment assignment;
      *assignment.mutable_plan() = plan_;
      assignment.set_name(hello->name());
      for (const auto& [actor, segment] : w.kv) {
        auto* kv = assignment.add_kv();
        kv->set_actor(actor);
        kv->set_inherited_fd(segment.fd());
        kv->set_bytes(segment.size());
      }
      send(w.handle, worker_assignment{std::move(assignment)});
      send(w.handle, cluster_view{view_});
    },
    [this](const worker_report& said) {
      const auto& reported = said->worker();
      auto found = workers_.find(reported.plan().name());
      if (found == workers_.end() || found->second.view.incarnation() != reported.incarnation())
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
      report(w, "", 0);
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
    },
    [this](tick_atom) {
      if (!controller_)
        dial_controller();
    },
    [this](const child_exit& exit) { worker_exited(exit); },
    [this](stop_atom) {
      if (children_)
        children_->stop_all(stop_grace);
      children_.reset();
      quit();
    },
  };
}

} // namespace troupe::actors
