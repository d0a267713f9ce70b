#pragma once

#include "troupe/actors/local_messages.hpp"
#include "troupe/base/child_processes.hpp"
#include "troupe/memory/pulse_page.hpp"
#include "troupe/memory/segment.hpp"
#include "troupe/messages/serving_protocol.hpp"
#include "troupe/recovery/pulse_monitor.hpp"
#include "troupe/recovery/restart_policy.hpp"

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace troupe::actors {

/// Who a node process is and whom it belongs to.
struct node_options {
  std::string name;
  std::uint64_t incarnation = 1;
  std::string controller_host;
  std::uint16_t controller_port = 0;
  std::string bind = "127.0.0.1"; ///< workers reach the node here
  std::string log_directory;      ///< one log a worker; empty: this process's output
  std::string log_level = "info";
  std::uint32_t heartbeat_ms = 100;
  std::shared_ptr<memory::pulse> pulse; ///< of this process
};

using node_supervisor_local = messages::node_supervisor_actor::extend<
  caf::reacts_to<start_atom, std::uint16_t>, caf::reacts_to<tick_atom>, caf::reacts_to<knock_atom>,
  caf::reacts_to<redial_atom>, caf::reacts_to<child_exit>, caf::reacts_to<stop_atom>>;

/// Parent of the workers of one host and keeper of their memory; lives in the node process, in a
/// thread of its own since starting a process blocks.
///
/// Runs what its assignment says, and nothing else: a worker whose actors differ from those
/// assigned is replaced. A worker that dies (or whose pulse says that it might as well be dead, and
/// which is killed for it) is replaced at once, by a standby if one is ready, else by a new process
/// (one for one), with the KV pages of its predecessor. One that dies too often, or says that it
/// can never work, is reported as failed.
class node_supervisor : public node_supervisor_local::base {
public:
  node_supervisor(caf::actor_config& config, node_options options);
  ~node_supervisor() override;

  behavior_type make_behavior() override;

private:
  using time_point = std::chrono::steady_clock::time_point;

  /// A child process and how it is watched.
  struct child {
    std::string name; ///< among the children: the worker's, with its incarnation
    pid_t pid = 0;
    std::optional<memory::pulse_page> page;
    std::optional<recovery::pulse_monitor> monitor;
    std::string verdict; ///< why it was killed by us
    time_point judged{};
  };

  struct worker {
    explicit worker(recovery::restart_policy policy) : restarts(policy) {}
    proto::WorkerView view;
    std::optional<child> process;
    recovery::restart_policy restarts;
    messages::worker_actor handle;
    std::optional<error> last_error; ///< why it could not start, by its own account
    std::optional<time_point> retry; ///< when to try again to start it
    bool gave_up = false;
    bool replacing = false; ///< killed because it is to run other actors
  };

  struct standby {
    child process;
    messages::worker_actor handle;
    bool ready = false;
  };

  struct kv_memory {
    memory::segment segment;
    std::uint64_t generation;
  };

  void dial_controller();
  void say_hello();
  void send_heartbeat();
  void adopt(const proto::NodeAssignment& assignment);
  void begin(worker& w);
  void start_worker(worker& w, const std::string& how);
  expected<void> keep_memory(worker& w);
  expected<child> spawn(const std::string& name, std::uint64_t incarnation);
  void keep_standbys();
  proto::WorkerAssignment assignment_of(const worker& w) const;
  void report(const worker& w, proto::WorkerChanged change = {});
  void add_standbys(google::protobuf::RepeatedPtrField<proto::StandbyView>& to) const;
  void lose(worker& w, const std::string& cause, const std::string& detected_by,
            time_point detected);
  void child_exited(const child_exit& exit);
  void give_up(worker& w, const error& why);
  void look_at_pulses(time_point now);
  void judge(child& c, time_point now);

  node_options options_;
  std::uint16_t port_ = 0;
  messages::cluster_supervisor_actor controller_;
  proto::ClusterPlan plan_;
  proto::ClusterView view_;
  std::uint64_t assignment_version_ = 0;
  bool assigned_ = false;
  std::uint64_t num_changes_ = 0; ///< WorkerChanged sent since the last hello
  std::map<std::string, worker> workers_;
  std::map<std::string, standby> standbys_;
  std::uint64_t next_standby_ = 0;
  time_point standby_lost_{};           ///< the last one that died by itself
  std::map<std::string, kv_memory> kv_; ///< by actor
  memory::pulse_sample sample_;
  time_point last_heartbeat_{};
  std::unique_ptr<child_processes> children_;
};

} // namespace troupe::actors
