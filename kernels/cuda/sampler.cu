#include "troupe/kernels/cuda/sampler.cuh"

#include <cmath>

namespace troupe::kernels::cuda {

namespace {

constexpr int kThreads = kSamplerThreads;

/// The best of the tokens first to last - 1 whose rank is above `after`, or nobody.
__device__ count64 best_after(const float* logits, std::int32_t first, std::int32_t last,
                              bool is_any, count64 after, count64* memory) {
  count64 best = kNobody;
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

/// One block looks at one part of a row.
__global__ void __launch_bounds__(kThreads)
  survey(const float* logits, std::int64_t stride, std::int32_t num_tokens,
         const device_sampling* all_params, const std::int32_t* banned, float* all_allowed,
         logit_survey* out) {
  __shared__ count64 memory[32];
  __shared__ double doubles[32];
  follow();
  const auto row = static_cast<std::int64_t>(blockIdx.y);
  logits += row * stride;
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
  powers = block_total(powers, doubles);
  count64 allowed = best;
  const device_sampling& params = all_params[row];
  if (params.num_banned > 0) {
    float* copy = all_allowed + row * num_tokens;
    for (std::int32_t t = first + threadIdx.x; t < last; t += kThreads) {
      copy[t] = logits[t];
    }
    __syncthreads();
    for (std::int32_t i = threadIdx.x; i < params.num_banned; i += kThreads) {
      const std::int32_t token = banned[params.first_banned + i];
      if (token >= first && token < last) {
        copy[token] = -INFINITY;
      }
    }
    __syncthreads();
    allowed = best_after(copy, first, last, true, 0, memory);
    if (logit_of(copy, allowed) == -INFINITY) {
      allowed = kNobody; // its own logit may be above that
    }
  }
  if (threadIdx.x == 0) {
    out[row * kSurveys + part] = {best, allowed, powers};
  }
}

/// Takes the best token where none has been drawn (draw.cu), and finds out log-probabilities.
__global__ void __launch_bounds__(kThreads)
  report(const float* logits, std::int64_t stride, std::int32_t num_tokens,
         const device_sampling* all_params, const logit_survey* surveys, sampled_token* out) {
  __shared__ count64 memory[kThreads / 32];
  follow();
  const device_sampling params = all_params[blockIdx.x];
  logits += blockIdx.x * stride;
  surveys += std::int64_t{blockIdx.x} * kSurveys;
  const row_survey row = survey_of(surveys);
  const float largest = logit_of(logits, row.best);
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
  sampled_token& result = out[blockIdx.x];
  const auto logprob = [&](float logit) {
    return static_cast<float>(static_cast<double>(logit) - largest - log_sum);
  };
  if (threadIdx.x == 0) {
    std::int32_t token = params.target;
    // A ban leaves what is left as it was.
    const float best = logit_of(logits, row.allowed);
    if (is_drawn(params, best)) {
      token = result.token;
    } else if (token < 0) {
      token = best == -INFINITY ? -1 : static_cast<std::int32_t>(row.allowed);
    }
    result.token = token;
    result.logprob = token >= 0 ? logprob(logits[token]) : -INFINITY;
  }
  const std::int32_t count = min(max(params.num_logprobs, 0), min(kMaxLogprobs, num_tokens));
  count64 rank = 0;
  std::int32_t found = 0;
  for (; found < count; ++found) {
    rank = best_after(logits, 0, num_tokens, found == 0, rank, memory);
    if (rank == kNobody) {
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

void launch_sample(cudaStream_t stream, const logit_rows& rows, const device_sampling* params,
                   bool any_drawn, const std::int32_t* banned, logit_survey* surveys,
                   float* allowed, sampled_token* out) {
  launch(stream, dim3(kSurveys, rows.num_rows), kThreads, 0, survey, rows.data, rows.stride,
         rows.num_tokens, params, banned, allowed, surveys);
  if (any_drawn) {
    launch_draw(stream, rows, params, surveys, allowed, out);
  }
  launch(stream, rows.num_rows, kThreads, 0, report, rows.data, rows.stride, rows.num_tokens,
         params, surveys, out);
}

} // namespace troupe::kernels::cuda
