#pragma once

#include <span>

#include "troupe/kernels/cuda/cuda_ops.hpp"

namespace gpu_bench {

/// Decoding and prefill of the first layers of DeepSeek-R1 (one dense, two of experts) and its
/// head, through the stage that a worker runs, on one GPU or on several ranks that compute
/// together. Weights are random.
void bench_steps(std::span<troupe::kernels::cuda::gpu_ops* const> ranks);

/// The same on all GPUs, as far as they are a power of two.
void bench_steps_of_ranks();

} // namespace gpu_bench
