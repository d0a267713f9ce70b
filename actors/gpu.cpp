#include "troupe/actors/gpu.hpp"

#include <utility>

namespace troupe::actors {

gpu::gpu(caf::actor_config& config, std::shared_ptr<gpu_device> device,
         std::vector<std::shared_ptr<device_watch>> watches, overdue_callback on_overdue)
  : gpu_actor::base(config),
    device_(std::move(device)),
    watches_(std::move(watches)),
    on_overdue_(std::move(on_overdue)) {}

gpu::behavior_type gpu::make_behavior() {
  if (!watches_.empty())
    delayed_send(this, look_interval, tick_atom::value);
  return {[this](tick_atom) {
    delayed_send(this, look_interval, tick_atom::value);
    for (const auto& watch : watches_)
      if (auto limit = watch->look(clock().now()))
        on_overdue_(*watch, *limit);
  }};
}

} // namespace troupe::actors
