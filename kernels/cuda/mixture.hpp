#pragma once

#include "troupe/kernels/cuda/kernels.hpp"

/// A mixture of experts whose choice stays on the device (mixture.cu).
namespace troupe::kernels::cuda {

/// Where a packed weight of one expert is; its shape is that of all experts.
struct expert_part {
  const void* data = nullptr;
  const float* scales = nullptr;
  const std::uint8_t* zeros = nullptr;
};

struct expert_parts {
  expert_part gate, up, down;
};

/// Most rows and experts that launch_plan_mixture takes.
inline constexpr std::int32_t kMixedRows = 64;
inline constexpr std::int32_t kMixedExperts = 1024;

/// Rows of one expert that are multiplied at once. Few rows take the least work; of more, a weight
/// is read as seldom as the kernels for few rows can.
inline constexpr std::int32_t kSmallTile = 8;
inline constexpr std::int32_t kLargeTile = 32;

/// The routed rows of a mixture are its tasks, num_rows * top_k of them by expert and then by row.
/// With a shared expert, all rows of it are tasks behind the others. The neighbouring tasks of an
/// expert are one small tile, or large ones, if they are more than kSmallTile. A tile is a job of
/// each product.
struct mixture_plan {
  const std::int32_t* chosen = nullptr; ///< [num_rows, top_k], ascending within a row
  std::int32_t num_rows = 0;
  std::int32_t top_k = 0;
  std::int32_t num_experts = 0;
  std::int32_t most_small = 0; ///< tiles there may be, see most_small_tiles
  std::int32_t most_large = 0;
  bool gated = false; ///< gate and up are one job (linear_args::gated)
  const expert_parts* experts = nullptr;
  expert_parts shared; ///< no data: none
  const bf16* x = nullptr;
  bf16* gate = nullptr; ///< [tasks, middle_stride]; later the rows that `down` multiplies
  bf16* up = nullptr;
  std::int64_t middle_stride = 0;
  bf16* out = nullptr; ///< [num_rows * top_k, out_stride], of `down`
  bf16* shared_out = nullptr;
  std::int64_t out_stride = 0;
  // What comes of it.
  std::int32_t* task_rows = nullptr;   ///< of x, by task
  std::int32_t* expert_rows = nullptr; ///< [num_rows, top_k] the task of each choice
  linear_job* jobs = nullptr;          ///< see below
  std::int32_t* num_used = nullptr;    ///< [4] how many jobs there are in each list

  // Four lists, each with room for as many jobs as there may be. Of gate and up, one behind the
  // other for each tile, or together.
  constexpr linear_job* small_gates() const { return jobs; }
  constexpr linear_job* large_gates() const { return small_gates() + 2 * most_small; }
  constexpr linear_job* small_downs() const { return large_gates() + 2 * most_large; }
  constexpr linear_job* large_downs() const { return small_downs() + most_small; }
};

/// How many tiles there can be: each row chooses top_k different experts, and a large tile stands
/// for more than kSmallTile tasks. With the shared expert.
constexpr std::int32_t most_small_tiles(std::int32_t num_tasks, std::int32_t num_experts) {
  return (num_tasks < num_experts ? num_tasks : num_experts) + 1;
}

constexpr std::int32_t most_large_tiles(std::int32_t num_tasks, std::int32_t num_rows) {
  return num_tasks / (kSmallTile + 1) + (num_rows + kLargeTile - 1) / kLargeTile;
}
static_assert(kLargeTile > 2 * kSmallTile); // two large tiles stand for more than 2 * kSmallTile

/// What the plan begins with.
struct mixture_router {
  rows_of_bf16 x;
  weight_matrix w;
  const float* bias = nullptr;
  router_params params;
  float* logits = nullptr;          ///< [num_rows, num_experts]
  std::int32_t* chosen = nullptr;   ///< [num_rows, top_k], of the plan
  float* weights = nullptr;         ///< [num_rows, top_k]
  std::int32_t* counters = nullptr; ///< [kMixedRows + 1] zeros, before and after
};

/// From rows to their plan.
void launch_plan_mixture(cudaStream_t stream, const mixture_router& router,
                         const mixture_plan& plan);

} // namespace troupe::kernels::cuda
