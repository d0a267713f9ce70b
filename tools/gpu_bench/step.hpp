#pragma once

#include <string>

#include "troupe/kernels/cuda/cuda_ops.hpp"

namespace gpu_bench {

/// config.json of a model of the first layers of DeepSeek-R1, one dense and two of experts.
extern const char* const kLayersOfR1;

/// Decoding and prefill of the first layers of DeepSeek-R1 (one dense, two of experts) and its
/// head, through the stage that a worker runs. Weights are random.
void bench_steps(troupe::kernels::cuda::gpu_ops& ops);

/// Loads the same layers as made-up weights, twice: as who makes them and as who finds them made.
/// How long that takes, and what becomes of the memory while the stage computes.
void bench_load();

} // namespace gpu_bench
