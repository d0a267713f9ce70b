#pragma once

#include "cluster.pb.h"

#include <chrono>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace troupe::recovery {

/// The cluster supervisor's mind: who belongs to the cluster, in which epoch, and how far each
/// recovery has come. Pure: takes what the actors hear and the time, answers with what they must
/// send.
///
/// A worker that is lost raises the epoch and opens a recovery record; its phases
/// are those of proto::RecoveryPhase. A record is closed by the replicas, when each has
/// made its first token in that epoch or has nothing to make.
class membership {
public:
  using time_point = std::chrono::steady_clock::time_point;

  /// What the caller must do. The view goes to every node and to the frontend.
  struct effects {
    bool view_changed = false;
    std::vector<std::string> assign; ///< nodes that need their assignment
  };

  membership(proto::ClusterPlan plan, std::uint64_t incarnation, std::uint32_t pid);

  /// A node is connected: new, back after its connection broke, or restarted. Workers that it
  /// already runs are taken as they are; workers that it lost with its old process are lost.
  effects node_hello(const proto::NodeHello& hello, time_point now);

  /// A node's connection broke. Its workers may well run on; nothing is fenced by this alone.
  effects node_disconnected(const std::string& name);

  /// A worker changed its state. Reports of an older incarnation are ignored.
  effects worker_changed(const proto::WorkerChanged& change, time_point now);

  /// The frontend is connected; the view must be sent to it.
  void frontend_hello(const proto::FrontendHello& hello);

  /// A replica began or ended its replay.
  void replay(const proto::ReplayReport& report, time_point now);

  const proto::ClusterPlan& plan() const { return plan_; }
  const proto::ClusterView& view() const { return view_; }
  proto::ClusterStatus status() const;

private:
  struct open_recovery {
    proto::RecoveryRecord record;
    std::string worker;
    time_point detected;
    std::set<std::uint32_t> served; ///< replicas that serve in its epoch
    std::map<std::uint32_t, proto::ReplayReport> replays;
  };

  /// A controller that restarted learns from those who remember where epochs and versions stand.
  void catch_up(std::uint64_t epoch, std::uint64_t version);
  void lose(proto::WorkerView& worker, const std::string& cause, double detect_ms, time_point now);
  void restored(const proto::WorkerView& worker, time_point now);
  void close_served(open_recovery& open, time_point now);
  proto::WorkerView* find_worker(const std::string& name);

  proto::ClusterPlan plan_;
  proto::ClusterView view_;
  proto::FrontendView frontend_;
  proto::Error error_;
  std::uint64_t incarnation_;
  std::uint32_t pid_;
  std::uint64_t next_recovery_ = 1;
  std::vector<open_recovery> recoveries_; // the newest max_records
};

} // namespace troupe::recovery
