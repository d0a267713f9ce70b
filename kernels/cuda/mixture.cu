#include "troupe/kernels/cuda/mixture.hpp"

#include "troupe/kernels/cuda/bulk_copy.cuh"
#include "troupe/kernels/cuda/router.cuh"

namespace troupe::kernels::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__device__ void write_job(linear_job& to, const expert_part& w, const expert_part& second,
                          const bf16* x, const std::int32_t* rows, bf16* out,
                          std::int32_t num_rows) {
  linear_job job;
  job.data = w.data;
  job.scales = w.scales;
  job.zeros = w.zeros;
  job.x = x;
  job.rows = rows;
  job.out = out;
  job.num_rows = num_rows;
  job.second_data = second.data;
  job.second_scales = second.scales;
  job.second_zeros = second.zeros;
  to = job;
}

/// The jobs of a tile, the `index`th of its size: `first` is its first task.
__device__ void write_tile(const mixture_plan& plan, bool is_large, std::int32_t index,
                           const expert_parts& parts, std::int64_t first, std::int32_t num_rows,
                           bf16* out) {
  const std::int32_t* rows = plan.task_rows + first;
  bf16* gate = plan.gate + first * plan.middle_stride;
  bf16* up = plan.up + first * plan.middle_stride;
  linear_job* gates = is_large ? plan.large_gates() : plan.small_gates();
  linear_job* downs = is_large ? plan.large_downs() : plan.small_downs();
  if (plan.gated) {
    write_job(gates[index], parts.gate, parts.up, plan.x, rows, gate, num_rows);
  } else {
    write_job(gates[2 * index], parts.gate, {}, plan.x, rows, gate, num_rows);
    write_job(gates[2 * index + 1], parts.up, {}, plan.x, rows, up, num_rows);
  }
  write_job(downs[index], parts.down, {}, gate, nullptr, out, num_rows);
}

__device__ std::int32_t num_large_tiles(std::int32_t num_rows) {
  return num_rows <= kSmallTile ? 0 : (num_rows + kLargeTile - 1) / kLargeTile;
}

/// Tiles of both sizes, counted at once.
constexpr std::int32_t kLargeUnit = 1 << 16;

__device__ std::int32_t count_tiles(std::int32_t num_rows) {
  const std::int32_t large = num_large_tiles(num_rows);
  return large > 0 ? large * kLargeUnit : num_rows > 0 ? 1 : 0;
}

/// All tiles of an expert; `before` says how many others come first.
__device__ void write_tiles(const mixture_plan& plan, std::int32_t before,
                            const expert_parts& parts, std::int64_t first, std::int32_t num_rows,
                            bf16* out) {
  const bool is_large = num_rows > kSmallTile;
  const std::int32_t tile_rows = is_large ? kLargeTile : kSmallTile;
  std::int32_t index = is_large ? before / kLargeUnit : before % kLargeUnit;
  for (std::int32_t done = 0; done < num_rows; done += tile_rows) {
    write_tile(plan, is_large, index++, parts, first + done, min(tile_rows, num_rows - done),
               out + done * plan.out_stride);
  }
}

/// A counting sort in one block. The rows of an expert are the bits of a mask, so a task's place
/// follows from the masks alone, whatever the order in which threads come. The choice may have been
/// written by other blocks.
__device__ void plan_tiles(const mixture_plan& plan) {
  __shared__ unsigned long long rows_of[kMixedExperts];
  __shared__ std::int32_t first_task[kMixedExperts];
  __shared__ std::int32_t tasks_of_warp[kWarps];
  __shared__ std::int32_t tiles_of_warp[kWarps];
  const auto thread = static_cast<std::int32_t>(threadIdx.x);
  const std::int32_t lane = thread % 32;
  const std::int32_t warp = thread / 32;
  const std::int32_t num_tasks = plan.num_rows * plan.top_k;

  for (std::int32_t e = thread; e < plan.num_experts; e += kThreads) {
    rows_of[e] = 0;
  }
  __syncthreads();
  for (std::int32_t i = thread; i < num_tasks; i += kThreads) {
    atomicOr(&rows_of[__ldcg(plan.chosen + i)], 1ULL << (i / plan.top_k));
  }
  __syncthreads();

  // A thread has neighbouring experts, so that tasks and tiles can be counted along threads.
  const std::int32_t each = (plan.num_experts + kThreads - 1) / kThreads;
  const std::int32_t begin = min(thread * each, plan.num_experts);
  const std::int32_t end = min(begin + each, plan.num_experts);
  std::int32_t tasks = 0;
  std::int32_t tiles = 0;
  for (std::int32_t e = begin; e < end; ++e) {
    const std::int32_t count = __popcll(rows_of[e]);
    tasks += count;
    tiles += count_tiles(count);
  }
  std::int32_t tasks_up_to = tasks;
  std::int32_t tiles_up_to = tiles;
  for (int step = 1; step < 32; step *= 2) {
    const std::int32_t more_tasks = __shfl_up_sync(kAllLanes, tasks_up_to, step);
    const std::int32_t more_tiles = __shfl_up_sync(kAllLanes, tiles_up_to, step);
    if (lane >= step) {
      tasks_up_to += more_tasks;
      tiles_up_to += more_tiles;
    }
  }
  if (lane == 31) {
    tasks_of_warp[warp] = tasks_up_to;
    tiles_of_warp[warp] = tiles_up_to;
  }
  __syncthreads();
  const bool has_shared = plan.shared.gate.data != nullptr;
  const std::int32_t shared_tiles = has_shared ? count_tiles(plan.num_rows) : 0;
  std::int32_t task = tasks_up_to - tasks;
  std::int32_t before = shared_tiles + tiles_up_to - tiles;
  std::int32_t num_tiles = shared_tiles;
  for (std::int32_t other = 0; other < kWarps; ++other) {
    task += other < warp ? tasks_of_warp[other] : 0;
    before += other < warp ? tiles_of_warp[other] : 0;
    num_tiles += tiles_of_warp[other];
  }

  for (std::int32_t e = begin; e < end; ++e) {
    const std::int32_t count = __popcll(rows_of[e]);
    first_task[e] = task;
    if (count > 0) {
      write_tiles(plan, before, plan.experts[e], task, count, plan.out + task * plan.out_stride);
    }
    task += count;
    before += count_tiles(count);
  }
  if (has_shared) {
    if (thread == 0) {
      write_tiles(plan, 0, plan.shared, num_tasks, plan.num_rows, plan.shared_out);
    }
    for (std::int32_t row = thread; row < plan.num_rows; row += kThreads) {
      plan.task_rows[num_tasks + row] = row;
    }
  }
  if (thread == 0) {
    const std::int32_t each_gate = plan.gated ? 1 : 2;
    plan.num_used[0] = num_tiles % kLargeUnit * each_gate;
    plan.num_used[1] = num_tiles / kLargeUnit * each_gate;
    plan.num_used[2] = num_tiles % kLargeUnit;
    plan.num_used[3] = num_tiles / kLargeUnit;
  }
  __syncthreads();
  for (std::int32_t i = thread; i < num_tasks; i += kThreads) {
    const std::int32_t expert = __ldcg(plan.chosen + i);
    const std::int32_t row = i / plan.top_k;
    const unsigned long long before = rows_of[expert] & ((1ULL << row) - 1);
    const std::int32_t at = first_task[expert] + __popcll(before);
    plan.task_rows[at] = row;
    plan.expert_rows[i] = at;
  }
}

/// Whether this block is the last of `count` to come here, which then sees what the others wrote
/// (CUDA programming guide, "Memory Fence Functions"). The counter is zero again behind the last.
__device__ bool is_last(std::int32_t* counter, std::int32_t count) {
  __shared__ bool last;
  __syncthreads(); // what the threads wrote comes before the count
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(counter, 1) + 1 == count;
    if (last) {
      atomicExch(counter, 0);
    }
    __threadfence();
  }
  __syncthreads();
  return last;
}

/// One warp an expert and row; the last block of a row chooses for it, the last of all plans.
__global__ void __launch_bounds__(kThreads)
  plan_mixture(const mixture_router router, const bool is_float, const bool is_aligned,
               const mixture_plan plan) {
  extern __shared__ float memory[];
  const std::int64_t row = blockIdx.y;
  const std::int32_t num_experts = plan.num_experts;
  const auto expert = static_cast<std::int32_t>(blockIdx.x * kWarps + threadIdx.x / 32);
  if (row == 0 && expert < num_experts && threadIdx.x % 32 == 0 && is_aligned && !is_float) {
    const std::int64_t bytes = std::int64_t{router.x.num_cols} * 2;
    prefetch_bulk(static_cast<const char*>(router.w.data) + expert * bytes,
                  static_cast<std::uint32_t>(bytes));
  }
  follow();
  float* logits = router.logits + row * num_experts;
  if (expert < num_experts) {
    const bf16* const from[] = {router.x.data + row * router.x.stride};
    float logit[1];
    router_logits<1>(from, router.x.num_cols, router.w.data, is_float, is_aligned, expert, logit);
    if (threadIdx.x % 32 == 0) {
      logits[expert] = logit[0];
    }
  }
  if (!is_last(router.counters + 1 + row, static_cast<std::int32_t>(gridDim.x))) {
    return;
  }
  if (threadIdx.x < 32) {
    choose_of_row(logits, router.bias, router.params, memory, router.chosen + row * plan.top_k,
                  router.weights + row * plan.top_k);
  }
  if (gridDim.y == 1 || is_last(router.counters, static_cast<std::int32_t>(gridDim.y))) {
    plan_tiles(plan);
  }
}

} // namespace

void launch_plan_mixture(cudaStream_t stream, const mixture_router& router,
                         const mixture_plan& plan) {
  const auto& x = router.x;
  const dim3 grid(ceil_div(plan.num_experts, kWarps), plan.num_rows);
  const auto bytes = static_cast<std::size_t>(floats_of_choice(router.params)) * sizeof(float);
  launch(stream, grid, kThreads, bytes, plan_mixture, router, router.w.type == element_type::f32,
         rows_are_aligned(x, router.w.data), plan);
}

} // namespace troupe::kernels::cuda
