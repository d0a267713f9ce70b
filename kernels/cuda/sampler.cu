#include "troupe/kernels/cuda/device.cuh"

#include <cmath>

namespace troupe::kernels::cuda {

namespace {

constexpr int kThreads = 1024;
constexpr int kBins = 2048;     ///< two for each thread
constexpr int kListSize = 1024; ///< one for each thread

/// Below this the distribution has collapsed on its best token (vLLM draws the same line).
constexpr float kGreedyTemperature = 1e-5F;

/// Probabilities relative to the best token are counted in units of 2^-40, as whole numbers: their
/// sums do not depend on the order in which they are made. What is less than half a unit is never
/// drawn.
constexpr double kUnits = 1099511627776.0;

using count64 = unsigned long long;

/// Ascends in the order of tokens: logits fall, and ids rise among equal logits.
__device__ count64 rank_of(float logit, std::int32_t token) {
  const std::uint32_t bits = __float_as_uint(logit + 0.0F); // minus zero is zero
  const std::uint32_t ascending = (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
  return count64{~ascending} << 32 | static_cast<std::uint32_t>(token);
}

__device__ count64 block_total(count64 value, count64* memory) {
  for (int step = 16; step > 0; step /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, step);
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    memory[threadIdx.x / 32] = value;
  }
  __syncthreads();
  count64 sum = 0;
  for (int i = 0; i < kThreads / 32; ++i) {
    sum += memory[i];
  }
  return sum;
}

__device__ count64 block_min(count64 value, count64* memory) {
  for (int step = 16; step > 0; step /= 2) {
    value = min(value, __shfl_xor_sync(kAllLanes, value, step));
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    memory[threadIdx.x / 32] = value;
  }
  __syncthreads();
  count64 least = memory[0];
  for (int i = 1; i < kThreads / 32; ++i) {
    least = min(least, memory[i]);
  }
  return least;
}

__device__ double block_sum_double(double value, double* memory) {
  for (int step = 16; step > 0; step /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, step);
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    memory[threadIdx.x / 32] = value;
  }
  __syncthreads();
  double sum = 0.0;
  for (int i = 0; i < kThreads / 32; ++i) {
    sum += memory[i];
  }
  return sum;
}

/// A row of logits with those of its tokens that may be drawn.
struct candidates {
  const float* logits;
  std::int32_t num_tokens;
  float best;
  float temperature;
  float min_p;
  count64 last; ///< no token beyond this rank

  __device__ float power(float logit) const { return expf((logit - best) / temperature); }

  /// 0 for those that are out.
  __device__ count64 units(std::int32_t token) const {
    const float logit = logits[token];
    if (!(logit > -INFINITY) || rank_of(logit, token) > last) {
      return 0;
    }
    const float value = power(logit);
    if (logit < best && !(value > 0.0F && value >= min_p)) {
      return 0;
    }
    return static_cast<count64>(__double2ll_rn(static_cast<double>(value) * kUnits));
  }

  /// Rises as logits fall, from 0 to kBins - 1, where NaN and what is far below the best are too.
  __device__ int bin(float logit) const {
    const float place = (best - logit) / temperature * (kBins / 29.0F);
    return place < kBins - 1 ? static_cast<int>(place) : kBins - 1;
  }

  /// The same within a bin.
  __device__ int fine_bin(float logit) const {
    const float place = (best - logit) / temperature * (kBins / 29.0F);
    const float within = (place - static_cast<float>(bin(logit))) * kBins;
    return within < kBins - 1 ? static_cast<int>(within) : kBins - 1;
  }
};

struct sampler_memory {
  count64 block[kThreads / 32];
  count64 ranks[kListSize];
  count64 amounts[kListSize];
  std::uint32_t low[kBins];
  std::uint32_t high[kBins];
  std::int32_t list_size;
  std::int32_t bin;
  count64 before; ///< what the bins before `bin` hold
  count64 total;
};

/// Counts the candidates of a bin (-1: all) by bins of their own and leaves in `memory` the one in
/// which `threshold` is passed, or the last that holds any.
__device__ void find_bin(const candidates& from, count64 before, count64 threshold, bool by_count,
                         int coarse, sampler_memory& memory) {
  for (int i = threadIdx.x; i < kBins; i += kThreads) {
    memory.low[i] = 0;
    memory.high[i] = 0;
  }
  __syncthreads();
  for (std::int32_t t = threadIdx.x; t < from.num_tokens; t += kThreads) {
    const float logit = from.logits[t];
    if (coarse >= 0 && from.bin(logit) != coarse) {
      continue;
    }
    const count64 units = from.units(t);
    if (units != 0) {
      const count64 amount = by_count ? 1 : units;
      const int bin = coarse < 0 ? from.bin(logit) : from.fine_bin(logit);
      const auto low = static_cast<std::uint32_t>(amount);
      const std::uint32_t old = atomicAdd(&memory.low[bin], low);
      const std::uint32_t carry = old + low < old ? 1 : 0;
      const std::uint32_t high = static_cast<std::uint32_t>(amount >> 32) + carry;
      if (high != 0) {
        atomicAdd(&memory.high[bin], high);
      }
    }
  }
  __syncthreads();
  // Sums of all bins up to the two of each thread.
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int bin = 2 * threadIdx.x;
  const count64 first = count64{memory.high[bin]} << 32 | memory.low[bin];
  const count64 second = count64{memory.high[bin + 1]} << 32 | memory.low[bin + 1];
  count64 sum = first + second;
  for (int step = 1; step < 32; step *= 2) {
    const count64 other = __shfl_up_sync(kAllLanes, sum, step);
    sum += lane >= step ? other : 0;
  }
  if (lane == 31) {
    memory.block[warp] = sum;
  }
  __syncthreads();
  count64 total = before;
  for (int i = 0; i < kThreads / 32; ++i) {
    if (i == warp) {
      sum += total;
    }
    total += memory.block[i];
  }
  threshold = min(threshold, total - 1);
  const count64 middle = sum - second;
  const count64 begin = middle - first;
  if (begin <= threshold && threshold < sum) {
    memory.bin = threshold < middle ? bin : bin + 1;
    memory.before = threshold < middle ? begin : middle;
  }
  if (threadIdx.x == 0) {
    memory.total = total;
  }
  __syncthreads();
}

/// The rank of the first token, in order, with which more than `threshold` units (or tokens) have
/// been counted; the last candidate where they are not that many.
__device__ count64 select(const candidates& from, count64 threshold, bool by_count,
                          sampler_memory& memory) {
  find_bin(from, 0, threshold, by_count, -1, memory);
  threshold = min(threshold, memory.total - 1);
  const int coarse = memory.bin;
  count64 before = memory.before;
  int fine = -1;
  std::int32_t size = 0;
  for (int round = 0; round < 2; ++round) {
    __syncthreads();
    if (threadIdx.x == 0) {
      memory.list_size = 0;
    }
    __syncthreads();
    for (std::int32_t t = threadIdx.x; t < from.num_tokens; t += kThreads) {
      const float logit = from.logits[t];
      if (from.bin(logit) == coarse && (fine < 0 || from.fine_bin(logit) == fine)) {
        const count64 units = from.units(t);
        if (units != 0) {
          const std::int32_t at = atomicAdd(&memory.list_size, 1);
          if (at < kListSize) {
            memory.ranks[at] = rank_of(logit, t);
            memory.amounts[at] = by_count ? 1 : units;
          }
        }
      }
    }
    __syncthreads();
    size = memory.list_size;
    if (size <= kListSize || fine >= 0) {
      break;
    }
    find_bin(from, before, threshold, by_count, coarse, memory);
    fine = memory.bin;
    before = memory.before;
  }
  if (size <= kListSize) {
    count64 mine = ~count64{0};
    if (static_cast<std::int32_t>(threadIdx.x) < size) {
      mine = memory.ranks[threadIdx.x];
      count64 sum = before;
      for (std::int32_t i = 0; i < size; ++i) {
        sum += memory.ranks[i] <= mine ? memory.amounts[i] : 0;
      }
      mine = sum > threshold ? mine : ~count64{0};
    }
    const count64 found = block_min(mine, memory.block);
    __syncthreads(); // the memory is used again
    return found;
  }
  // Very many logits are (almost) equal: halve the range of ranks.
  count64 lowest = 0;
  count64 highest = ~count64{0};
  while (lowest < highest) {
    const count64 middle = lowest + (highest - lowest) / 2;
    count64 sum = 0;
    for (std::int32_t t = threadIdx.x; t < from.num_tokens; t += kThreads) {
      const float logit = from.logits[t];
      if (from.bin(logit) == coarse && from.fine_bin(logit) == fine
          && rank_of(logit, t) <= middle) {
        const count64 units = from.units(t);
        sum += by_count ? (units != 0 ? 1 : 0) : units;
      }
    }
    if (before + block_total(sum, memory.block) > threshold) {
      highest = middle;
    } else {
      lowest = middle + 1;
    }
  }
  __syncthreads();
  return lowest;
}

__device__ std::int32_t choose(candidates& from, const device_sampling& params,
                               sampler_memory& memory) {
  if (params.min_p > 0.0F) {
    from.min_p = params.min_p;
  }
  const auto total_of = [&] {
    count64 sum = 0;
    for (std::int32_t t = threadIdx.x; t < from.num_tokens; t += kThreads) {
      sum += from.units(t);
    }
    return block_total(sum, memory.block);
  };
  if (params.top_k > 0 && params.top_k < from.num_tokens) {
    from.last = select(from, static_cast<count64>(params.top_k - 1), true, memory);
  }
  count64 total = total_of();
  if (params.top_p < 1.0F) {
    const double enough = static_cast<double>(total) * fmaxf(params.top_p, 0.0F);
    const auto threshold = static_cast<count64>(__double2ll_ru(enough));
    from.last = select(from, threshold > 0 ? threshold - 1 : 0, false, memory);
    total = total_of();
  }
  const auto target = static_cast<count64>(__double2ll_rd(params.uniform * total));
  return static_cast<std::int32_t>(select(from, target, false, memory));
}

/// The best of the tokens first to last - 1 whose rank is above `after`, or nothing (all ones).
__device__ count64 best_after(const float* logits, std::int32_t first, std::int32_t last,
                              bool is_any, count64 after, count64* memory) {
  count64 best = ~count64{0};
  for (std::int32_t t = first + threadIdx.x; t < last; t += kThreads) {
    if (logits[t] == logits[t]) {
      const count64 rank = rank_of(logits[t], t);
      if (is_any || rank > after) {
        best = min(best, rank);
      }
    }
  }
  return block_min(best, memory);
}

/// The logit of a rank of best_after.
__device__ float logit_of(const float* logits, count64 rank) {
  return rank == ~count64{0} ? -INFINITY : logits[static_cast<std::uint32_t>(rank)];
}

__global__ void __launch_bounds__(kThreads)
  survey(const float* logits, std::int64_t stride, std::int32_t num_tokens, logit_survey* out) {
  __shared__ count64 memory[32];
  __shared__ double doubles[32];
  follow();
  logits += blockIdx.y * stride;
  const auto part = static_cast<std::int64_t>(blockIdx.x);
  const auto first = static_cast<std::int32_t>(num_tokens * part / kSurveys);
  const auto last = static_cast<std::int32_t>(num_tokens * (part + 1) / kSurveys);
  const count64 best = best_after(logits, first, last, true, 0, memory);
  const float largest = logit_of(logits, best);
  double powers = 0.0;
  for (std::int32_t t = first + threadIdx.x; t < last; t += kThreads) {
    // Where nothing is above -infinity, only NaN counts.
    powers += expf(logits[t] - (largest > -INFINITY ? largest : 0.0F));
  }
  powers = block_sum_double(powers, doubles);
  if (threadIdx.x == 0) {
    out[blockIdx.y * kSurveys + part] = {best, powers};
  }
}

__global__ void __launch_bounds__(kThreads)
  sample(const float* logits, std::int64_t stride, std::int32_t num_tokens,
         const device_sampling* all_params, const std::int32_t* banned, const logit_survey* surveys,
         float* all_allowed, sampled_token* out) {
  __shared__ sampler_memory memory;
  follow();
  const device_sampling params = all_params[blockIdx.x];
  logits += blockIdx.x * stride;
  const float* allowed = logits;
  if (params.num_banned > 0) {
    float* copy = all_allowed + static_cast<std::int64_t>(blockIdx.x) * num_tokens;
    for (std::int32_t t = threadIdx.x; t < num_tokens; t += kThreads) {
      copy[t] = logits[t];
    }
    __syncthreads();
    for (std::int32_t i = threadIdx.x; i < params.num_banned; i += kThreads) {
      const std::int32_t token = banned[params.first_banned + i];
      if (token >= 0 && token < num_tokens) {
        copy[token] = -INFINITY;
      }
    }
    __syncthreads();
    allowed = copy;
  }

  const count64 nobody = ~count64{0};
  surveys += std::int64_t{blockIdx.x} * kSurveys;
  count64 top = nobody;
#pragma unroll
  for (int i = 0; i < kSurveys; ++i) {
    top = min(top, surveys[i].best);
  }
  const float largest = logit_of(logits, top);
  double log_sum = 0.0; // of the first thread
  if (threadIdx.x < 32) {
    const int part = threadIdx.x % kSurveys;
    const float of_part = logit_of(logits, surveys[part].best);
    const double mine = surveys[part].powers * exp(static_cast<double>(of_part) - largest);
    for (int i = 0; i < kSurveys; ++i) {
      log_sum += __shfl_sync(kAllLanes, mine, i);
    }
    log_sum = log(log_sum);
  }

  std::int32_t token = params.target;
  if (token < 0) {
    const count64 first =
      allowed == logits ? top : best_after(allowed, 0, num_tokens, true, 0, memory.block);
    const float best = logit_of(allowed, first);
    if (best == -INFINITY) {
      token = -1;
    } else if (!(params.temperature >= kGreedyTemperature) || isinf(best)) {
      token = static_cast<std::int32_t>(first);
    } else {
      candidates from{allowed, num_tokens, best, params.temperature, 0.0F, nobody};
      token = choose(from, params, memory);
    }
  }
  sampled_token& result = out[blockIdx.x];
  const auto logprob = [&](float logit) {
    return static_cast<float>(static_cast<double>(logit) - largest - log_sum);
  };
  if (threadIdx.x == 0) {
    result.token = token;
    result.logprob = token >= 0 ? logprob(logits[token]) : -INFINITY;
  }
  const std::int32_t count = min(max(params.num_logprobs, 0), min(kMaxLogprobs, num_tokens));
  count64 rank = 0;
  std::int32_t found = 0;
  for (; found < count; ++found) {
    rank = best_after(logits, 0, num_tokens, found == 0, rank, memory.block);
    if (rank == nobody) {
      break;
    }
    if (threadIdx.x == 0) {
      result.top_tokens[found] = static_cast<std::int32_t>(rank);
      result.top_logprobs[found] = logprob(logits[static_cast<std::uint32_t>(rank)]);
    }
  }
  if (threadIdx.x == 0) {
    result.num_top = found;
  }
}

} // namespace

void launch_sample(cudaStream_t stream, const float* logits, std::int64_t stride,
                   std::int32_t num_rows, std::int32_t num_tokens, const device_sampling* params,
                   const std::int32_t* banned, logit_survey* surveys, float* allowed,
                   sampled_token* out) {
  launch(stream, dim3(kSurveys, num_rows), kThreads, 0, survey, logits, stride, num_tokens,
         surveys);
  launch(stream, num_rows, kThreads, 0, sample, logits, stride, num_tokens, params, banned, surveys,
         allowed, out);
}

} // namespace troupe::kernels::cuda
