#pragma once

#include <string>

#include "troupe/kernels/cuda/cuda_ops.hpp"

namespace gpu_bench {

/// Decoding and prefill of the first layers of DeepSeek-R1 (one dense, two of experts) and its
/// head, through the stage that a worker runs. Weights are random.
void bench_steps(troupe::kernels::cuda::gpu_ops& ops);

} // namespace gpu_bench
