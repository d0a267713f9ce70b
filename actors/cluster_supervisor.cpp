#include "troupe/actors/cluster_supervisor.hpp"

#include "troupe/base/fault_point.hpp"

#include <algorithm>

#include <caf/all.hpp>
#include <spdlog/spdlog.h>

namespace troupe::actors {

using namespace messages; // the protocol's vocabulary, in actor sources only
using namespace std::chrono_literals;

namespace {

/// The journal is rewritten when it has grown beyond this: only its last record counts.
constexpr std::uint64_t max_journal_bytes = 1 << 20;

constexpr const char* frontend_name = "frontend";

} // namespace

cluster_supervisor::cluster_supervisor(caf::actor_config& config, recovery::membership members,
                                       std::optional<recovery::journal> journal,
                                       std::shared_ptr<memory::pulse> pulse)
  : cluster_supervisor_local::base(config),
    members_(std::move(members)),
    journal_(std::move(journal)),
    pulse_(std::move(pulse)),
    last_tick_(clock().now()) {
  set_down_handler([this](caf::down_msg& down) {
    for (auto& [name, node] : nodes_) {
      if (node && node.address() == down.source) {
        spdlog::warn("the connection to {} broke", name);
        node = nullptr;
        apply(members_.node_disconnected(name, clock().now()));
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

void cluster_supervisor::write_journal() {
  if (!journal_)
    return;
  auto record = members_.state().SerializeAsString();
  auto written = journal_->size() > max_journal_bytes ? journal_->rewrite({&record, 1})
                                                      : journal_->append(record);
  if (written) {
    if (!journal_problem_.empty())
      spdlog::info("the journal can be written again");
    journal_problem_.clear();
  } else if (journal_problem_ != written.error().cause) {
    // The cluster goes on without: nodes and frontend remember as well.
    journal_problem_ = written.error().cause;
    spdlog::error("{}", written.error().text());
  }
}

void cluster_supervisor::apply(const recovery::membership::effects& effects) {
  if (!effects.view_changed && effects.assign.empty())
    return;
  write_journal();
  faults::suffer(faults::point::controller_fencing);
  // The view goes first: whoever runs something else now must not be taken for what it was.
  if (effects.view_changed)
    broadcast();
  for (const auto& name : effects.assign)
    if (auto node = nodes_.find(name); node != nodes_.end() && node->second)
      send(node->second, node_assignment{members_.assignment_for(name)});
}

cluster_supervisor::behavior_type cluster_supervisor::make_behavior() {
  auto interval = std::chrono::milliseconds(std::max(10U, members_.plan().heartbeat_ms()));
  delayed_send(this, interval, tick_atom::value);
  return {
    [this](const node_hello& hello) {
      if (faults::is_cut_off(hello->name()))
        return;
      auto node = caf::actor_cast<node_supervisor_actor>(current_sender());
      spdlog::info("{} is here (pid {}, incarnation {}, {} workers)", hello->name(), hello->pid(),
                   hello->incarnation(), hello->workers_size());
      auto& known = nodes_[hello->name()];
      if (known != node) {
        monitor(node);
        known = node;
      }
      apply(members_.node_hello(hello.body, clock().now()));
    },
    [this](const worker_changed& change) {
      const auto& worker = change->worker();
      if (faults::is_cut_off(worker.plan().node()))
        return;
      auto effects = members_.worker_changed(change.body, clock().now());
      if (worker.state() == proto::LOST)
        spdlog::warn("{} (incarnation {}) {}; epoch {}", worker.plan().name(), worker.incarnation(),
                     change->cause(), members_.view().epoch());
      else
        spdlog::info("{} (incarnation {}) is {}", worker.plan().name(), worker.incarnation(),
                     proto::ProcessState_Name(worker.state()));
      apply(effects);
    },
    [this](const node_heartbeat& heartbeat) {
      if (faults::is_cut_off(heartbeat->name()))
        return;
      proto::NodeHeartbeat answer;
      apply(members_.node_heartbeat(heartbeat.body, clock().now(), answer));
      auto node = caf::actor_cast<node_supervisor_actor>(current_sender());
      send(node, node_heartbeat{std::move(answer)});
    },
    [this](const frontend_hello& hello) {
      if (faults::is_cut_off(frontend_name))
        return;
      frontend_ = caf::actor_cast<frontend_actor>(current_sender());
      monitor(frontend_);
      spdlog::info("the frontend is here (pid {}, {})", hello->frontend().pid(),
                   hello->frontend().endpoint());
      auto effects = members_.frontend_hello(hello.body, clock().now());
      send(frontend_, cluster_plan{members_.plan()});
      apply(effects);
    },
    [this](const frontend_heartbeat& heartbeat) {
      if (faults::is_cut_off(frontend_name))
        return;
      members_.frontend_heartbeat(clock().now());
      for (const auto& replay : heartbeat->replays())
        members_.replay(replay, clock().now());
      auto frontend = caf::actor_cast<frontend_actor>(current_sender());
      if (heartbeat->view_version() < members_.view().version())
        send(frontend, cluster_view{members_.view()});
      send(frontend, heartbeat);
    },
    [this](const replay_report& report) {
      if (!faults::is_cut_off(frontend_name))
        members_.replay(report.body, clock().now());
    },
    [this](status_atom) {
      auto status = members_.status();
      if (!journal_problem_.empty())
        status.add_warnings(journal_problem_);
      return cluster_status{std::move(status)};
    },
    [this, interval](tick_atom) {
      delayed_send(this, interval, tick_atom::value);
      auto now = clock().now();
      // Late because this process did not run: then nobody could be heard either.
      auto paused = now - last_tick_ - interval;
      last_tick_ = now;
      apply(members_.tick(now, paused > 2 * interval ? paused : 0ns));
    },
    [this](knock_atom) {
      if (pulse_)
        pulse_->answered();
    },
  };
}

} // namespace troupe::actors
