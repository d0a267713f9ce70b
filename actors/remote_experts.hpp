#pragma once

#include "troupe/actors/data_plane.hpp"
#include "troupe/model/dispatch_plan.hpp"
#include "troupe/model/expert_exchange.hpp"

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

namespace troupe::actors {

/// The experts of a stage where they live in other processes. One DISPATCH frame goes to each
/// group that a layer's tokens need, one COMBINE comes back. A group that dies meanwhile is
/// asked again as soon as a copy or its successor can be reached; the others are not.
/// Belongs to the stage's computing thread.
class remote_experts final : public model::expert_exchange {
public:
  /// `stage_key` is (replica, index) of the stage; a call waits `patience` at most.
  remote_experts(std::shared_ptr<data_plane> plane, kernels::ops& ops, model::dispatch_plan plan,
                 std::pair<std::uint32_t, std::uint32_t> stage_key, std::uint64_t incarnation,
                 std::chrono::milliseconds patience);

  /// The step that the following calls belong to, for the frames' headers.
  void set_step(std::uint64_t step) { step_ = step; }

  expected<void> begin(std::int32_t layer, const kernels::rows_view& x,
                       std::span<const std::int32_t> experts, std::int32_t top_k) override;
  expected<void> finish(const kernels::rows_view& expert_out,
                        std::span<std::int32_t> expert_rows) override;

private:
  struct group_call {
    std::shared_ptr<transport::buffer> payload;
    std::int32_t num_tasks = 0;
    std::int32_t num_rows = 0;
    std::int32_t first_output = 0;
    bool done = true;
    data_plane::target sent_to;
    std::uint64_t sent_epoch = 0;
  };

  void send_due();
  expected<void> take(const transport::frame& reply, const kernels::rows_view& expert_out);

  std::shared_ptr<data_plane> plane_;
  kernels::ops& ops_;
  model::dispatch_plan plan_;
  std::pair<std::uint32_t, std::uint32_t> stage_key_;
  std::chrono::milliseconds patience_;
  std::shared_ptr<reply_box> box_;
  std::vector<group_call> calls_;
  std::vector<frame_ptr> replies_;
  std::uint64_t call_;
  std::uint64_t step_ = 0;
  std::int32_t layer_ = 0;
  std::int32_t num_cols_ = 0;
};

} // namespace troupe::actors
