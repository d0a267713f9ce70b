#pragma once

#include "troupe/memory/keeper.hpp"
#include "troupe/telemetry/nvml.hpp"

#include <chrono>
#include <optional>
#include <string>
#include <vector>

namespace troupe::telemetry {

/// A GPU of this node and the process that owns its memory.
struct watched_gpu {
  std::string device;         ///< "cuda:0"
  std::string keeper;         ///< "node-0/keeper-0"
  std::string keeper_address; ///< see memory::keeper_address
};

/// Asks driver and keepers how the GPUs of a node are. CUDA's numbers of GPUs are not NVML's: a
/// keeper, which has a CUDA context, says on which bus its GPU is; until it does, the environment
/// decides (visible_gpus). A GPU of which it cannot be told which one it is has no reading. Used
/// by one thread, which may be blocked for a while: by the driver, and by each keeper for
/// `keeper_time`.
class gpu_sampler {
public:
  struct options {
    std::string library = nvml::usual_library;
    cuda_environment environment = cuda_environment::current();
    std::chrono::milliseconds keeper_time{300};
  };

  /// Opens the driver's library; where there is none a line in the log says so, once, and only
  /// keepers are asked.
  gpu_sampler(std::string node, std::vector<watched_gpu> gpus, options given);

  /// How they are now. The keepers' processes are the caller's, who knows their pids.
  proto::DeviceReport sample();

private:
  struct watched {
    watched_gpu gpu;
    std::optional<memory::keeper_client> keeper;
    std::string bus_id; ///< as its keeper has said
  };

  proto::KeeperView ask_keeper(watched& w) const;
  nvml::device find(const watched& w) const;

  std::string node_;
  std::vector<watched> gpus_;
  options options_;
  std::optional<nvml> driver_;
  std::vector<std::optional<std::size_t>> visible_; ///< NVML's number by CUDA's
};

} // namespace troupe::telemetry
