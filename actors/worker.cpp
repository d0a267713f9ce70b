#include "troupe/actors/worker.hpp"

#include "troupe/actors/convert.hpp"
#include "troupe/actors/dial.hpp"
#include "troupe/base/fault_point.hpp"
#include "troupe/base/identity.hpp"

#include <chrono>
#include <exception>
#include <utility>

#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

namespace troupe::actors {

using namespace messages;
using namespace std::chrono_literals;

namespace {

/// Returned by the process when it could not load what it was asked to.
constexpr int exit_cannot_load = 4;

/// The same when another process has taken its place.
constexpr int exit_fenced = 5;

/// Lets the last report leave before the process ends.
constexpr auto farewell_time = 200ms;

/// Pause between two attempts to reach the node.
constexpr auto redial_interval = 200ms;

double ms_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin)
    .count();
}

} // namespace

load_outcome outcome_of(const std::function<void(load_outcome&)>& work) {
  load_outcome outcome;
  try {
    work(outcome);
  } catch (const std::exception& thrown) {
    outcome = {};
    outcome.failure = std::make_shared<error>(
      fail(error_code::resource_exhausted, fmt::format("cannot load: {}", thrown.what()),
           "see what else runs on this host, and its limits (`ulimit -a`)")
        .value());
  }
  return outcome;
}

worker::worker(caf::actor_config& config, worker_options options,
               std::shared_ptr<std::atomic<int>> exit_code)
  : worker_local::base(config),
    options_(std::move(options)),
    exit_code_(std::move(exit_code)),
    hurry_(std::make_shared<std::atomic<bool>>(false)) {
  set_down_handler([this](caf::down_msg& down) {
    if (node_ && down.source == node_.address()) {
      // If the node were dead, so would we be: it has stalled, or the connection has.
      spdlog::warn("the connection to the node broke; dialling again");
      node_ = nullptr;
      delayed_send(this, redial_interval, start_atom::value, port_);
      return;
    }
    const auto why = "an actor of this worker died: " + system().render(down.reason);
    spdlog::critical("{}", why);
    options_.pulse->last_words(why);
    exit_code_->store(exit_restart);
    quit();
  });
}

void worker::dial_node() {
  dial<node_supervisor_actor>(
    this, options_.node_host, options_.node_port, 2000ms,
    [this](node_supervisor_actor node) {
      node_ = std::move(node);
      monitor(node_);
      proto::WorkerHello hello;
      hello.set_name(options_.name);
      hello.set_incarnation(options_.incarnation);
      hello.set_pid(static_cast<std::uint32_t>(::getpid()));
      send(node_, worker_hello{std::move(hello)});
      if (parts_ || (prepared_ && assignment_.name().empty()))
        report(proto::RUNNING, nullptr);
    },
    [this](const error& e) {
      spdlog::warn("{}", e.text());
      delayed_send(this, redial_interval, start_atom::value, port_);
    });
}

void worker::report(proto::ProcessState state, const error* why) {
  if (!node_)
    return; // said again when the connection is back
  proto::WorkerReport said;
  auto* w = said.mutable_worker();
  w->mutable_plan()->set_name(options_.name);
  w->set_incarnation(options_.incarnation);
  w->set_pid(static_cast<std::uint32_t>(::getpid()));
  w->set_state(state);
  w->set_port(port_);
  if (parts_)
    w->set_transport_address(parts_->plane->address());
  if (why != nullptr)
    *w->mutable_error() = to_proto(*why);
  send(node_, worker_report{std::move(said)});
}

void worker::start_actors() {
  auto& plane = parts_->plane;
  const auto& plan = assignment_.plan();
  for (auto& s : parts_->stages) {
    std::pair key{s.plan.replica(), s.plan.index()};
    auto compute =
      spawn<stage_compute, caf::detached>(s.ops, s.model, s.experts, plane->buffers(),
                                          stage_traits{s.plan.id(), s.pulse, plan.unprotected(),
                                                       s.seals, s.boundary, s.outbox, s.watch});
    auto hidden = static_cast<std::uint32_t>(s.model->leader().config().hidden_size);
    auto handle = spawn<stage>(key.first, key.second, plan.num_stages(), hidden, plane, compute,
                               plan.unprotected());
    monitor(handle);
    plane->route_boundary(key.first, key.second, [handle](frame_ptr arrived) {
      caf::anon_send(handle, std::move(arrived));
    });
    stages_.emplace(key, handle);
  }
  for (auto& g : parts_->expert_groups) {
    auto arrivals = std::make_shared<dispatch_box>();
    auto handle = spawn<expert_group, caf::detached>(
      plane, g.ops, g.experts, arrivals,
      expert_group_traits{g.plan.index(), g.plan.id(), g.pulse, g.watch});
    monitor(handle);
    plane->route_dispatch(g.plan.index(), [handle, arrivals](frame_ptr arrived) {
      if (!arrivals->offer(arrived))
        caf::anon_send(handle, std::move(arrived));
    });
  }
  // Ranks of a stage wait for each other, so the first one's waits are those of all.
  std::vector<std::shared_ptr<device_watch>> watches;
  for (const auto& s : parts_->stages)
    if (s.watch)
      watches.push_back(s.watch);
  for (const auto& g : parts_->expert_groups)
    if (g.watch)
      watches.push_back(g.watch);
  for (const auto& device : parts_->gpus) {
    gpus_.push_back(spawn<gpu, caf::detached>(device, std::exchange(watches, {})));
    monitor(gpus_.back());
  }
}

void worker::take_view() {
  if (!parts_)
    return;
  parts_->plane->take_view(view_.body);
  for (auto& [key, handle] : stages_)
    send(handle, view_);
}

/// Preparing and loading read files: on threads of their own.
void worker::prepare(const proto::WorkerAssignment& assignment) {
  preparing_ = true;
  auto self = caf::actor_cast<worker_local>(this);
  system().spawn<caf::detached>([self, assignment](caf::event_based_actor*) {
    caf::anon_send(self, outcome_of([&](load_outcome& outcome) {
                     if (auto prepared = prepare_parts(assignment))
                       outcome.prepared = std::make_shared<prepared_parts>(std::move(*prepared));
                     else
                       outcome.failure = std::make_shared<error>(prepared.error());
                   }));
  });
}

void worker::load_ahead(const proto::WorkerAssignment& assignment) {
  loading_ahead_ = true;
  auto self = caf::actor_cast<worker_local>(this);
  system().spawn<caf::detached>([self, assignment, prepared = prepared_, hurry = hurry_,
                                 pulse = options_.pulse](caf::event_based_actor*) {
    caf::anon_send(self, outcome_of([&](load_outcome& outcome) {
                     outcome.is_ahead = true;
                     auto begin = std::chrono::steady_clock::now();
                     if (auto ahead = actors::load_ahead(*prepared, assignment, *pulse, *hurry)) {
                       outcome.ahead = std::move(*ahead);
                       spdlog::info("has loaded what it may need, {} actors on {}, in {:.0f} ms",
                                    assignment.actors_size(), assignment.device(), ms_since(begin));
                     } else {
                       spdlog::warn("will load when it is needed: {}", ahead.error().text());
                     }
                   }));
  });
}

void worker::load() {
  auto self = caf::actor_cast<worker_local>(this);
  system().spawn<caf::detached>([self, assigned = assignment_, prepared = prepared_,
                                 ahead = std::exchange(ahead_, nullptr),
                                 pulse = options_.pulse](caf::event_based_actor*) mutable {
    faults::suffer(faults::point::worker_loading);
    caf::anon_send(self, outcome_of([&](load_outcome& outcome) {
                     auto parts = load_parts(*prepared, std::move(ahead), assigned,
                                             assigned.incarnation(), *pulse);
                     faults::suffer(faults::point::worker_loaded);
                     if (parts)
                       outcome.parts = *parts;
                     else
                       outcome.failure = std::make_shared<error>(parts.error());
                   }));
  });
}

void worker::take_assignment(const proto::WorkerAssignment& assignment) {
  if (!assignment_.name().empty())
    return; // of a connection that broke before: this worker is what it is
  if (assignment.name().empty()) {
    if (!preparing_)
      prepare(assignment);
    else if (prepared_ && !loading_ahead_ && !ahead_ && !assignment.actors().empty())
      load_ahead(assignment);
    return;
  }
  assigned_at_ = std::chrono::steady_clock::now();
  hurry_->store(true);
  if (options_.name != assignment.name()) {
    faults::suffer(faults::point::worker_activated);
    spdlog::info("takes the place of {} (incarnation {})", assignment.name(),
                 assignment.incarnation());
    set_process_name(assignment.name());
  }
  assignment_ = assignment;
  options_.name = assignment.name();
  options_.incarnation = assignment.incarnation();
  report(proto::LOADING, nullptr);
  if (prepared_ && !loading_ahead_)
    load();
  else if (!preparing_)
    prepare(assignment);
}

void worker::fail_to_load(const error& why) {
  spdlog::critical("{}", why.text());
  report(proto::FAILED, &why);
  exit_code_->store(exit_cannot_load);
  delayed_send(this, farewell_time, stop_atom::value);
}

void worker::take_outcome(const load_outcome& outcome) {
  if (outcome.failure)
    return fail_to_load(*outcome.failure);
  if (outcome.parts) {
    parts_ = outcome.parts;
    start_actors();
    take_view();
    spdlog::info("ready {:.1f} ms after it was told what to be", ms_since(assigned_at_));
    return report(proto::RUNNING, nullptr);
  }
  if (outcome.is_ahead) {
    loading_ahead_ = false;
    ahead_ = outcome.ahead;
  } else {
    prepared_ = outcome.prepared;
  }
  if (assignment_.name().empty())
    report(proto::RUNNING, nullptr);
  else
    load();
}

worker::behavior_type worker::make_behavior() {
  return {
    [this](const worker_assignment& assignment) { take_assignment(assignment.body); },
    [this](const cluster_view& view) {
      if (view->version() <= view_->version())
        return;
      view_ = view;
      for (const auto& w : view->workers()) {
        if (w.plan().name() != options_.name || w.incarnation() <= options_.incarnation)
          continue;
        spdlog::critical("another process (incarnation {}) has taken this one's place; ending",
                         w.incarnation());
        exit_code_->store(exit_fenced);
        quit();
        return;
      }
      take_view();
    },
    [this](stage_atom, std::uint32_t replica, std::uint32_t index) -> caf::result<stage_actor> {
      auto found = stages_.find({replica, index});
      if (found == stages_.end())
        return caf::make_error(caf::sec::no_such_group_module, "no such stage here");
      return caf::actor_cast<stage_actor>(found->second);
    },
    [](ping_atom, std::uint64_t number) { return number; },
    [this](start_atom, std::uint16_t port) {
      port_ = port;
      if (!node_)
        dial_node();
    },
    [this](const load_outcome& outcome) { take_outcome(outcome); },
    [this](knock_atom) { options_.pulse->answered(); },
    [this](stop_atom) { quit(); },
  };
}

} // namespace troupe::actors
