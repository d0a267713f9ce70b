#include "simulated_cluster.hpp"

#include <variant>

#include <fmt/format.h>

// The node decides by recovery::node_policy, as node_supervisor does. The root of a worker follows
// actors/worker.cpp step by step; what blocks there happens here by message.

namespace troupe::test {

using namespace messages;
using namespace std::chrono_literals;

using exited_atom = caf::atom_constant<caf::atom("exited")>;
using loaded_atom = caf::atom_constant<caf::atom("loaded")>;

namespace {

constexpr auto redial_interval = 200ms;
constexpr auto heartbeat = 200ms;

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

simulated_node::simulated_node(simulated_cluster& cluster, std::string name,
                               std::uint64_t incarnation)
  : cluster_(cluster),
    name_(std::move(name)),
    incarnation_(incarnation),
    policy_(name_, incarnation, "here", cluster.random()) {}

std::shared_ptr<simulated_kv> simulated_node::kv(const std::string& actor) const {
  auto found = kv_.find(actor);
  return found == kv_.end() ? nullptr : found->second;
}

void simulated_node::dial() {
  controller_ = cluster_.dial_controller(handle, cut_);
  if (!controller_) {
    self_->delayed_send(self_, redial_interval, actors::redial_atom::value);
    return;
  }
  self_->monitor(controller_);
  carry_out(policy_.connected());
}

void simulated_node::carry_out(policy::effects todo) {
  for (auto& effect : todo)
    std::visit([this](auto& what) { carry_out(what); }, effect);
}

void simulated_node::carry_out(const policy::start_process& what) {
  if (cluster_.refuses()) {
    cluster_.tell(what.process + " cannot be started");
    error why{error_code::io_failed, "cannot start " + what.process, "", ""};
    carry_out(policy_.not_started(what.process, why, self_->clock().now()));
    return;
  }
  auto process = cluster_.start_process(*this, what.name, what.incarnation);
  children_[what.process] = {process, {}};
  carry_out(policy_.started(what.process, process->pid));
}

void simulated_node::carry_out(const policy::kill_process& what) {
  cluster_.kill(children_.at(what.process).process, 0ms, false);
}

void simulated_node::carry_out(policy::assign& what) {
  self_->send(children_.at(what.process).handle, worker_assignment{std::move(what.assignment)});
}

void simulated_node::carry_out(const policy::send_view& what) {
  self_->send(children_.at(what.process).handle, cluster_view{policy_.view()});
}

void simulated_node::carry_out(const policy::keep_memory& what) {
  for (const auto& [actor, bytes] : what.actors)
    kv_[actor] = std::make_shared<simulated_kv>(policy_.plan().kv_pages());
  carry_out(policy_.memory_kept(what.worker));
}

void simulated_node::carry_out(const policy::drop_memory& what) {
  kv_.erase(what.actor);
}

void simulated_node::carry_out(const policy::note& what) {
  cluster_.tell(what.text);
}

void simulated_node::carry_out(proto::NodeHello& hello) {
  self_->send(controller_, node_hello{std::move(hello)});
}

void simulated_node::carry_out(proto::WorkerChanged& change) {
  self_->send(controller_, worker_changed{std::move(change)});
}

void simulated_node::exited(std::uint32_t pid, bool by_pulse, bool is_gone) {
  for (auto i = children_.begin(); i != children_.end(); ++i) {
    if (i->second.process->pid != pid)
      continue;
    auto now = self_->clock().now();
    policy::process_end end{i->first, "killed by signal 9", by_pulse ? "no beat for 800 ms" : "",
                            now};
    if (is_gone)
      children_.erase(i);
    carry_out(is_gone ? policy_.process_exited(end, now) : policy_.process_ending(end, now));
    return;
  }
}

caf::behavior simulated_node::behave(caf::event_based_actor* self) {
  self_ = self;
  self->set_down_handler([this](caf::down_msg& down) {
    if (controller_ && controller_.address() == down.source) {
      controller_ = nullptr;
      policy_.disconnected();
      self_->delayed_send(self_, redial_interval, actors::redial_atom::value);
    }
  });
  self->send(self, actors::redial_atom::value);
  self->delayed_send(self, heartbeat, actors::tick_atom::value);
  return {
    [this](const node_assignment& assignment) { carry_out(policy_.assigned(assignment.body)); },
    [this](const cluster_view& view) {
      if (view->version() > policy_.view().version())
        cluster_.check_view(view.body, policy_.view(), name_);
      carry_out(policy_.view_changed(view.body));
    },
    [this](const node_heartbeat& answer) {
      if (answer->say_hello())
        carry_out(policy_.hello_wanted());
    },
    [this](const worker_hello& hello) {
      auto process = policy_.process_of(hello.body);
      if (!process)
        return;
      children_.at(*process).handle = caf::actor_cast<caf::actor>(self_->current_sender());
      carry_out(policy_.process_connected(*process));
    },
    [this](const worker_report& said) { carry_out(policy_.process_reported(said.body)); },
    [this](actors::redial_atom) {
      if (!controller_)
        dial();
    },
    [this](actors::tick_atom) {
      self_->delayed_send(self_, heartbeat, actors::tick_atom::value);
      if (controller_)
        self_->send(controller_, node_heartbeat{policy_.heartbeat()});
      carry_out(policy_.tick(self_->clock().now()));
    },
    [this](exited_atom, std::uint32_t pid, bool by_pulse, bool is_gone) {
      exited(pid, by_pulse, is_gone);
    },
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
  auto gone = noticed + some_time(150ms);
  if (pick(3) > 0) // else it was no life line that told of it
    self->delayed_send(p->node->handle, noticed, exited_atom::value, p->pid, by_pulse, false);
  self->delayed_send(p->node->handle, gone, exited_atom::value, p->pid, by_pulse, true);
  for (const auto& [key, writes] : p->in_work)
    after(some_time(by_pulse ? noticed : gone), [writes] { writes.write(); });
}

} // namespace troupe::test
