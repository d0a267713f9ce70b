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

/// The routed rows of a mixture are its tasks, num_rows * top_k of them by expert and then by row.
/// Tiles of at most tile_rows neighbouring tasks of one expert are one job of each product; jobs
/// beyond the last tile have no rows. A job of `gate` is also one of gate and up together
/// (linear_args::gated). With a shared expert, the first job is all rows of it, its
/// tasks behind the others.
struct mixture_plan {
  const std::int32_t* chosen = nullptr; ///< [num_rows, top_k], ascending within a row
  std::int32_t num_rows = 0;
  std::int32_t top_k = 0;
  std::int32_t num_experts = 0;
  std::int32_t tile_rows = 0;
  std::int32_t num_jobs = 0; ///< of each product, see most_tiles
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
  linear_job* jobs = nullptr;          ///< [3, num_jobs]: gate, up, down
};

/// How many tiles there can be: each row chooses top_k different experts.
constexpr std::int32_t most_tiles(std::int32_t num_rows, std::int32_t top_k,
                                  std::int32_t num_experts, std::int32_t tile_rows) {
  const std::int32_t tasks = num_rows * top_k;
  const std::int32_t used = tasks < num_experts ? tasks : num_experts;
  // An expert of n rows has at most (n + tile_rows - 1) / tile_rows tiles.
  const std::int32_t tiles = (tasks + (tile_rows - 1) * used) / tile_rows;
  return tiles < tasks ? tiles : tasks;
}

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
