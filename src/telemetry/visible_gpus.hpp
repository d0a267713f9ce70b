#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace troupe::telemetry {

/// What tells one GPU of a host from another.
struct gpu_identity {
  std::string uuid; ///< "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"
  std::string name; ///< "NVIDIA H100 80GB HBM3"
};

/// The environment that decides how CUDA counts GPUs; nullopt: the variable is not set.
struct cuda_environment {
  std::optional<std::string> visible_devices; ///< CUDA_VISIBLE_DEVICES
  std::optional<std::string> device_order;    ///< CUDA_DEVICE_ORDER

  /// Of this process, and of the processes that it starts.
  static cuda_environment current();
};

/// Which of a host's GPUs, in NVML's order, is cuda:0, cuda:1 and so on: decided without a CUDA
/// context. An entry is nullopt where CUDA has a device there and it cannot be told which: a part
/// of a GPU (MIG), or a GPU given by its number on a host with GPUs of several kinds, which CUDA
/// puts in an order of its own unless it is told PCI_BUS_ID.
///
/// Source: CUDA programming guide, "CUDA Environment Variables": numbers and UUIDs, which may be
/// cut short as long as one GPU alone begins so; the list ends at the first entry that is none
/// of these. An entry that names a GPU again is taken for such an entry.
std::vector<std::optional<std::size_t>> visible_gpus(std::span<const gpu_identity> gpus,
                                                     const cuda_environment& environment);

/// The number of "cuda:3"; nullopt for anything else.
std::optional<std::size_t> cuda_index(std::string_view device);

} // namespace troupe::telemetry
