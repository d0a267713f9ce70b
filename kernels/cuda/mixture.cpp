#include "troupe/kernels/cuda/backend.hpp"

#include <algorithm>
#include <cstddef>

#include "troupe/kernels/cuda/mixture.hpp"
#include "troupe/kernels/cuda/trace.hpp"

/// The mixture of experts of cuda_ops. The host knows how many tasks there are, and how many tiles
/// of them there can be, but not which experts they belong to: the lists of jobs and their lengths
/// stay on the device.
namespace troupe::kernels::cuda {

namespace {

expert_part part_of(const packed_matrix& w) {
  return {w.data, w.scales, w.zeros};
}

/// Pieces of one block of memory, one behind the other.
class divided {
public:
  explicit divided(std::byte* memory) : memory_(memory) {}

  template <class T>
  T* take(std::size_t count) {
    auto* piece = reinterpret_cast<T*>(memory_ + used_);
    used_ += (count * sizeof(T) + 15) / 16 * 16;
    return piece;
  }

private:
  std::byte* memory_;
  std::size_t used_ = 0;
};

/// What a mixture of up to kMixedRows rows needs beside its rows.
struct mixture_lists {
  std::int32_t* chosen;
  float* weights;
  std::int32_t* expert_rows;
  std::int32_t* task_rows;
  linear_job* jobs;
  std::int32_t* num_used;
};

std::size_t most_jobs(std::int32_t top_k, std::int32_t num_experts) {
  const auto tasks = kMixedRows * top_k;
  return 3
         * static_cast<std::size_t>(most_small_tiles(tasks, num_experts)
                                    + most_large_tiles(tasks, kMixedRows));
}

std::size_t bytes_of_lists(std::int32_t top_k, std::int32_t num_experts) {
  const auto tasks = static_cast<std::size_t>(kMixedRows) * top_k;
  return (4 * tasks + kMixedRows + 4) * 4 + most_jobs(top_k, num_experts) * sizeof(linear_job)
         + 6 * 16;
}

mixture_lists divide(std::byte* memory, std::int32_t top_k, std::int32_t num_experts) {
  const auto tasks = static_cast<std::size_t>(kMixedRows) * top_k;
  divided pieces(memory);
  mixture_lists lists{};
  lists.jobs = pieces.take<linear_job>(most_jobs(top_k, num_experts));
  lists.chosen = pieces.take<std::int32_t>(tasks);
  lists.weights = pieces.take<float>(tasks);
  lists.expert_rows = pieces.take<std::int32_t>(tasks);
  lists.task_rows = pieces.take<std::int32_t>(tasks + kMixedRows);
  lists.num_used = pieces.take<std::int32_t>(4);
  return lists;
}

} // namespace

/// Where the experts of a layer are, in device memory: made when they are met for the first time.
/// Null where they are not of one shape.
const cuda_ops::expert_table* cuda_ops::find_experts(std::span<const expert_weights> experts) {
  const auto is_of = [&](const expert_table& table) {
    return std::equal(table.experts.begin(), table.experts.end(), experts.begin(), experts.end(),
                      [](const auto& known, const auto& one) {
                        return known[0] == one.gate.packed && known[1] == one.up.packed
                               && known[2] == one.down.packed;
                      });
  };
  const auto known = std::find_if(expert_tables_.begin(), expert_tables_.end(),
                                  [&](const auto& table) { return is_of(*table); });
  if (known != expert_tables_.end()) {
    return (*known)->memory == nullptr ? nullptr : known->get();
  }
  if (gpu_.is_recording()) {
    gpu_.spoil_recording("experts are met for the first time");
    return nullptr;
  }
  auto table = std::make_unique<expert_table>();
  for (const auto& one : experts) {
    table->experts.push_back({one.gate.packed, one.up.packed, one.down.packed});
  }
  const bool is_whole =
    is_exact() ? make_exact_table(experts, *table) : make_table(experts, *table);
  if (!is_whole) {
    return nullptr;
  }
  expert_tables_.push_back(std::move(table));
  return expert_tables_.back()->memory == nullptr ? nullptr : expert_tables_.back().get();
}

void cuda_ops::know_experts(std::span<const expert_weights> experts) {
  if (begin(1))
    find_experts(experts);
}

/// False without memory for it.
bool cuda_ops::make_table(std::span<const expert_weights> experts, expert_table& table) {
  table.gate = packed(experts.front().gate);
  table.down = packed(experts.front().down);
  std::vector<expert_parts> parts;
  bool of_one_shape = true;
  for (const auto& one : experts) {
    const auto& gate = packed(one.gate);
    const auto& up = packed(one.up);
    const auto& down = packed(one.down);
    of_one_shape = of_one_shape && same_shape(gate, table.gate) && same_shape(up, table.gate)
                   && same_shape(down, table.down);
    parts.push_back({part_of(gate), part_of(up), part_of(down)});
  }
  return !of_one_shape || upload_table(parts.data(), parts.size() * sizeof(expert_parts), table);
}

bool cuda_ops::upload_table(const void* parts, std::size_t bytes, expert_table& table) {
  table.memory = pool_.take(bytes);
  if (table.memory == nullptr) {
    return false;
  }
  ring_.put_into(table.memory.get(), parts, bytes);
  return true;
}

bool cuda_ops::mixture(const rows_view& x, const mixture_weights& w, const router_params& params,
                       const mixture_scratch& scratch, const rows_view& out) {
  const auto num_rows = x.num_rows;
  const auto num_experts = static_cast<std::int32_t>(w.experts.size());
  const auto top_k = params.top_k;
  if (num_rows > kMixedRows || num_experts > kMixedExperts || num_experts != params.num_experts
      || !begin(num_rows)) {
    return false;
  }
  const trace range("experts");
  if (is_exact()) {
    return mix_exactly(x, w, params, scratch, out);
  }
  const auto* table = find_experts(w.experts);
  if (table == nullptr) {
    return false;
  }
  const auto num_tasks = num_rows * top_k;
  const auto shares_tiles = [&] {
    const auto& shared = *w.shared;
    return same_shape(packed(shared.gate), table->gate)
           && same_shape(packed(shared.up), table->gate)
           && same_shape(packed(shared.down), table->down)
           && scratch.shared_out.stride == scratch.expert_out.stride;
  };
  const bool joins = w.shared != nullptr && shares_tiles();
  if (w.shared != nullptr && !joins) {
    mlp(x, *w.shared, scratch.gate, scratch.up, scratch.shared_out);
  }

  // Taken for the most rows there may be, so that memory moves at most once.
  const auto inner = table->gate.num_rows;
  const auto width = ceil_div(inner, kBlockCols) * kBlockCols;
  const auto most_tasks = static_cast<std::size_t>(kMixedRows) * (top_k + 1);
  auto* memory = mixture_lists_.take<std::byte>(bytes_of_lists(top_k, num_experts));
  auto* logits = router_logits_.take<float>(static_cast<std::size_t>(kMixedRows) * num_experts);
  auto* gate = mixed_gates_.take<bf16>(most_tasks * width);
  auto* up = mixed_ups_.take<bf16>(most_tasks * width);
  const auto input = make_readable(x, 1, x.num_cols, table->gate);
  if (!gpu_.ok()) {
    return false;
  }
  const auto lists = divide(memory, top_k, num_experts);

  mixture_plan plan;
  plan.chosen = lists.chosen;
  plan.num_rows = num_rows;
  plan.top_k = top_k;
  plan.num_experts = num_experts;
  plan.most_small = most_small_tiles(num_tasks, num_experts);
  plan.most_large = num_rows > kSmallTile ? most_large_tiles(num_tasks, num_rows) : 0;
  plan.gated = num_rows <= kGatedRows;
  plan.experts = static_cast<const expert_parts*>(table->memory.get());
  plan.x = input.data;
  plan.gate = gate;
  plan.up = up;
  plan.middle_stride = width;
  plan.out = static_cast<bf16*>(scratch.expert_out.data);
  plan.out_stride = scratch.expert_out.stride;
  if (joins) {
    plan.shared = {part_of(packed(w.shared->gate)), part_of(packed(w.shared->up)),
                   part_of(packed(w.shared->down))};
    plan.shared_out = static_cast<bf16*>(scratch.shared_out.data);
  }
  plan.task_rows = lists.task_rows;
  plan.expert_rows = lists.expert_rows;
  plan.jobs = lists.jobs;
  plan.num_used = lists.num_used;
  mixture_router router;
  router.x = as_bf16(x);
  router.w = w.router;
  router.bias = w.bias;
  router.params = params;
  router.logits = logits;
  router.chosen = lists.chosen;
  router.weights = lists.weights;
  router.counters = static_cast<std::int32_t*>(counters_.get());
  launch_plan_mixture(stream_, router, plan);
  launched("plan of a mixture");

  const auto all_tasks = num_tasks + (joins ? num_rows : 0);
  if (width != inner) {
    // Products read whole blocks of columns, and nothing may come of what was there before.
    gpu_.check(cudaMemsetAsync(gate, 0, static_cast<std::size_t>(all_tasks) * width * 2, stream_),
               "clearing of rows");
  }
  // Small tiles and large ones, in this order.
  const auto multiply_tiles = [&](linear_args args, const linear_job* small,
                                  const linear_job* large, std::int32_t jobs_of_tile,
                                  const std::int32_t* num_used) {
    args.job_cols = args.w.num_rows;
    args.jobs = small;
    args.num_jobs = jobs_of_tile * plan.most_small;
    args.num_used = num_used;
    args.max_rows = std::min(num_rows, kSmallTile);
    multiply(args);
    if (plan.most_large > 0) {
      args.jobs = large;
      args.num_jobs = jobs_of_tile * plan.most_large;
      args.num_used = num_used + 1;
      args.max_rows = std::min(num_rows, kLargeTile);
      multiply(args);
    }
  };
  linear_args args;
  args.w = table->gate;
  args.gated = plan.gated;
  args.x_stride = input.stride;
  args.out_stride = width;
  multiply_tiles(args, plan.small_gates(), plan.large_gates(), plan.gated ? 1 : 2, plan.num_used);
  if (!plan.gated) {
    const rows_of_bf16 middle{gate, all_tasks, inner, width};
    launch_swiglu(stream_, middle, {up, all_tasks, inner, width}, middle);
    launched("swiglu of experts");
  }
  args.w = table->down;
  args.gated = false;
  args.x_stride = width;
  args.out_stride = plan.out_stride;
  multiply_tiles(args, plan.small_downs(), plan.large_downs(), 1, plan.num_used + 2);
  const rows_view shared = w.shared != nullptr ? scratch.shared_out : rows_view{};
  launch_combine(stream_, as_bf16(scratch.expert_out), lists.expert_rows, lists.weights, top_k,
                 as_bf16(shared), as_bf16(out));
  launched("mixture");
  return true;
}

} // namespace troupe::kernels::cuda
