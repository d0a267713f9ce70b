#pragma once

#include "troupe/actors/gpu.hpp"
#include "troupe/actors/local_messages.hpp"
#include "troupe/actors/stage.hpp"
#include "troupe/actors/worker_parts.hpp"
#include "troupe/messages/serving_protocol.hpp"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace troupe::actors {

/// Returned by a worker process when one of its actors is gone. Its parent hears of it as of a
/// crash, before it is gone.
inline constexpr int exit_restart = 3;

/// What preparing or loading ended in: one of the four.
struct load_outcome {
  std::shared_ptr<prepared_parts> prepared;
  bool is_ahead = false;              ///< a standby has loaded what it may need
  std::shared_ptr<parts_ahead> ahead; ///< null if that failed, which is no failure
  std::shared_ptr<worker_parts> parts;
  std::shared_ptr<const error> failure;
};

/// Runs `work`, which fills an outcome. What it throws (no memory, no thread) becomes the outcome's
/// failure: of a thread of its own nobody else would hear.
load_outcome outcome_of(const std::function<void(load_outcome&)>& work);

} // namespace troupe::actors

CAF_ALLOW_UNSAFE_MESSAGE_TYPE(troupe::actors::load_outcome)

namespace troupe::actors {

/// Who a worker process is and whom it belongs to.
struct worker_options {
  std::string name;
  std::uint64_t incarnation = 0;
  std::string node_host;
  std::uint16_t node_port = 0;
  std::shared_ptr<memory::pulse> pulse; ///< never null
};

using worker_local =
  messages::worker_actor::extend<caf::reacts_to<start_atom, std::uint16_t>,
                                 caf::reacts_to<load_outcome>, caf::reacts_to<knock_atom>,
                                 caf::reacts_to<stop_atom>>;

/// The root of a worker process: asks its node what to be, loads that, spawns stages, expert
/// groups and the GPUs that they compute with, and tells stages of every view. A standby is told to
/// prepare first, on a GPU also what to load ahead, and whose name and actors to take when it is
/// needed:
///
///     dialling --assignment without a name--> preparing --> ready --assignment--> loading -->
///     running
///              |                                          |     ^                 ^
///              |                                actors without a name             |
///              |                                          v     |                 |
///              |                                      loading ahead               |
///              +--------------------------------assignment------------------------+
///
/// Ends, and the process with it, when an actor of its dies: a worker is replaced as a whole. It
/// also ends when a view says that another process has its name: it was taken for dead. When the
/// node dies, the kernel ends the process.
class worker : public worker_local::base {
public:
  /// `exit_code` is what the process is to return; set before the actor ends.
  worker(caf::actor_config& config, worker_options options,
         std::shared_ptr<std::atomic<int>> exit_code);

  behavior_type make_behavior() override;

private:
  void dial_node();
  void take_assignment(const proto::WorkerAssignment& assignment);
  void prepare(const proto::WorkerAssignment& assignment);
  void load_ahead(const proto::WorkerAssignment& assignment);
  void load();
  void take_outcome(const load_outcome& outcome);
  void fail_to_load(const error& why);
  void start_actors();
  void take_view();
  void report(proto::ProcessState state, const error* why);

  worker_options options_;
  std::shared_ptr<std::atomic<int>> exit_code_;
  std::uint16_t port_ = 0;
  messages::node_supervisor_actor node_;
  proto::WorkerAssignment assignment_; ///< without a name until there is one to take
  bool preparing_ = false;
  bool loading_ahead_ = false;
  std::shared_ptr<std::atomic<bool>> hurry_; ///< of what loads ahead: somebody waits
  std::shared_ptr<parts_ahead> ahead_;
  std::chrono::steady_clock::time_point assigned_at_;
  std::shared_ptr<prepared_parts> prepared_;
  std::shared_ptr<worker_parts> parts_;
  std::map<std::pair<std::uint32_t, std::uint32_t>, stage_local> stages_;
  std::vector<gpu_actor> gpus_;
  messages::cluster_view view_;
};

} // namespace troupe::actors
