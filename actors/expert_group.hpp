#pragma once

#include "troupe/actors/data_plane.hpp"
#include "troupe/actors/device_watch.hpp"
#include "troupe/memory/pulse_page.hpp"
#include "troupe/model/expert_group_model.hpp"

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <caf/all.hpp>

CAF_ALLOW_UNSAFE_MESSAGE_TYPE(troupe::actors::frame_ptr)

namespace troupe::actors {

using expert_group_actor = caf::typed_actor<caf::reacts_to<frame_ptr>>;

/// Where dispatches go while the thread of an expert group waits for them on the transport itself
/// instead of in its mailbox.
class dispatch_box {
public:
  /// Takes the frame if the box is open. False: it belongs into the mailbox.
  bool offer(const frame_ptr& dispatch);

  void open();

  /// What is in the box stays to be taken.
  void close();

  frame_box& frames() { return frames_; }

private:
  std::mutex mutex_;
  bool is_open_ = false;
  frame_box frames_;
};

/// Who an expert group is.
struct expert_group_traits {
  std::uint32_t index = 0;             ///< the group's number
  std::string actor = "expert-group";  ///< as planned: "expert-group-0/copy-1"
  memory::activity pulse;              ///< of its thread
  std::shared_ptr<device_watch> watch; ///< of its device; null: none
};

/// A fixed set of experts of every MoE layer. Lives in a worker, in a thread of its own. Stateless
/// between calls: when it dies, whoever waits for an answer asks its successor or a copy.
/// Dispatches of an epoch older than the newest that the worker knows of are refused.
///
/// The next layer's dispatch mostly follows within milliseconds, so the thread waits for it on the
/// transport before it goes back to its mailbox.
class expert_group : public expert_group_actor::base {
public:
  expert_group(caf::actor_config& config, std::shared_ptr<data_plane> plane,
               std::shared_ptr<kernels::ops> ops,
               std::shared_ptr<model::expert_group_model> experts,
               std::shared_ptr<dispatch_box> arrivals, expert_group_traits traits);

  behavior_type make_behavior() override;

private:
  void serve(const transport::frame& dispatch);
  void listen();
  void answer(const transport::frame& dispatch);
  expected<std::shared_ptr<transport::buffer>> compute(const transport::frame& dispatch);

  std::shared_ptr<data_plane> plane_;
  std::shared_ptr<kernels::ops> ops_;
  std::shared_ptr<model::expert_group_model> experts_;
  std::shared_ptr<dispatch_box> arrivals_;
  std::vector<frame_ptr> arrived_;
  expert_group_traits traits_;
  std::vector<kernels::expert_task> tasks_;
  std::shared_ptr<void> device_rows_;
  std::shared_ptr<void> device_out_;
  std::size_t device_rows_bytes_ = 0;
  std::size_t device_out_bytes_ = 0;
};

} // namespace troupe::actors
