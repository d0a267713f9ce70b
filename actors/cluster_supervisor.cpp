#include "troupe/actors/cluster_supervisor.hpp"

#include <chrono>

#include <caf/all.hpp>
#include <spdlog/spdlog.h>

namespace troupe::actors {

using namespace messages; // the protocol's vocabulary, in actor sources only
using clock = std::chrono::steady_clock;

cluster_supervisor::cluster_supervisor(caf::actor_config& config, recovery::membership members)
  : messages::cluster_supervisor_actor::base(config), members_(std::move(members)) {
  set_down_handler([this](caf::down_msg& down) {
    for (auto& [name, node] : nodes_) {
      if (node && node.address() == down.source) {
        spdlog::warn("the connection to {} broke", name);
        node = nullptr;
        apply(members_.node_disconnected(name));
        return;
      }
    }
    if (frontend_ && frontend_.address() == down.source) {
      spdlog::warn("the connection to the frontend broke");
      frontend_ = nullptr;
    }
  });
}

void cluster_supervisor::broadcast() {
  cluster_view view{members_.view()};
  for (auto& [name, node] : nodes_)
    if (node)
      send(node, view);
  if (frontend_)
    send(frontend_, view);
}

void cluster_supervisor::apply(const recovery::membership::effects& effects) {
  for (const auto& name : effects.assign) {
    proto::NodeAssignment assignment;
    *assignment.mutable_plan() = members_.plan();
    *assignment.mutable_known() = members_.view().workers();
    send(nodes_.at(name), node_assignment{std::move(assignment)});
  }
  if (effects.view_changed)
    broadcast();
}

cluster_supervisor::behavior_type cluster_supervisor::make_behavior() {
  return {
    [this](const node_hello& hello) {
      auto node = caf::actor_cast<node_supervisor_actor>(current_sender());
      spdlog::info("{} is here (pid {}, incarnation {}, {} workers)", hello->name(), hello->pid(),
                   hello->incarnation(), hello->workers_size());
      monitor(node);
      nodes_[hello->name()] = node;
      apply(members_.node_hello(hello.body, clock::now()));
    },
    [this](const worker_changed& change) {
      const auto& worker = change->worker();
      auto effects = members_.worker_changed(change.body, clock::now());
      if (worker.state() == proto::LOST)
        spdlog::warn("{} (incarnation {}) {}; epoch {}", worker.plan().name(), worker.incarnation(),
                     change->cause(), members_.view().epoch());
      else
        spdlog::info("{} (incarnation {}) is {}", worker.plan().name(), worker.incarnation(),
                     proto::ProcessState_Name(worker.state()));
      apply(effects);
    },
    [this](const frontend_hello& hello) {
      frontend_ = caf::actor_cast<frontend_actor>(current_sender());
      monitor(frontend_);
      spdlog::info("the frontend is here (pid {}, {})", hello->frontend().pid(),
                   hello->frontend().endpoint());
      members_.frontend_hello(hello.body);
      send(frontend_, cluster_plan{members_.plan()});
      broadcast();
    },
    [this](const replay_report& report) { members_.replay(report.body, clock::now()); },
    [this](status_atom) { return cluster_status{members_.status()}; },
  };
}

} // namespace troupe::actors
