#pragma once

#include "troupe/base/error.hpp"
#include "troupe/recovery/restart_policy.hpp"
#include "cluster.pb.h"

#include <chrono>
#include <cstdint>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace troupe::recovery {

/// What a node decides about its processes: whom to start, replace, try again or give up, when a
/// standby takes a place and when there is a new one, and what the controller hears of it. Pure:
/// takes what happens and the time, answers with what is to be done.
///
/// A worker, by the state in its view:
///
///     IDLE <--no actors-- (begin) --memory--> STARTING --> LOADING --> RUNNING
///                            |                  ^ |           |           |
///                            | no memory        | +-----------+-----------+
///                            v                  |             | exited, or could not be started
///                         FAILED                |             v
///                            ^                  +----------- LOST
///                            |               at once, or        |
///                            |               after a pause      |
///                            +----------- too often ------------+
///
/// A process that ends computes no more some time before it is gone and what it had is free. In
/// between, its successor is started, or a standby takes its place. What the successor is to run it
/// is told at once, or, in four cases that concern a GPU, when the predecessor is gone: a new
/// process needs a part of the GPU's memory; with drafts, what the predecessor's last step still
/// writes there (rows of drafts that were wrong) may differ from what the successor's next one
/// writes to the same place; so may the rows for the next stage, for which even and odd
/// incarnations have a place each; and who did not get on may not stop writing for long.
///
/// An error that no restart can cure leads to FAILED, too; only another assignment leads out of it.
/// A worker that runs when other actors are assigned is killed first and begins when it is gone.
/// What a process says is believed only while it is the worker's process, under its incarnation.
///
/// A standby of a node with GPUs loads ahead what a worker that runs there has, each the worker
/// that has fewest of them, so that little is left to do when it takes that place. It may have to
/// take another's. When that worker is to run other actors, the standby is killed and replaced:
/// what it maps has to go.
///
/// A process is named once, as it is started ("node-0/worker-1#7", its name and incarnation), and
/// keeps that name here also when it is a standby that has become a worker.
class node_policy {
public:
  using time_point = std::chrono::steady_clock::time_point;

  /// Pause after a standby has died by itself: one that cannot live must not keep the node busy.
  static constexpr std::chrono::milliseconds standby_pause{1000};

  /// How far apart the incarnations lie that two incarnations of a node begin to count from.
  static constexpr std::uint64_t incarnations_of_a_node = 100'000;

  /// To be answered at once by `started` or `not_started`.
  struct start_process {
    std::string process;
    std::string name; ///< what it is started as
    std::uint64_t incarnation = 0;
  };
  struct kill_process {
    std::string process;
  };
  /// The caller adds where the KV memory of its actors is.
  struct assign {
    std::string process;
    proto::WorkerAssignment assignment;
  };
  /// `view` goes to that process.
  struct send_view {
    std::string process;
  };
  /// New memory, in place of any of these actors'. To be answered at once by `memory_kept` or
  /// `memory_refused`.
  struct keep_memory {
    std::string worker;
    std::vector<std::pair<std::string, std::uint64_t>> actors; ///< and bytes
  };
  struct drop_memory {
    std::string actor;
  };
  /// Words for the log.
  struct note {
    bool is_bad = false;
    std::string text;
  };
  /// The last two go to the controller; the caller adds to the hello what it knows of the host.
  using effect = std::variant<start_process, kill_process, assign, send_view, keep_memory,
                              drop_memory, note, proto::NodeHello, proto::WorkerChanged>;
  /// To be carried out in this order, each with what its answer brings before the next.
  using effects = std::vector<effect>;

  /// How a process ends.
  struct process_end {
    std::string process;
    std::string text;    ///< "killed by signal 9"
    std::string verdict; ///< why its pulse had it killed; empty: it died by itself
    time_point detected; ///< when that was seen
  };

  /// `host`: where workers can be reached. `seed`: of the names given to memory, never the same.
  node_policy(std::string node, std::uint64_t incarnation, std::string host, std::uint64_t seed);

  /// There is a connection to the controller, or none. What changes without one is said in the
  /// next hello.
  effects connected();
  void disconnected() { connected_ = false; }
  /// The controller asks for everything once more.
  effects hello_wanted();
  proto::NodeHeartbeat heartbeat() const;

  /// What the node has to run. An assignment older than the last one is ignored.
  effects assigned(const proto::NodeAssignment& assignment);
  /// Views older than the last one are ignored.
  effects view_changed(const proto::ClusterView& view);

  effects started(const std::string& process, std::uint32_t pid);
  effects not_started(const std::string& process, const error& why, time_point now);
  effects memory_kept(const std::string& worker);
  effects memory_refused(const std::string& worker, const error& why);

  /// Which process says hello, or none that is wanted.
  std::optional<std::string> process_of(const proto::WorkerHello& hello) const;
  /// It can be sent to from now on.
  effects process_connected(const std::string& process);
  effects process_reported(const proto::WorkerReport& report);
  /// It computes no more, and is not gone yet. Need not be said.
  effects process_ending(const process_end& end, time_point now);
  /// It is gone.
  effects process_exited(const process_end& end, time_point now);

  /// Time passes. To be called about every 100 ms.
  effects tick(time_point now);

  const proto::ClusterPlan& plan() const { return plan_; }
  const proto::ClusterView& view() const { return view_; }

private:
  struct ending_process {
    std::uint64_t incarnation = 0;
    bool was_stuck = false; ///< and killed for it
  };
  struct worker {
    explicit worker(restart_policy policy) : restarts(policy) {}
    proto::WorkerView view;
    std::optional<std::string> process;
    bool is_connected = false;
    restart_policy restarts;
    std::optional<error> last_error; ///< why it could not start, by its own account
    std::optional<time_point> retry; ///< when to try again to start it
    bool awaits_memory = false;
    bool gave_up = false;
    bool replacing = false;                       ///< killed because it is to run other actors
    std::map<std::string, ending_process> ending; ///< predecessors that are not gone yet
    bool awaits_end = false;                      ///< of those; it is not told what to run before
  };
  struct standby {
    std::string process;
    std::uint32_t pid = 0;   ///< 0: just being started
    bool ready = false;      ///< it can take a place
    std::string loads_for;   ///< the worker whose actors it has loaded ahead; empty: none
    bool is_loading = false; ///< those
  };
  /// What is known of a loss.
  struct loss {
    std::string cause;
    std::string detected_by;
    time_point detected;
    bool was_running = true;
  };

  void begin(worker& w, effects& out);
  void begin_with_memory(worker& w, effects& out);
  void start(worker& w, effects& out);
  void assign_to(const worker& w, effects& out) const;
  void lose(worker& w, const loss& what, time_point now, effects& out);
  effects process_lost(worker& w, const process_end& end, time_point now);
  void give_up(worker& w, const error& why, effects& out);
  void keep_standbys(effects& out);
  void load_ahead(effects& out);
  std::map<std::string, standby>::iterator standby_for(const std::string& worker);
  void report(const worker& w, proto::WorkerChanged change, effects& out);
  void say_hello(effects& out);
  void take_standby_report(const std::string& name, const proto::WorkerView& said, effects& out);
  proto::WorkerAssignment assignment_of(const worker& w) const;
  bool needs_predecessor_gone(const worker& w, bool is_new_process) const;
  void add_standbys(google::protobuf::RepeatedPtrField<proto::StandbyView>& to) const;
  worker* worker_of(const std::string& process);
  std::map<std::string, standby>::iterator standby_of(const std::string& process);

  std::string node_;
  std::uint64_t incarnation_;
  std::string host_;
  std::mt19937_64 generations_;
  bool connected_ = false;
  std::uint64_t num_changes_ = 0; ///< hellos and WorkerChanged sent, in all
  bool assigned_ = false;
  std::uint64_t assignment_version_ = 0;
  proto::ClusterPlan plan_;
  proto::ClusterView view_;
  std::map<std::string, worker> workers_;
  std::map<std::string, standby> standbys_;
  std::uint64_t next_standby_ = 0;
  std::optional<time_point> standby_lost_;  ///< when the last one died by itself
  std::map<std::string, std::uint64_t> kv_; ///< generations of the memory that is kept, by actor
};

} // namespace troupe::recovery
