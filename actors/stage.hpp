#pragma once

#include "troupe/actors/boundary.hpp"
#include "troupe/actors/data_plane.hpp"
#include "troupe/actors/device_watch.hpp"
#include "troupe/actors/expert_group.hpp"
#include "troupe/actors/injected.hpp"
#include "troupe/actors/remote_experts.hpp"
#include "troupe/memory/page_seals.hpp"
#include "troupe/memory/pulse_page.hpp"
#include "troupe/messages/serving_protocol.hpp"
#include "troupe/model/draft_plan.hpp"
#include "troupe/model/stage_group.hpp"
#include "troupe/recovery/stage_ledger.hpp"

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace troupe::actors {

using micro_batch_ptr = std::shared_ptr<const proto::RunMicroBatch>;

/// What a stage's computing thread is given.
struct stage_work {
  micro_batch_ptr batch;
  frame_ptr input;              ///< null for the first stage
  bool stays_on_device = false; ///< the output, where there is room
  /// Nothing is to be computed: these rows, which this stage has left, are wanted on the host.
  std::shared_ptr<const left_rows> left = nullptr;
};

/// What it gives back: one of the first four.
struct stage_result {
  std::uint64_t step = 0;
  std::shared_ptr<transport::buffer> output;   ///< hidden states for the next stage
  std::shared_ptr<proto::MicroBatchDone> done; ///< the last stage's tokens
  std::shared_ptr<const error> failure;
  bool kv_is_damaged = false; ///< with a failure
  bool input_is_lost = false; ///< with a failure: it lies where it cannot be had
  std::shared_ptr<const left_rows> left = nullptr; ///< hidden states that stay on the device
  bool is_copy = false; ///< `output`, of rows that were left; null: no memory for it
};

} // namespace troupe::actors

CAF_ALLOW_UNSAFE_MESSAGE_TYPE(troupe::actors::stage_work)
CAF_ALLOW_UNSAFE_MESSAGE_TYPE(troupe::actors::stage_result)

namespace troupe::actors {

using stage_local =
  messages::stage_actor::extend<caf::reacts_to<messages::cluster_view>, caf::reacts_to<frame_ptr>,
                                caf::reacts_to<stage_result>>;

using stage_compute_actor = caf::typed_actor<caf::reacts_to<stage_work>>;

/// Who a stage is and how carefully it works.
struct stage_traits {
  std::string actor = "stage";               ///< as planned: "replica-0/stage-1"
  memory::activity pulse;                    ///< of its computing thread
  bool unprotected = false;                  ///< for measuring only: nothing is checked or kept
  std::shared_ptr<memory::page_seals> seals; ///< of its KV pages; null: they have none
  std::shared_ptr<boundary_device> boundary; ///< null: rows come and go by the host
  std::shared_ptr<boundary_outbox> outbox;   ///< null: they go by the host
  std::shared_ptr<device_watch> watch;       ///< of its device; null: none
};

/// The computing half of a stage, in a thread of its own so that the stage can always answer.
/// Sends a stage_result to whoever sent the work, which must be a stage_local.
class stage_compute : public stage_compute_actor::base {
public:
  /// `experts` is null where the model has its own.
  stage_compute(caf::actor_config& config, std::vector<std::shared_ptr<kernels::ops>> ops,
                std::shared_ptr<model::stage_group> model, std::shared_ptr<remote_experts> experts,
                transport::buffer_pool buffers, stage_traits traits = {});

  behavior_type make_behavior() override;

private:
  stage_result work_on(const stage_work& work);
  expected<stage_result> compute(const stage_work& work);
  stage_result bring_to_host(const stage_work& work);
  expected<void> fetch(const proto::FrameHeader& from, const kernels::rows_view& to);
  expected<void> hand_over(const kernels::rows_view& hidden, bool stays, stage_result& result);
  expected<void> open_pages(const proto::RunMicroBatch& batch);
  void seal_pages(const proto::RunMicroBatch& batch);
  expected<std::shared_ptr<proto::MicroBatchDone>> draw(const proto::RunMicroBatch& batch);
  expected<void> draft(const proto::RunMicroBatch& batch, proto::MicroBatchDone& done);

  std::vector<std::shared_ptr<kernels::ops>> ops_; ///< by rank
  std::shared_ptr<model::stage_group> model_;
  std::shared_ptr<remote_experts> experts_;
  transport::buffer_pool buffers_;
  stage_traits traits_;
  bool kv_is_damaged_ = false; ///< found in the present step
  bool input_is_lost_ = false; ///< likewise
  bool has_computed_ = false;  ///< one step at least
  // Reused from step to step.
  std::vector<std::int32_t> tokens_, positions_, sequences_, pages_, page_offsets_, rows_,
    read_pages_;
  std::vector<kernels::sampling_params> params_;
  std::vector<kernels::sampled_token> sampled_;
  model::draft_plan draft_plan_;
  std::vector<model::draft_plan::slice> draft_slices_;
  std::vector<model::draft_chain> chains_;
  std::vector<std::int32_t> drawn_, draft_positions_, draft_sequences_, drafts_;
};

/// A run of layers of one replica. Lives in a worker; its KV pages belong to the node and are
/// there again when the worker has been restarted. What it owes is kept by
/// recovery::stage_ledger; this class carries that out.
class stage : public stage_local::base {
public:
  stage(caf::actor_config& config, std::uint32_t replica, std::uint32_t index,
        std::uint32_t num_stages, std::uint32_t hidden_size, std::shared_ptr<frame_sink> frames,
        stage_compute_actor compute, bool unprotected = false);

  behavior_type make_behavior() override;

private:
  /// Everything kept for a step until it is complete everywhere.
  struct kept_step {
    micro_batch_ptr batch;
    frame_ptr input;
    stage_result result;
    bool goes_by_host = false; ///< the successor has asked for it so
    bool is_copied = false;    ///< to the host, at this moment
  };

  void take_view(const proto::ClusterView& view);
  void take_result(const stage_result& result);
  void take_wish(const proto::FrameHeader& wanted);
  bool stays_on_device() const;
  void run(const proto::RunMicroBatch& asked);
  void carry_out();
  void pass_on(std::uint64_t step);
  void ask_for_input(std::uint64_t step, error_code why);
  void report(std::uint64_t step);
  void report_failure(std::uint64_t step);

  std::uint32_t replica_;
  std::uint32_t index_;
  std::uint32_t hidden_size_;
  std::shared_ptr<frame_sink> frames_;
  stage_compute_actor compute_;
  recovery::stage_ledger ledger_;
  std::uint32_t num_stages_;
  bool unprotected_;
  std::uint64_t served_epoch_ = 0; ///< the newest that a micro-batch came in
  injected_faults faults_;
  frame_target successor_;
  frame_target predecessor_;
  bool meets_successor_ = false; ///< on a device: see meet_on_devices
  frame_target cannot_map_;      ///< a successor that had to ask for rows by the host's way
  messages::scheduler_actor scheduler_;
  std::map<std::uint64_t, kept_step> kept_;
};

} // namespace troupe::actors
