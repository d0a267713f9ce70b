#pragma once

#include "troupe/actors/child_watch.hpp"
#include "troupe/actors/local_messages.hpp"
#include "troupe/base/child_processes.hpp"
#include "troupe/memory/pulse_page.hpp"
#include "troupe/memory/segment.hpp"
#include "troupe/messages/serving_protocol.hpp"
#include "troupe/recovery/node_policy.hpp"
#include "troupe/telemetry/gpu_monitor.hpp"

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
  std::uint64_t incarnation = 0; ///< 0: nobody counts; it is then read off the clock
  std::string controller_host;
  std::uint16_t controller_port = 0;
  std::string bind; ///< workers and peers reach it here; empty: as it reaches the controller
  std::string log_directory; ///< one log a worker; empty: beside those of clusters, by its name
  std::string log_level = "info";
  std::uint32_t heartbeat_ms = 100;
  std::shared_ptr<memory::pulse> pulse; ///< of this process
};

using node_supervisor_local = messages::node_supervisor_actor::extend<
  caf::reacts_to<start_atom, std::uint16_t>, caf::reacts_to<tick_atom>, caf::reacts_to<knock_atom>,
  caf::reacts_to<redial_atom>, caf::reacts_to<child_exit>, caf::reacts_to<stop_atom>>;

/// Parent of the workers of one host and keeper of their memory; lives in the node process, in a
/// thread of its own since starting a process blocks. `recovery::node_policy` decides; this
/// carries it out with processes, memory and messages.
///
/// Runs what its assignment says, and nothing else: a worker whose actors differ from those
/// assigned is replaced. A worker that dies (or whose pulse says that it might as well be dead, and
/// which is killed for it) is replaced at once, by a standby if one is ready, else by a new process
/// (one for one), with the KV pages of its predecessor. What workers keep on a GPU belongs to the
/// GPU's keeper, another child of the node; the node ends with it, since nothing of that memory is
/// left. A worker that dies too often, or says that it
/// can never work, is reported as failed.
class node_supervisor : public node_supervisor_local::base {
public:
  node_supervisor(caf::actor_config& config, node_options options);
  ~node_supervisor() override;

  behavior_type make_behavior() override;

private:
  using time_point = std::chrono::steady_clock::time_point;
  using policy = recovery::node_policy;

  /// The process that owns the memory of a GPU.
  struct keeper {
    std::string name;
    std::string address; ///< where it listens
    pid_t pid = 0;       ///< 0: it could not be started, or found no GPU
  };

  /// A process of ours, how it is watched and reached.
  struct child {
    pid_t pid = 0;
    std::optional<child_watch> watch; ///< none where nothing is protected
    bool is_ending = false;           ///< it computes no more
    time_point ending_since{};
    messages::worker_actor handle; ///< once it has said hello
  };

  void dial_controller();
  void send_heartbeat();

  void carry_out(policy::effects todo);
  void carry_out(const policy::start_process& what);
  void carry_out(const policy::kill_process& what);
  void carry_out(policy::assign& what);
  void carry_out(const policy::send_view& what);
  void carry_out(const policy::keep_memory& what);
  void carry_out(const policy::drop_memory& what);
  void carry_out(const policy::note& what);
  void carry_out(proto::NodeHello& hello);
  void carry_out(proto::WorkerChanged& change);

  expected<child> spawn(const policy::start_process& what);
  std::string log_path_of(const std::string& process) const;
  void start_keepers(const proto::ClusterPlan& plan);
  void start_keeper(const std::string& device);
  void watch_gpus();
  void keeper_exited(const child_exit& exit);
  std::string device_of(const std::string& worker) const;
  expected<void> create_memory(const policy::keep_memory& what);
  void child_exited(const child_exit& exit);
  void look_at_pulses(time_point now);

  node_options options_;
  std::uint16_t port_ = 0;
  messages::cluster_supervisor_actor controller_;
  policy policy_;
  std::map<std::string, child> running_;                ///< by the policy's name for the process
  std::map<std::string, memory::segment> kv_;           ///< by actor; of those on CPUs
  std::map<std::string, keeper> keepers_;               ///< by device
  std::vector<std::string> gpu_places_;                 ///< the GPUs of each worker on GPUs
  std::unique_ptr<telemetry::gpu_monitor> gpu_monitor_; ///< where there are GPUs
  time_point last_heartbeat_{};
  std::unique_ptr<child_processes> children_;
};

} // namespace troupe::actors
