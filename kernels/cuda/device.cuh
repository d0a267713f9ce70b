#pragma once

// What the kernels share, for device code.

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "troupe/kernels/cuda/kernels.hpp"

namespace troupe::kernels::cuda {

inline constexpr unsigned kAllLanes = 0xFFFFFFFFU;

/// Launches a kernel that may begin while the one before it on the stream still runs (programmatic
/// dependent launch, CUDA programming guide). It calls follow() before it touches what another
/// kernel writes or reads; weights it may read earlier, since no kernel of a step writes them.
/// Neighbouring blocks form clusters of the size given.
template <class... Params, class... Args>
void launch_clusters(cudaStream_t stream, dim3 grid, unsigned cluster, dim3 block,
                     std::size_t shared_bytes, void (*kernel)(Params...), const Args&... args) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

/// The same without clusters.
template <class... Params, class... Args>
void launch(cudaStream_t stream, dim3 grid, dim3 block, std::size_t shared_bytes,
            void (*kernel)(Params...), const Args&... args) {
  launch_clusters(stream, grid, 1, block, shared_bytes, kernel, args...);
}

/// Lets the next kernel begin, and waits until the one before is complete, with which all earlier
/// ones are, since each of them waits as well.
__device__ inline void follow() {
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

__device__ inline float warp_sum(float value) {
  for (int step = 16; step > 0; step /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, step);
  }
  return value;
}

__device__ inline float warp_max(float value) {
  for (int step = 16; step > 0; step /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  }
  return value;
}

/// The sum over a block of whole warps, in the same order whatever else runs. `memory` holds 32.
__device__ inline float block_sum(float value, float* memory) {
  value = warp_sum(value);
  __syncthreads(); // memory may still be read from the last call
  if (threadIdx.x % 32 == 0) {
    memory[threadIdx.x / 32] = value;
  }
  __syncthreads();
  float sum = 0.0F;
  for (unsigned i = 0; i < blockDim.x / 32; ++i) {
    sum += memory[i];
  }
  return sum;
}

__device__ inline float block_max(float value, float* memory) {
  value = warp_max(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    memory[threadIdx.x / 32] = value;
  }
  __syncthreads();
  float best = memory[0];
  for (unsigned i = 1; i < blockDim.x / 32; ++i) {
    best = fmaxf(best, memory[i]);
  }
  return best;
}

/// SwiGLU of one element.
__device__ inline float gated(float gate, float up) {
  return gate / (1.0F + expf(-gate)) * up;
}

// An element of activations as a number, and back.

__device__ inline float load(const bf16* at) {
  return __bfloat162float(*at);
}

__device__ inline float load(const float* at) {
  return *at;
}

__device__ inline void store(bf16* at, float value) {
  *at = __float2bfloat16_rn(value);
}

__device__ inline void store(float* at, float value) {
  *at = value;
}

/// Where a position of a row's sequence lies in the pages.
template <class T>
__device__ inline std::int64_t place_of(const device_batch& batch, const pages_of<T>& pages,
                                        std::int32_t row, std::int32_t position) {
  const std::int32_t* table = batch.tables + batch.offsets[batch.sequences[row]];
  const std::int64_t page = table[position / pages.page_tokens];
  return (page * pages.page_tokens + position % pages.page_tokens)
         * (pages.first_width + pages.second_width);
}

} // namespace troupe::kernels::cuda
