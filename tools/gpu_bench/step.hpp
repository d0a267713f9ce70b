#pragma once

#include <cstdint>

#include "troupe/kernels/ops.hpp"
#include "troupe/model/model_config.hpp"

namespace gpu_bench {

/// config.json of a model of the first layers of DeepSeek-R1, one dense and two of experts.
extern const char* const kLayersOfR1;

/// Decoding and prefill of the first layers of DeepSeek-R1 (one dense, two of experts) and its
/// head, through the stage that a worker runs, on one GPU or on several ranks that compute
/// together. Weights are random.
void bench_steps(std::int32_t num_ranks, troupe::model::head_format head,
                 troupe::kernels::numerics mode = troupe::kernels::numerics::fast);

/// The same on one GPU, on two and on as many as there are powers of two.
void bench_steps_of_ranks();

/// Loads the same layers as made-up weights, twice: as who makes them and as who finds them made.
/// How long that takes, and what becomes of the memory while the stage computes.
void bench_load(troupe::model::head_format head);

} // namespace gpu_bench
