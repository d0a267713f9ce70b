#pragma once

#include "troupe/actors/data_plane.hpp"
#include "troupe/memory/pulse_page.hpp"
#include "troupe/model/dispatch_plan.hpp"
#include "troupe/model/expert_exchange.hpp"
#include "troupe/recovery/call_policy.hpp"

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

namespace troupe::actors {

/// How patient a stage is with expert groups.
struct call_limits {
  std::chrono::milliseconds patience{30000}; ///< a call waits for an answer at most
  std::chrono::milliseconds timeout{0};      ///< then it is sent to another copy or again; 0: never
};

/// The experts of a stage where they live in other processes. One DISPATCH frame goes to each
/// group that a layer's tokens need, one COMBINE comes back. A group that dies meanwhile is
/// asked again as soon as a copy or its successor can be reached; one that does not answer in time
/// is asked again too, rather another copy of it (recovery::choose_callee); the others are not.
/// Whichever answer comes first counts: all have the same bits. Belongs to the stage's computing
/// thread.
class remote_experts final : public model::expert_exchange {
public:
  /// `stage_key` is (replica, index) of the stage; `pulse` is its computing thread's.
  remote_experts(std::shared_ptr<data_plane> plane, kernels::ops& ops, model::dispatch_plan plan,
                 std::pair<std::uint32_t, std::uint32_t> stage_key, std::uint64_t incarnation,
                 call_limits limits, memory::activity pulse = {});

  /// The step that the following calls belong to, for the frames' headers.
  void set_step(std::uint64_t step) { step_ = step; }

  expected<void> begin(std::int32_t layer, const kernels::rows_view& x,
                       std::span<const std::int32_t> experts, std::int32_t top_k) override;
  expected<void> finish(const kernels::rows_view& expert_out,
                        std::span<std::int32_t> expert_rows) override;

private:
  using time_point = std::chrono::steady_clock::time_point;

  /// A process that was sent the present call of a group.
  struct asked_copy {
    data_plane::target where;
    time_point at;
    std::uint32_t num_times = 0;
  };

  struct group_call {
    std::shared_ptr<transport::buffer> payload;
    std::int32_t num_tasks = 0;
    std::int32_t num_rows = 0;
    std::int32_t first_output = 0;
    bool done = true;
    bool is_due = true; ///< to be sent at once, to whoever can be reached
    std::vector<asked_copy> asked;
    std::size_t last = 0; ///< index into `asked` of the latest, where there is one
    std::uint32_t num_sent = 0;
    std::uint32_t num_refusals = 0;
    time_point overdue_at = time_point::max();
    std::uint64_t sent_epoch = 0;
  };

  void send_due(time_point now);
  bool wants_sending(std::size_t group, time_point now);
  void send_to(std::size_t group, const data_plane::target& target, time_point now);
  time_point next_wake() const;
  expected<void> take(const transport::frame& reply, const kernels::rows_view& expert_out,
                      time_point now);

  std::shared_ptr<data_plane> plane_;
  kernels::ops& ops_;
  model::dispatch_plan plan_;
  std::pair<std::uint32_t, std::uint32_t> stage_key_;
  call_limits limits_;
  recovery::call_patience call_patience_;
  memory::activity pulse_;
  std::shared_ptr<frame_box> box_;
  std::vector<group_call> calls_;
  std::vector<std::vector<data_plane::copy>> copies_; ///< by group, as of seen_changes_
  std::vector<recovery::callee> callees_;
  std::uint64_t seen_changes_ = 0;
  std::vector<frame_ptr> replies_;
  std::uint64_t call_;
  std::uint64_t step_ = 0;
  std::int32_t layer_ = 0;
  std::int32_t num_cols_ = 0;
};

} // namespace troupe::actors
