#pragma once

// What the kernels of sampling share.

#include "troupe/kernels/cuda/device.cuh"

namespace troupe::kernels::cuda {

/// Threads of a block.
inline constexpr int kSamplerThreads = 1024;
static_assert(kSamplerThreads == 32 * 32); // a warp adds up what the warps have

/// Below this the distribution has collapsed on its best token (vLLM draws the same line).
inline constexpr float kGreedyTemperature = 1e-5F;

using count64 = unsigned long long;

/// The rank of nothing.
inline constexpr count64 kNobody = ~count64{0};

/// Ascends in the order of tokens: logits fall, and ids rise among equal logits.
__device__ inline count64 rank_of(float logit, std::int32_t token) {
  const std::uint32_t bits = __float_as_uint(logit + 0.0F); // minus zero is zero
  const std::uint32_t ascending = (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
  return count64{~ascending} << 32 | static_cast<std::uint32_t>(token);
}

/// The logit of which a rank was made, but for the sign of zero.
__device__ inline float logit_in(count64 rank) {
  const std::uint32_t ascending = ~static_cast<std::uint32_t>(rank >> 32);
  const bool is_positive = (ascending & 0x80000000U) != 0;
  return __uint_as_float(is_positive ? ascending & 0x7FFFFFFFU : ~ascending);
}

/// The logit of a rank.
__device__ inline float logit_of(const float* logits, count64 rank) {
  return rank == kNobody ? -INFINITY : logits[static_cast<std::uint32_t>(rank)];
}

/// A sum in a block, and what the threads before this one add to it.
template <class T>
struct placed_sum {
  T before;
  T total;
};

/// `memory` holds a value for each warp.
template <class T>
__device__ inline placed_sum<T> add_up_block(T value, T* memory) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const auto scan = [&](T sum) {
    for (int step = 1; step < 32; step *= 2) {
      const T other = __shfl_up_sync(kAllLanes, sum, step);
      sum += lane >= step ? other : T{0};
    }
    return sum;
  };
  const T in_warp = scan(value);
  __syncthreads(); // memory may still be read from the last call
  if (lane == 31) {
    memory[warp] = in_warp;
  }
  __syncthreads();
  const T of_warps = scan(memory[lane]);
  const T up_to_warp = __shfl_sync(kAllLanes, of_warps, warp) - memory[warp];
  return {up_to_warp + in_warp - value, __shfl_sync(kAllLanes, of_warps, 31)};
}

__device__ inline count64 block_min(count64 value, count64* memory) {
  const auto of_warp = [](count64 least) {
    for (int step = 16; step > 0; step /= 2) {
      least = min(least, __shfl_xor_sync(kAllLanes, least, step));
    }
    return least;
  };
  value = of_warp(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    memory[threadIdx.x / 32] = value;
  }
  __syncthreads();
  return of_warp(memory[threadIdx.x % 32]);
}

/// In the same order whatever else runs.
__device__ inline double block_total(double value, double* memory) {
  for (int step = 16; step > 0; step /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, step);
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    memory[threadIdx.x / 32] = value;
  }
  __syncthreads();
  double sum = 0.0;
  for (int i = 0; i < kSamplerThreads / 32; ++i) {
    sum += memory[i];
  }
  return sum;
}

/// The best tokens of the parts of a row, and the sums over them.
struct row_survey {
  count64 best = kNobody;    ///< of all tokens
  count64 allowed = kNobody; ///< of those that are not banned
};

__device__ inline row_survey survey_of(const logit_survey* parts) {
  row_survey result;
#pragma unroll
  for (int i = 0; i < kSurveys; ++i) {
    result.best = min(result.best, parts[i].best);
    result.allowed = min(result.allowed, parts[i].allowed);
  }
  return result;
}

/// Whether a token is drawn, not only the best one taken.
__device__ inline bool is_drawn(const device_sampling& params, float best) {
  return params.target < 0 && params.temperature >= kGreedyTemperature && !isinf(best);
}

} // namespace troupe::kernels::cuda
