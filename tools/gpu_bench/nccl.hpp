#pragma once

#include <memory>
#include <span>

#include <cuda_runtime_api.h>

#include <cstdint>

namespace gpu_bench {

/// NCCL as a ruler. It is opened when it is asked for, so that nothing of ours needs it.
class nccl {
public:
  virtual ~nccl() = default;

  /// Queues the sum of bf16 values over all ranks for one of them. False where it fails.
  virtual bool all_reduce(int rank, void* data, std::size_t num_elements, cudaStream_t stream) = 0;
};

/// One rank a device. Null where the library, or the header when this was built, is not there.
std::unique_ptr<nccl> open_nccl(std::span<const std::int32_t> devices);

} // namespace gpu_bench
