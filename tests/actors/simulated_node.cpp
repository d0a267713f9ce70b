#include "simulated_cluster.hpp"

#include "troupe/recovery/relocation.hpp"

#include <algorithm>

#include <fmt/format.h>

// Follows actors/node_supervisor.cpp and actors/worker.cpp step by step: what is decided there is
// decided here, what blocks there happens here by message.

namespace troupe::test {

using namespace messages;
using namespace std::chrono_literals;

using exited_atom = caf::atom_constant<caf::atom("exited")>;
using loaded_atom = caf::atom_constant<caf::atom("loaded")>;

namespace {

constexpr auto redial_interval = 200ms;
constexpr auto heartbeat = 200ms;
constexpr std::uint64_t incarnations_of_a_node = 1'000'000;

/// The root of a worker process.
struct worker_state {
  proto::WorkerAssignment assignment;
  proto::ClusterView view;
  bool prepared = false;
  bool preparing = false;
  bool running = false;
};

caf::behavior worker_root(caf::event_based_actor* self, simulated_cluster* c, process_ptr p) {
  auto s = std::make_shared<worker_state>();
  auto node = p->node->handle;
  auto report = [=](proto::ProcessState state) {
    proto::WorkerReport said;
    auto* w = said.mutable_worker();
    w->mutable_plan()->set_name(p->name);
    w->set_incarnation(p->incarnation);
    w->set_pid(p->pid);
    w->set_state(state);
    self->send(node, worker_report{std::move(said)});
  };
  auto take_time = [=] { self->delayed_send(self, c->some_time(100ms), loaded_atom::value); };
  auto tell_stages = [=] {
    for (const auto& [key, stage] : p->stages)
      caf::anon_send(stage, cluster_view{s->view});
  };
  self->delayed_send(self, c->some_time(50ms), actors::start_atom::value);
  return {
    [=](actors::start_atom) {
      proto::WorkerHello hello;
      hello.set_name(p->name);
      hello.set_incarnation(p->incarnation);
      hello.set_pid(p->pid);
      self->send(node, worker_hello{std::move(hello)});
    },
    [=](const worker_assignment& assigned) {
      if (!s->assignment.name().empty())
        return;
      if (assigned->name().empty()) {
        if (!s->preparing)
          take_time();
        s->preparing = true;
        return;
      }
      s->assignment = assigned.body;
      p->name = assigned->name();
      p->incarnation = assigned->incarnation();
      report(proto::LOADING);
      if (s->prepared || !s->preparing)
        take_time();
      s->preparing = true;
    },
    [=](loaded_atom) {
      if (!s->prepared) {
        s->prepared = true;
        if (s->assignment.name().empty())
          report(proto::RUNNING);
        else
          take_time();
        return;
      }
      c->start_stages(p, s->assignment);
      s->running = true;
      if (s->view.version() != 0)
        tell_stages();
      report(proto::RUNNING);
    },
    [=](const cluster_view& view) {
      if (view->version() <= s->view.version())
        return;
      s->view = view.body;
      for (const auto& w : view->workers())
        if (w.plan().name() == p->name && w.incarnation() > p->incarnation) {
          c->kill(p, 0ms, false); // another process has taken its place
          return;
        }
      if (s->running)
        tell_stages();
    },
  };
}

} // namespace

std::shared_ptr<simulated_kv> simulated_node::kv(const std::string& actor) const {
  auto found = kv_.find(actor);
  return found == kv_.end() ? nullptr : found->second.pages;
}

std::vector<process_ptr> simulated_node::processes() const {
  std::vector<process_ptr> result;
  for (const auto& [name, w] : workers_)
    if (w.process && w.process->alive)
      result.push_back(w.process);
  for (const auto& [name, s] : standbys_)
    if (s.process->alive)
      result.push_back(s.process);
  return result;
}

void simulated_node::dial() {
  controller_ = cluster_.dial_controller(handle, cut_);
  if (!controller_) {
    self_->delayed_send(self_, redial_interval, actors::redial_atom::value);
    return;
  }
  self_->monitor(controller_);
  say_hello();
}

void simulated_node::add_standbys(
  google::protobuf::RepeatedPtrField<proto::StandbyView>& to) const {
  for (const auto& [name, s] : standbys_) {
    auto* view = to.Add();
    view->set_name(name);
    view->set_pid(s.process->pid);
    view->set_state(s.ready ? proto::RUNNING : proto::STARTING);
  }
}

void simulated_node::say_hello() {
  proto::NodeHello hello;
  hello.set_name(name_);
  hello.set_incarnation(incarnation_);
  *hello.mutable_view() = view_;
  add_standbys(*hello.mutable_standbys());
  for (const auto& [name, w] : workers_)
    *hello.add_workers() = w.view;
  num_changes_ = 0;
  self_->send(controller_, node_hello{std::move(hello)});
}

void simulated_node::report(const worker& w, proto::WorkerChanged change) {
  if (!controller_)
    return;
  *change.mutable_worker() = w.view;
  add_standbys(*change.mutable_standbys());
  ++num_changes_;
  self_->send(controller_, worker_changed{std::move(change)});
}

void simulated_node::adopt(const proto::NodeAssignment& assignment) {
  if (assigned_ && assignment.version() < assignment_version_)
    return;
  assigned_ = true;
  assignment_version_ = assignment.version();
  plan_ = assignment.plan();
  std::set<std::string> here;
  std::vector<worker*> changed;
  for (const auto& known : assignment.known()) {
    recovery::restart_policy policy(plan_.max_restarts(), std::chrono::seconds(plan_.within_s()));
    auto [found, is_new] = workers_.try_emplace(known.plan().name(), policy);
    auto& w = found->second;
    for (const auto& actor : known.plan().actors())
      here.insert(actor.id());
    w.view.set_incarnation(std::max(
      {w.view.incarnation(), known.incarnation(), (incarnation_ - 1) * incarnations_of_a_node}));
    if (!is_new && recovery::same_actors(w.view.plan(), known.plan()))
      continue;
    *w.view.mutable_plan() = known.plan();
    changed.push_back(&w);
  }
  std::erase_if(kv_, [&](const auto& entry) { return here.count(entry.first) == 0; });
  for (auto* w : changed) {
    w->gave_up = false;
    if (w->process) {
      w->replacing = true;
      cluster_.kill(w->process, 0ms, false);
    } else {
      begin(*w);
    }
  }
  keep_standbys();
}

void simulated_node::begin(worker& w) {
  w.view.clear_kv();
  w.view.clear_error();
  w.handle = nullptr;
  if (w.view.plan().actors().empty()) {
    w.view.set_state(proto::IDLE);
    w.view.clear_pid();
    return;
  }
  for (const auto& actor : w.view.plan().actors()) {
    if (actor.kv_bytes() == 0)
      continue;
    auto found = kv_.find(actor.id());
    if (found == kv_.end())
      found = kv_
                .emplace(actor.id(), kv_memory{std::make_shared<simulated_kv>(plan_.kv_pages()),
                                               cluster_.random() | 1U})
                .first;
    auto* kv = w.view.add_kv();
    kv->set_actor(actor.id());
    kv->set_generation(found->second.generation);
  }
  start(w);
}

void simulated_node::keep_standbys() {
  if (!assigned_)
    return;
  while (standbys_.size() < plan_.standbys()) {
    auto name = fmt::format("{}/standby-{}", name_, next_standby_++);
    standbys_.emplace(name, standby{cluster_.start_process(*this, name, 1), {}, false});
  }
}

proto::WorkerAssignment simulated_node::assignment_of(const worker& w) const {
  proto::WorkerAssignment assignment;
  *assignment.mutable_plan() = plan_;
  assignment.set_name(w.view.plan().name());
  assignment.set_incarnation(w.view.incarnation());
  *assignment.mutable_actors() = w.view.plan().actors();
  return assignment;
}

void simulated_node::start(worker& w) {
  w.view.set_incarnation(w.view.incarnation() + 1);
  w.view.set_state(proto::STARTING);
  w.handle = nullptr;
  proto::WorkerChanged change;
  change.set_restored_by("restart");
  auto ready =
    std::find_if(standbys_.begin(), standbys_.end(), [](const auto& s) { return s.second.ready; });
  if (ready != standbys_.end()) {
    w.process = ready->second.process;
    w.handle = ready->second.handle;
    standbys_.erase(ready);
    w.view.set_pid(w.process->pid);
    self_->send(w.handle, worker_assignment{assignment_of(w)});
    self_->send(w.handle, cluster_view{view_});
    change.set_restored_by("standby");
  } else {
    w.process = cluster_.start_process(*this, w.view.plan().name(), w.view.incarnation());
    w.view.set_pid(w.process->pid);
  }
  report(w, std::move(change));
}

void simulated_node::exited(std::uint32_t pid, bool by_pulse) {
  for (auto i = standbys_.begin(); i != standbys_.end(); ++i)
    if (i->second.process->pid == pid) {
      standbys_.erase(i);
      return;
    }
  for (auto& [name, w] : workers_) {
    if (!w.process || w.process->pid != pid)
      continue;
    w.process.reset();
    w.handle = nullptr;
    if (w.replacing) {
      w.replacing = false;
      begin(w);
      keep_standbys();
      return;
    }
    if (w.gave_up)
      return;
    w.view.set_state(proto::LOST);
    proto::WorkerChanged change;
    change.set_cause("killed by signal 9");
    change.set_detected_by(by_pulse ? "pulse" : "exit");
    report(w, std::move(change));
    if (w.restarts.allow(self_->clock().now())) {
      start(w);
    } else {
      w.gave_up = true;
      w.view.set_state(proto::FAILED);
      w.view.mutable_error()->set_code(static_cast<std::uint32_t>(error_code::unavailable));
      w.view.mutable_error()->set_cause(name + " died too often");
      proto::WorkerChanged last;
      last.set_cause("died too often");
      report(w, std::move(last));
    }
    keep_standbys();
    return;
  }
}

caf::behavior simulated_node::behave(caf::event_based_actor* self) {
  self_ = self;
  self->set_down_handler([this](caf::down_msg& down) {
    if (controller_ && controller_.address() == down.source) {
      controller_ = nullptr;
      self_->delayed_send(self_, redial_interval, actors::redial_atom::value);
    }
  });
  self->send(self, actors::redial_atom::value);
  self->delayed_send(self, heartbeat, actors::tick_atom::value);
  return {
    [this](const node_assignment& assignment) { adopt(assignment.body); },
    [this](const cluster_view& view) {
      if (view->version() <= view_.version())
        return;
      cluster_.check_view(view.body, view_, name_);
      view_ = view.body;
      for (auto& [name, w] : workers_)
        if (w.handle)
          self_->send(w.handle, view);
    },
    [this](const node_heartbeat& answer) {
      if (controller_ && answer->say_hello())
        say_hello();
    },
    [this](const worker_hello& hello) {
      auto sender = caf::actor_cast<caf::actor>(self_->current_sender());
      if (auto s = standbys_.find(hello->name()); s != standbys_.end()) {
        s->second.handle = sender;
        proto::WorkerAssignment prepare;
        *prepare.mutable_plan() = plan_;
        self_->send(sender, worker_assignment{std::move(prepare)});
        return;
      }
      auto found = workers_.find(hello->name());
      if (found == workers_.end() || found->second.view.incarnation() != hello->incarnation())
        return;
      auto& w = found->second;
      w.handle = sender;
      self_->send(sender, worker_assignment{assignment_of(w)});
      self_->send(sender, cluster_view{view_});
    },
    [this](const worker_report& said) {
      const auto& reported = said->worker();
      if (auto s = standbys_.find(reported.plan().name()); s != standbys_.end()) {
        s->second.ready = reported.state() == proto::RUNNING;
        return;
      }
      auto found = workers_.find(reported.plan().name());
      if (found == workers_.end() || found->second.view.incarnation() != reported.incarnation()
          || found->second.replacing)
        return;
      auto& w = found->second;
      w.view.set_state(reported.state());
      w.view.set_pid(reported.pid());
      report(w);
      if (reported.state() == proto::RUNNING)
        keep_standbys();
    },
    [this](actors::redial_atom) {
      if (!controller_)
        dial();
    },
    [this](actors::tick_atom) {
      self_->delayed_send(self_, heartbeat, actors::tick_atom::value);
      if (!controller_)
        return;
      proto::NodeHeartbeat beat;
      beat.set_name(name_);
      beat.set_incarnation(incarnation_);
      beat.set_view_version(view_.version());
      beat.set_assignment_version(assignment_version_);
      beat.set_num_changes(num_changes_);
      self_->send(controller_, node_heartbeat{std::move(beat)});
    },
    [this](exited_atom, std::uint32_t pid, bool by_pulse) { exited(pid, by_pulse); },
  };
}

process_ptr simulated_cluster::start_process(simulated_node& node, const std::string& name,
                                             std::uint64_t incarnation) {
  auto p = std::make_shared<simulated_process>();
  p->pid = next_pid_++;
  p->node = &node;
  p->name = name;
  p->incarnation = incarnation;
  p->alive = !node.is_dead;
  if (node.is_dead)
    return p;
  p->root = track(system.spawn(worker_root, this, p));
  tell(fmt::format("{} (incarnation {}, pid {}) starts", name, incarnation, p->pid));
  processes_.push_back(p);
  return p;
}

void simulated_cluster::kill(const process_ptr& p, milliseconds noticed, bool by_pulse) {
  if (!p->alive)
    return;
  tell(fmt::format("{} (incarnation {}, pid {}) dies, noticed in {} ms", p->name, p->incarnation,
                   p->pid, noticed.count()));
  p->alive = false;
  caf::anon_send_exit(p->root, caf::exit_reason::kill);
  for (const auto& [key, stage] : p->stages)
    caf::anon_send_exit(stage, caf::exit_reason::kill);
  for (const auto& link : p->links)
    caf::anon_send_exit(link, caf::exit_reason::kill);
  std::erase(processes_, p);
  self->delayed_send(p->node->handle, noticed, exited_atom::value, p->pid, by_pulse);
}

} // namespace troupe::test
