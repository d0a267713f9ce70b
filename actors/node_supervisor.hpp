#pragma once

#include "troupe/actors/local_messages.hpp"
#include "troupe/base/child_processes.hpp"
#include "troupe/memory/segment.hpp"
#include "troupe/messages/serving_protocol.hpp"
#include "troupe/recovery/restart_policy.hpp"

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
};

using node_supervisor_local =
  messages::node_supervisor_actor::extend<caf::reacts_to<start_atom, std::uint16_t>,
                                          caf::reacts_to<tick_atom>, caf::reacts_to<child_exit>,
                                          caf::reacts_to<stop_atom>>;

/// Parent of the workers of one host and keeper of their memory; lives in the node process, in a
/// thread of its own since starting a process blocks. A worker that dies is restarted at once
/// (one for one) with the KV pages of its predecessor; one that dies too often, or
/// says that it can never work, is reported as failed.
class node_supervisor : public node_supervisor_local::base {
public:
  node_supervisor(caf::actor_config& config, node_options options);
  ~node_supervisor() override;

  behavior_type make_behavior() override;

private:
  struct worker {
    proto::WorkerView view;
    std::vector<std::pair<std::string, memory::segment>> kv; ///< by actor
    recovery::restart_policy restarts;
    messages::worker_actor handle;
    std::optional<error> last_error; ///< why it could not start, by its own account
    bool gave_up = false;
  };

  void dial_controller();
  void say_hello();
  void adopt(const proto::NodeAssignment& assignment);
  void start_worker(worker& w);
  void report(const worker& w, const std::string& cause, double detect_ms);
  void worker_exited(const child_exit& exit);
  void give_up(worker& w, const error& why);

  node_options options_;
  std::uint16_t port_ = 0;
  messages::cluster_supervisor_actor controller_;
  proto::ClusterPlan plan_;
  proto::ClusterView view_;
  std::map<std::string, worker> workers_;
  std::unique_ptr<child_processes> children_;
};

} // namespace troupe::actors
