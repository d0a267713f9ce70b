#pragma once

#include "troupe/actors/injected.hpp"
#include "troupe/actors/local_messages.hpp"
#include "troupe/messages/serving_protocol.hpp"
#include "troupe/recovery/resend_watch.hpp"
#include "troupe/schedule/replica_scheduler.hpp"

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace troupe::actors {

/// What a scheduler reports to; the gateway of its process.
using scheduler_client =
  caf::typed_actor<caf::reacts_to<progress_ptr>, caf::reacts_to<replica_report>,
                   caf::reacts_to<messages::replay_report>>;

using scheduler_local = messages::scheduler_actor::extend<
  caf::reacts_to<messages::cluster_view>, caf::reacts_to<submission>,
  caf::reacts_to<cancel_atom, schedule::request_id>, caf::reacts_to<tick_atom>>;

/// Finds the stage that a worker runs. Exactly one of the callbacks is called, in the context of
/// the scheduler, within a deadline.
struct stage_connector {
  virtual ~stage_connector() = default;
  virtual void connect(scheduler_local::base* self, const proto::WorkerView& worker,
                       std::uint32_t replica, std::uint32_t index,
                       std::function<void(const messages::stage_actor&)> on_connected,
                       std::function<void(const error&)> on_error) = 0;
};

/// Over the network.
std::shared_ptr<stage_connector> make_stage_connector();

/// Runs one replica: turns its policy (schedule::replica_scheduler) into micro-batches for the
/// stages and their answers into tokens. Lives in the frontend process and dies with it.
///
///   waiting --every stage connected, every expert group running--> serving
///   serving --a view with a newer epoch, or without one of them--> waiting
///
/// On the way to serving, everything in flight is sent once more, in the new epoch. While it
/// serves, what got no answer in time is sent again, and a step that failed is tried once more.
class scheduler : public scheduler_local::base {
public:
  /// `incarnation` is the frontend's: the steps of two incarnations never have the same number.
  scheduler(caf::actor_config& config, std::uint32_t replica, std::uint64_t incarnation,
            messages::cluster_plan plan, scheduler_client client,
            std::shared_ptr<stage_connector> connector);

  behavior_type make_behavior() override;

private:
  struct stage_link {
    std::string worker;            ///< that is connected or being dialled
    std::uint64_t incarnation = 0; ///< of it; 0: none
    messages::stage_actor stage;   ///< once connected

    bool is(const std::string& name, std::uint64_t number) const {
      return incarnation == number && worker == name;
    }
  };

  /// Whose KV memory a stage has. Another one, and what was in it is gone.
  struct kv_memory {
    std::string node;
    std::uint64_t generation = 0; ///< 0: not yet known
    bool operator==(const kv_memory&) const = default;
  };

  /// Looks for what a view says has been lost for good.
  void take_losses();
  void lose_kv(std::uint32_t stage, const std::string& why);
  const proto::WorkerView* find_hopeless() const;

  void take_view(const proto::ClusterView& view);
  void connect(std::uint32_t index, const proto::WorkerView& worker);
  bool can_serve() const;
  void start_serving_if_possible();
  void send_to_stages(const schedule::micro_batch& batch);
  void resend_overdue();
  void pump();
  /// Hands the policy's events on. `why_failed` goes with requests that failed; by default, their
  /// deadline has passed.
  void flush_events(const error* why_failed = nullptr);
  void report_state();
  void complete(const proto::MicroBatchDone& done);
  void take_failure(const proto::MicroBatchFailed& failure);
  std::string_view name_of_sender();
  void report_replay(proto::RecoveryPhase phase, std::uint32_t requests, std::uint32_t tokens);

  std::uint32_t replica_;
  std::uint64_t step_base_;
  proto::ClusterPlan plan_;
  scheduler_client client_;
  std::shared_ptr<stage_connector> connector_;
  schedule::replica_scheduler policy_;
  proto::ClusterView view_;
  std::vector<stage_link> stages_;
  std::vector<kv_memory> kv_; ///< by stage
  recovery::resend_watch watch_;
  injected_faults faults_;
  std::optional<error> gave_up_; ///< why this replica can serve no more
  bool serving_ = false;
  bool replaying_ = false; ///< until the first step of the epoch completes
  schedule::time_point last_progress_;
  std::vector<schedule::output_token> outputs_;
  std::vector<schedule::token_event> events_;
};

} // namespace troupe::actors
