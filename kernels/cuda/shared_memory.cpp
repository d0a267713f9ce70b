#include "troupe/kernels/cuda/shared_memory.hpp"

#include <cstring>

#include <cuda_runtime_api.h>

#include "troupe/kernels/cuda/runtime_error.hpp"

namespace troupe::kernels::cuda {

namespace {

/// The driver cuts smaller pieces from blocks of this size, and a handle shares the whole block.
constexpr std::size_t kShared = std::size_t{2} << 20;

} // namespace

exported_memory export_memory(std::int32_t device, std::size_t bytes, std::string& error) {
  exported_memory result;
  bytes = (bytes + kShared - 1) / kShared * kShared;
  void* memory = nullptr;
  cudaIpcMemHandle_t handle;
  if (!succeeded(cudaSetDevice(device), device, "cudaSetDevice", error)) {
    return result;
  }
  if (!succeeded(cudaMalloc(&memory, bytes), device, "cudaMalloc", error)) {
    std::size_t free_bytes = 0;
    std::size_t total_bytes = 0;
    if (cudaMemGetInfo(&free_bytes, &total_bytes) == cudaSuccess) {
      error += " (" + std::to_string(free_bytes) + " of " + std::to_string(total_bytes)
               + " bytes are free)";
    }
    return result;
  }
  const std::shared_ptr<void> owned(memory, [device](void* at) {
    cudaSetDevice(device);
    cudaFree(at);
  });
  if (!succeeded(cudaMemset(memory, 0, bytes), device, "cudaMemset", error)
      || !succeeded(cudaDeviceSynchronize(), device, "clearing memory", error)
      || !succeeded(cudaIpcGetMemHandle(&handle, memory), device, "cudaIpcGetMemHandle", error)) {
    return result;
  }
  result.memory = owned;
  result.handle.assign(reinterpret_cast<const char*>(&handle), sizeof(handle));
  return result;
}

std::shared_ptr<void> import_memory(std::int32_t device, const std::string& handle,
                                    std::string& error) {
  cudaIpcMemHandle_t wanted;
  if (handle.size() != sizeof(wanted)) {
    error = "cuda:" + std::to_string(device) + ": a handle of " + std::to_string(handle.size())
            + " bytes is none of memory";
    return nullptr;
  }
  std::memcpy(&wanted, handle.data(), sizeof(wanted));
  void* memory = nullptr;
  if (!succeeded(cudaSetDevice(device), device, "cudaSetDevice", error)
      || !succeeded(cudaIpcOpenMemHandle(&memory, wanted, cudaIpcMemLazyEnablePeerAccess), device,
                    "cudaIpcOpenMemHandle", error)) {
    return nullptr;
  }
  return {memory, [device](void* at) {
            cudaSetDevice(device);
            cudaIpcCloseMemHandle(at);
          }};
}

} // namespace troupe::kernels::cuda
