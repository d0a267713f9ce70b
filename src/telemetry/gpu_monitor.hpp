#pragma once

#include "troupe/telemetry/gpu_sampler.hpp"

#include <chrono>
#include <memory>
#include <optional>

namespace troupe::telemetry {

/// Looks at a node's GPUs again and again, in a thread of its own, since the driver may take its
/// time. Owned by the node's supervisor.
class gpu_monitor {
public:
  static constexpr std::chrono::milliseconds usual_interval{1000};

  gpu_monitor(std::string node, std::vector<watched_gpu> gpus, gpu_sampler::options given = {},
              std::chrono::milliseconds interval = usual_interval);

  /// Waits a moment for what is being asked. A thread that the driver holds longer is left behind.
  ~gpu_monitor();

  /// The newest report, if it has not been taken yet.
  std::optional<proto::DeviceReport> take();

private:
  struct shared;
  std::shared_ptr<shared> shared_;
};

} // namespace troupe::telemetry
