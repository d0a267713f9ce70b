#pragma once

#include "troupe/recovery/accrual_detector.hpp"
#include "troupe/recovery/relocation.hpp"
#include "cluster.pb.h"

#include <chrono>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace troupe::recovery {

/// The cluster supervisor's mind: who belongs to the cluster, who runs what, in which epoch, and
/// how far each recovery has come. Pure: takes what the actors hear and the time, answers with what
/// they must send.
///
/// The view is the truth about who runs what: it begins as planned, and actors move in it when a
/// node or a device is given up.
///
/// A node:
///
///     STARTING --hello--> RUNNING --connection broke--> LOST --grace over--> FAILED
///                         ^     ^ \---------silent (phi)-----------------------^  |
///                         |     \------------hello-------------/                  |
///                         \---------------------hello, without actors------------/
///
/// FAILED means that its actors have moved: whatever it still runs is fenced off by the
/// epoch, and it is told to end it when it is heard of again. A node whose actors fit nowhere else
/// stays LOST.
///
/// Every loss of something that served opens a recovery record; its phases are those of
/// proto::RecoveryPhase. It raises the epoch as well, unless all that was lost are expert groups of
/// which another copy runs: those keep nothing, their calls go to the copy, and no step is
/// repeated. A record is closed when what was lost runs again and each replica has made its first
/// token in that epoch or has nothing to make.
class membership {
public:
  using time_point = std::chrono::steady_clock::time_point;

  /// What the caller must do. The view goes to every node and to the frontend.
  struct effects {
    bool view_changed = false;
    std::set<std::string> assign; ///< nodes that need their assignment

    void operator|=(const effects& more);
  };

  membership(proto::ClusterPlan plan, std::uint64_t incarnation, std::uint32_t pid);

  /// Takes over what an earlier controller knew. Nodes that it counted on and that do not report
  /// in time are lost. A state made for another plan is ignored.
  void restore(const proto::ControllerState& state, time_point now);

  /// What a later controller needs to know.
  proto::ControllerState state() const;

  /// A node is connected: new, back after its connection broke, or restarted. Workers that it
  /// already runs are taken as they are; workers that it lost with its old process are lost.
  effects node_hello(const proto::NodeHello& hello, time_point now);

  /// A sign of life, perhaps with news of its GPUs. `answer` is what to reply.
  effects node_heartbeat(const proto::NodeHeartbeat& heartbeat, time_point now,
                         proto::NodeHeartbeat& answer);

  /// A node's connection broke. Its workers may well run on; nothing is fenced by this alone.
  effects node_disconnected(const std::string& name, time_point now);

  /// A worker changed its state. Reports of an older incarnation are ignored.
  effects worker_changed(const proto::WorkerChanged& change, time_point now);

  /// The frontend is connected; the view must be sent to it.
  effects frontend_hello(const proto::FrontendHello& hello, time_point now);

  /// A sign of life of the frontend.
  void frontend_heartbeat(time_point now) { frontend_heard_ = now; }

  /// A replica began or ended its replay. Repetitions change nothing.
  void replay(const proto::ReplayReport& report, time_point now);

  /// Time passes: silent nodes are given up, actors go home. Where nobody at all is heard, it is
  /// the controller that is cut off, and that time counts against nobody. To be called at about
  /// heartbeat_ms; `paused` is by how much this call is later than that.
  effects tick(time_point now, std::chrono::steady_clock::duration paused = {});

  /// What a node has to run.
  proto::NodeAssignment assignment_for(const std::string& node) const;

  const proto::ClusterPlan& plan() const { return plan_; }
  const proto::ClusterView& view() const { return view_; }
  proto::ClusterStatus status() const;

private:
  struct open_recovery {
    proto::RecoveryRecord record;
    std::set<std::string> workers; ///< that must run again
    bool interrupts = true;        ///< with an epoch of its own, in which replicas serve again
    time_point detected;
    std::set<std::uint32_t> served;         ///< replicas that serve in its epoch
    std::optional<time_point> first_served; ///< when all of them did
    std::map<std::uint32_t, proto::ReplayReport> replays;
  };
  struct node_watch {
    explicit node_watch(accrual_detector d) : detector(d) {}
    accrual_detector detector;
    bool connected = false;
    std::optional<time_point> heard; ///< its last sign of life
    time_point lost_since{};
    std::chrono::milliseconds grace{};
    std::uint64_t num_changes = 0; ///< of its last hello, and WorkerChanged since
    unsigned num_behind = 0;       ///< heartbeats in a row that tell of changes not heard
    std::optional<time_point> returned;
    std::uint64_t assignment_version = 0;
    std::optional<proto::DeviceReport> devices; ///< no part of the view: it changes every second
    time_point devices_heard{};
  };
  /// What is known of a fault when it is first heard of.
  struct fault {
    std::string level;
    std::string cause;
    std::string detected_by;
    double detect_ms = 0;
    std::uint64_t detected_ns = 0;
  };

  /// A controller that restarted learns from those who remember where things stand.
  effects catch_up(const proto::ClusterView& seen, time_point now);
  void lose(const std::set<std::string>& workers, const fault& what, time_point now);
  effects give_up_node(proto::NodeView& node, const fault& what, time_point now);
  effects give_up_worker(proto::WorkerView& worker, time_point now);
  effects apply(const relocation& found);
  effects go_home(time_point now);
  void restored(const proto::WorkerView& worker, const std::string& how, time_point now);
  void close_served(open_recovery& open);
  bool is_deaf(time_point now) const;
  void touch() { view_.set_version(view_.version() + 1); }
  proto::WorkerView* find_worker(const std::string& name);
  proto::NodeView* find_node(const std::string& name);
  node_watch& watch(const std::string& node);

  proto::ClusterPlan plan_;
  std::string plan_digest_;
  proto::ClusterView view_;
  proto::FrontendView frontend_;
  proto::Error error_;
  std::uint64_t incarnation_;
  std::uint32_t pid_;
  std::uint64_t next_recovery_ = 1;
  std::optional<time_point> frontend_heard_;
  std::optional<time_point> last_tick_;
  std::map<std::string, node_watch> watches_;
  std::vector<open_recovery> recoveries_; // the newest max_records
};

} // namespace troupe::recovery
