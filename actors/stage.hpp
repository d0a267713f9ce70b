#pragma once

#include "troupe/actors/data_plane.hpp"
#include "troupe/actors/device_watch.hpp"
#include "troupe/actors/expert_group.hpp"
#include "troupe/actors/injected.hpp"
#include "troupe/actors/remote_experts.hpp"
#include "troupe/memory/page_seals.hpp"
#include "troupe/memory/pulse_page.hpp"
#include "troupe/messages/serving_protocol.hpp"
#include "troupe/model/draft_plan.hpp"
#include "troupe/model/stage_model.hpp"
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
  frame_ptr input; ///< null for the first stage
};

/// What it gives back: one of the three.
struct stage_result {
  std::uint64_t step = 0;
  std::shared_ptr<transport::buffer> output;   ///< hidden states for the next stage
  std::shared_ptr<proto::MicroBatchDone> done; ///< the last stage's tokens
  std::shared_ptr<const error> failure;
  bool kv_is_damaged = false; ///< with a failure
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
  std::shared_ptr<device_watch> watch;       ///< of its device; null: none
};

/// The computing half of a stage, in a thread of its own so that the stage can always answer.
/// Sends a stage_result to whoever sent the work, which must be a stage_local.
class stage_compute : public stage_compute_actor::base {
public:
  /// `experts` is null where the model has its own.
  stage_compute(caf::actor_config& config, std::shared_ptr<kernels::ops> ops,
                std::shared_ptr<model::stage_model> model, std::shared_ptr<remote_experts> experts,
                transport::buffer_pool buffers, stage_traits traits = {});

  behavior_type make_behavior() override;

private:
  stage_result work_on(const stage_work& work);
  expected<stage_result> compute(const stage_work& work);
  expected<void> open_pages(const proto::RunMicroBatch& batch);
  void seal_pages(const proto::RunMicroBatch& batch);
  expected<std::shared_ptr<proto::MicroBatchDone>> draw(const proto::RunMicroBatch& batch);
  expected<void> draft(const proto::RunMicroBatch& batch, proto::MicroBatchDone& done);

  std::shared_ptr<kernels::ops> ops_;
  std::shared_ptr<model::stage_model> model_;
  std::shared_ptr<remote_experts> experts_;
  transport::buffer_pool buffers_;
  stage_traits traits_;
  bool kv_is_damaged_ = false; ///< found in the present step
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
  };

  void run(const proto::RunMicroBatch& asked);
  void carry_out();
  void pass_on(std::uint64_t step);
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
  messages::scheduler_actor scheduler_;
  std::map<std::uint64_t, kept_step> kept_;
};

} // namespace troupe::actors
