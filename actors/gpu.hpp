#pragma once

#include "troupe/actors/device_watch.hpp"
#include "troupe/actors/gpu_device.hpp"
#include "troupe/actors/local_messages.hpp"

#include <chrono>
#include <functional>
#include <memory>
#include <vector>

#include <caf/all.hpp>

namespace troupe::actors {

using gpu_actor = caf::typed_actor<caf::reacts_to<tick_atom>>;

/// A GPU of a worker, in a thread of its own: owns the device and the connection to its keeper, and
/// looks whether the GPU still answers those who compute with it. The computing itself is theirs:
/// a stage or an expert group queues its work on a stream of its own (`kernels::ops`) and waits.
///
/// Lives as long as its worker. A GPU that does not answer ends the whole process: what it was
/// given to do cannot be taken back, and the successor finds weights and KV pages with the keeper.
class gpu : public gpu_actor::base {
public:
  /// What is done about a wait that has lasted longer than `limit`. In a worker it does not return.
  using overdue_callback =
    std::function<void(const device_watch& whose, std::chrono::nanoseconds limit)>;

  static constexpr std::chrono::milliseconds look_interval{5};

  /// `watches`: of the actors of this worker that compute with it. None are looked at where nobody
  /// can say how long they may take.
  gpu(caf::actor_config& config, std::shared_ptr<gpu_device> device,
      std::vector<std::shared_ptr<device_watch>> watches,
      overdue_callback on_overdue = device_watch::end_process);

  behavior_type make_behavior() override;

private:
  std::shared_ptr<gpu_device> device_;
  std::vector<std::shared_ptr<device_watch>> watches_;
  overdue_callback on_overdue_;
};

} // namespace troupe::actors
