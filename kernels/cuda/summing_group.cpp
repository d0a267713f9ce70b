#include "troupe/kernels/cuda/summing_group.hpp"

#include <cstdlib>
#include <set>

#include "troupe/kernels/cuda/nccl_group.hpp"
#include "troupe/kernels/cuda/nccl_library.hpp"
#include "troupe/kernels/cuda/rank_group.hpp"
#include "troupe/kernels/cuda/runtime_error.hpp"

namespace troupe::kernels::cuda {

namespace {

bool all_reach_each_other(std::span<const std::int32_t> devices) {
  for (const auto from : devices) {
    for (const auto to : devices) {
      int reaches = 1;
      std::string ignored;
      if (from != to
          && (!succeeded(cudaDeviceCanAccessPeer(&reaches, from, to), from, "peer access", ignored)
              || reaches == 0)) {
        return false;
      }
    }
  }
  return true;
}

} // namespace

void prepare_environment() {
  // A group is in one process: nothing of it has to be reached from elsewhere.
  ::setenv("NCCL_SOCKET_IFNAME", "lo", 0);
  ::setenv("NCCL_IB_DISABLE", "1", 0);
  // One listener a host, for reports that nobody asks for.
  ::setenv("NCCL_RAS_ENABLE", "0", 0);
  // NCCL would make all memory of GPUs that reach each other reachable, and then taking memory on
  // one can wait for a kernel on another that waits in turn. Such GPUs have peer memory.
  ::setenv("NCCL_P2P_DISABLE", "1", 0);
  // Ranks are connected when the group is made, and not by its first sum: a standby has that behind
  // it, and the guard can take the names of what they share out of the file system.
  ::setenv("NCCL_RUNTIME_CONNECT", "0", 0);
  // Multicast is in the keeping of the whole host, where a process that is killed may leave it in
  // disorder.
  ::setenv("NCCL_NVLS_ENABLE", "0", 0);
}

std::shared_ptr<gpu_rank_group> make_gpu_rank_group(std::span<const std::int32_t> devices,
                                                    std::int32_t max_rows, std::int32_t num_cols,
                                                    std::string& error,
                                                    std::chrono::milliseconds deadline,
                                                    sum_transport transport, numerics mode) {
  if (devices.empty() || devices.size() > kMostRanks || max_rows < 1 || num_cols < 1) {
    error = "a group has 1 to " + std::to_string(kMostRanks) + " ranks, and rows";
    return nullptr;
  }
  for (const std::int32_t device : devices) {
    if (device < 0 || device >= num_devices()) {
      error = "there is no cuda:" + std::to_string(device);
      return nullptr;
    }
  }
  const std::int32_t width = mode == numerics::exact ? 2 * num_cols : num_cols;
  if (devices.size() > 1
      && choose_transport(transport, all_reach_each_other(devices)) == sum_transport::nccl) {
    if (std::set(devices.begin(), devices.end()).size() < devices.size()) {
      error = "NCCL needs a GPU for each rank";
      return nullptr;
    }
    return nccl_group::make(kNcclLibrary, devices, max_rows, width, deadline, error);
  }
  return rank_group::make(devices, max_rows, width, deadline, error);
}

} // namespace troupe::kernels::cuda
