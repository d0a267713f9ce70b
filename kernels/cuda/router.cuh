#pragma once

// What the kernels that choose experts share.

#include <cmath>
#include <type_traits>

#include "troupe/kernels/cuda/mma.cuh"

namespace troupe::kernels::cuda {

/// The logits of one expert for kRows rows, which begin at `from`, by one warp, in float32
/// throughout: a tie may hang on them. Every lane gets them.
template <int kRows, class T>
__device__ inline void router_logits(const T* const (&from)[kRows], std::int32_t num_cols,
                                     const void* w, bool is_float, bool is_aligned,
                                     std::int32_t expert, float (&logits)[kRows]) {
  const auto first = std::int64_t{expert} * num_cols;
  const auto lane = static_cast<std::int32_t>(threadIdx.x % 32);
  float dots[kRows] = {};
  if (std::is_same_v<T, bf16> && !is_float && is_aligned) {
    const auto* row_of_w = reinterpret_cast<const uint4*>(static_cast<const bf16*>(w) + first);
#pragma unroll 7
    for (std::int32_t k = lane; k < num_cols / 8; k += 32) {
      const uint4 b = __ldg(row_of_w + k);
      const std::uint32_t bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const uint4 a = load_row(reinterpret_cast<const uint4*>(from[row]) + k);
        const std::uint32_t as[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          dots[row] = fmaf(__uint_as_float(as[j] << 16), __uint_as_float(bs[j] << 16), dots[row]);
          dots[row] = fmaf(__uint_as_float(as[j] & 0xFFFF0000U),
                           __uint_as_float(bs[j] & 0xFFFF0000U), dots[row]);
        }
      }
    }
  } else {
    for (std::int32_t k = lane; k < num_cols; k += 32) {
      const float weight = is_float ? static_cast<const float*>(w)[first + k]
                                    : load(static_cast<const bf16*>(w) + first + k);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        dots[row] = fmaf(load(from[row] + k), weight, dots[row]);
      }
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    logits[row] = warp_sum(dots[row]);
  }
}

/// Rises with a number that is not NaN, and is above 0.
__device__ inline std::uint32_t ascending(float value) {
  const std::uint32_t bits = __float_as_uint(value + 0.0F); // minus zero is zero
  return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}

/// What a group is ranked by, which does not depend on where one begins.
__device__ inline float group_score(const float* scores, std::int32_t count, std::int32_t begin,
                                    group_rank rank) {
  float best = -INFINITY;
  float second = -INFINITY;
  std::int32_t at = begin % count;
  for (std::int32_t i = 0; i < count; ++i) {
    const float score = scores[at];
    second = fmaxf(second, fminf(best, score));
    best = fmaxf(best, score);
    at = at + 1 == count ? 0 : at + 1;
  }
  return count == 1 || rank == group_rank::best ? best : best + second;
}

/// Whether router_logits may read both in pieces of 16 bytes, where both are of bf16.
template <class T>
bool rows_are_aligned(const rows_of<T>& x, const void* w) {
  const auto addresses =
    reinterpret_cast<std::uintptr_t>(x.data) | reinterpret_cast<std::uintptr_t>(w);
  return addresses % 16 == 0 && x.stride % 8 == 0 && x.num_cols % 8 == 0;
}

constexpr std::int32_t floats_of_choice(const router_params& params) {
  return 3 * params.num_experts + params.num_groups;
}

/// The choice of one row, by one warp. `memory` holds floats_of_choice. The logits may have been
/// written by other blocks.
__device__ inline void choose_of_row(const float* logits, const float* bias,
                                     const router_params& params, float* memory,
                                     std::int32_t* experts, float* weights) {
  const std::int32_t num_experts = params.num_experts;
  const std::int32_t group_size = num_experts / params.num_groups;
  float* scores = memory;                     // [num_experts]
  float* biased = scores + num_experts;       // [num_experts]
  float* groups = biased + num_experts;       // [num_groups]
  float* chosen = groups + params.num_groups; // [num_experts], 1 where taken
  const auto lane = static_cast<std::int32_t>(threadIdx.x % 32);

  float largest = -INFINITY;
#pragma unroll 8
  for (std::int32_t e = lane; e < num_experts; e += 32) {
    scores[e] = __ldcg(logits + e);
    biased[e] = bias == nullptr ? 0.0F : __ldg(bias + e);
    largest = fmaxf(largest, scores[e]);
  }
  largest = warp_max(largest);
  float sum = 0.0F;
  for (std::int32_t e = lane; e < num_experts; e += 32) {
    scores[e] = params.score == router_score::sigmoid ? 1.0F / (1.0F + expf(-scores[e]))
                                                      : expf(scores[e] - largest);
    sum += scores[e];
  }
  sum = warp_sum(sum);
  for (std::int32_t e = lane; e < num_experts; e += 32) {
    if (params.score == router_score::softmax) {
      scores[e] /= sum;
    }
    const float score = bias == nullptr ? scores[e] : scores[e] + biased[e];
    biased[e] = score == score ? score : -INFINITY;
    chosen[e] = 0.0F;
  }
  __syncwarp();
  if (params.num_groups_kept < params.num_groups) {
    for (std::int32_t g = lane; g < params.num_groups; g += 32) {
      // Lanes begin at different banks.
      groups[g] = group_score(biased + g * group_size, group_size, lane, params.rank);
    }
    __syncwarp();
    for (std::int32_t e = lane; e < num_experts; e += 32) {
      const std::int32_t g = e / group_size;
      std::int32_t rank = 0;
      for (std::int32_t other = 0; other < params.num_groups; ++other) {
        rank += groups[other] > groups[g] || (groups[other] == groups[g] && other < g) ? 1 : 0;
      }
      if (rank >= params.num_groups_kept) {
        biased[e] = -INFINITY;
      }
    }
    __syncwarp();
  }
  // A lane's best stays the best until it is taken.
  std::uint32_t best = 0;
  std::int32_t at = num_experts; // of nobody
  const auto find_best = [&] {
    best = 0;
    at = num_experts;
    for (std::int32_t e = lane; e < num_experts; e += 32) {
      const std::uint32_t rank = ascending(biased[e]);
      if (chosen[e] == 0.0F && rank > best) {
        best = rank;
        at = e;
      }
    }
  };
  find_best();
  for (std::int32_t k = 0; k < params.top_k; ++k) {
    const std::uint32_t top = __reduce_max_sync(kAllLanes, best);
    const std::int32_t taken = __reduce_min_sync(kAllLanes, best == top ? at : num_experts);
    if (at == taken) {
      chosen[at] = 1.0F;
      find_best();
    }
  }
  __syncwarp();
  std::int32_t count = 0;
  for (std::int32_t first = 0; first < num_experts; first += 32) {
    const bool mine = first + lane < num_experts && chosen[first + lane] != 0.0F;
    const unsigned taken = __ballot_sync(kAllLanes, mine);
    if (mine) {
      const std::int32_t at = count + __popc(taken & ((1U << lane) - 1));
      experts[at] = first + lane;
      biased[at] = scores[first + lane]; // no longer needed for anything else
    }
    count += __popc(taken);
  }
  __syncwarp();
  float total = 0.0F;
  for (std::int32_t k = 0; k < params.top_k; ++k) {
    total += biased[k];
  }
  const float divisor = params.normalise ? total + 1e-20F : 1.0F;
  for (std::int32_t k = lane; k < params.top_k; k += 32) {
    weights[k] = biased[k] / divisor * params.scaling_factor;
  }
}

} // namespace troupe::kernels::cuda
