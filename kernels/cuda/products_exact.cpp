#include "troupe/kernels/cuda/backend.hpp"

#include <algorithm>
#include <cassert>

#include "troupe/kernels/cuda/mixture.hpp"
#include "troupe/kernels/narrow_weight.hpp"

/// Weights and products of cuda_ops with exact numerics.
namespace troupe::kernels::cuda {

namespace {

bool same_shape(const exact_weight& a, const exact_weight& b) {
  return same_kind(a, b) && a.num_rows == b.num_rows && a.num_cols == b.num_cols;
}

} // namespace

/// Keeps a weight as it is stored, or narrowed.
weight_matrix cuda_ops::place_exact(const weight_matrix& weight, const weight_matrix& on_device,
                                    weight_use use, std::unique_ptr<placed_weight> placed) {
  weight_matrix result = weight;
  result.packed = nullptr;
  result.recipe = nullptr;
  auto shape = on_device;
  const bool narrows = is_narrowed(weight, use);
  if (narrows) {
    shape = narrowed_shape(weight);
    const auto num_groups = ceil_div(weight.num_cols, kNarrowGroup);
    placed->scales =
      take_weight(static_cast<std::size_t>(weight.num_rows) * num_groups * sizeof(float));
    shape.scales = static_cast<const float*>(placed->scales.get());
  }
  auto* note = next_note();
  if (note == nullptr) {
    return result;
  }
  if (weights_are_there_ && known_note(note) <= static_cast<std::int32_t>(element_type::i4)) {
    shape.type = static_cast<element_type>(known_note(note));
  }
  auto& w = placed->exact;
  w.scales = shape.scales;
  w.zeros = shape.zeros;
  w.stride = exact_stride(shape.type, shape.num_cols);
  w.num_rows = shape.num_rows;
  w.num_cols = shape.num_cols;
  w.block_rows = std::max(shape.block_rows, 1);
  w.block_cols = std::max(shape.block_cols, 1);
  w.num_scale_cols = ceil_div(w.num_cols, w.block_cols);
  w.block_shift = exact_block_shift(w.num_cols, w.block_cols);
  w.type = shape.type;
  placed->data = take_weight(static_cast<std::size_t>(w.num_rows * w.stride));
  if (placed->data == nullptr) {
    return result;
  }
  w.data = placed->data.get();
  if (!weights_are_there_) {
    stage(weight, on_device, [&](weight_matrix rows, std::int32_t first) {
      auto* to = static_cast<std::byte*>(placed->data.get()) + first * w.stride;
      if (narrows) {
        auto* scales = static_cast<float*>(placed->scales.get())
                       + std::int64_t{first} * ceil_div(weight.num_cols, kNarrowGroup);
        launch_find_scales(stream_, rows, scales);
        rows.scales = scales;
        launch_narrow(stream_, rows, w.stride, reinterpret_cast<std::int8_t*>(to));
        launched("narrowing of a weight");
      } else {
        const auto width = row_bytes(weight.type, weight.num_cols);
        gpu_.check(cudaMemcpy2DAsync(to, static_cast<std::size_t>(w.stride), rows.data, width,
                                     width, rows.num_rows, cudaMemcpyDeviceToDevice, stream_),
                   "copy of a weight");
      }
    });
    gpu_.check(cudaMemsetAsync(note, 0, sizeof(*note), stream_), "a note");
    gpu_.check(cudaMemsetAsync(note, static_cast<int>(w.type), 1, stream_), "a note");
    synchronise(); // the caller may drop its elements
  }
  result.type = w.type;
  result.data = w.data;
  result.scales = w.scales;
  result.zeros = w.zeros;
  result.block_rows = w.block_rows;
  result.block_cols = w.block_cols;
  result.packed = &w;
  weights_.push_back(std::move(placed));
  return result;
}

const exact_weight& cuda_ops::exact(const weight_matrix& w) const {
  assert(w.packed != nullptr); // not placed for products
  return *static_cast<const exact_weight*>(w.packed);
}

/// num_jobs products of neighbouring columns of x with neighbouring rows of w.
void cuda_ops::multiply_exact(const rows_view& x, std::int32_t x_step, const weight_matrix& w,
                              std::int32_t num_jobs, const rows_view& out, std::int32_t out_step) {
  exact_args args;
  args.job.w = exact(w);
  assert(num_jobs == 1 || args.job.w.scales == nullptr);
  assert(args.job.w.num_rows % num_jobs == 0);
  args.job.x = static_cast<const float*>(x.data);
  args.job.out = static_cast<float*>(out.data);
  args.job.num_rows = args.max_rows = x.num_rows;
  args.num_jobs = num_jobs;
  args.max_cols = args.row_step = args.job.w.num_rows / num_jobs;
  args.x_stride = x.stride;
  args.x_step = num_jobs > 1 ? x_step : 0;
  args.out_stride = out.stride;
  args.out_step = out_step;
  launch_linear_exact(stream_, args);
  launched("linear");
}

void cuda_ops::queue_exact_runs(std::span<const expert_weights> experts,
                                weight_matrix expert_weights::*part, const rows_view& x,
                                const std::int32_t* task_rows, const rows_view& out) {
  for (const auto& run : runs_) {
    const std::int64_t first = run.first_task;
    exact_job job;
    job.w = exact(experts[run.expert].*part);
    job.x = static_cast<const float*>(x.data);
    job.out = static_cast<float*>(out.data) + first * out.stride;
    job.num_rows = run.num_tasks;
    if (task_rows != nullptr) {
      job.rows = task_rows + first;
    } else {
      job.x += first * x.stride;
    }
    exact_queue_.push_back(job);
  }
}

/// Runs of weights of one kind go together, few rows apart from many.
void cuda_ops::multiply_exact_runs(exact_args args) {
  const auto go_together = [](const exact_job& a, const exact_job& b) {
    return same_kind(a.w, b.w) && (a.num_rows <= kFewExactRows) == (b.num_rows <= kFewExactRows);
  };
  while (!exact_queue_.empty()) {
    const auto kind = exact_queue_.back();
    const auto rest = std::partition(exact_queue_.begin(), exact_queue_.end(),
                                     [&](const auto& one) { return !go_together(one, kind); });
    args.job = kind;
    args.num_jobs = static_cast<std::int32_t>(exact_queue_.end() - rest);
    args.max_rows = 0;
    args.max_cols = 0;
    for (auto one = rest; one != exact_queue_.end(); ++one) {
      args.max_rows = std::max(args.max_rows, one->num_rows);
      args.max_cols = std::max(args.max_cols, one->w.num_rows);
    }
    args.jobs = ring_.put(std::span<const exact_job>(rest, exact_queue_.end()));
    if (gpu_.ok()) {
      launch_linear_exact(stream_, args);
      launched("products of experts");
    }
    exact_queue_.erase(rest, exact_queue_.end());
  }
}

void cuda_ops::compute_experts_exactly(const rows_view& x, std::span<const expert_task> tasks,
                                       std::span<const expert_weights> experts,
                                       const rows_view& out) {
  const auto num_tasks = static_cast<std::int32_t>(tasks.size());
  task_rows_.clear();
  std::int32_t widest = 0;
  for (const auto& task : tasks) {
    task_rows_.push_back(task.row);
    widest = std::max(widest, experts[task.expert].gate.num_rows);
  }
  find_runs(tasks);
  const auto* rows = ring_.put(std::span<const std::int32_t>(task_rows_));
  const auto stride = ceil_div(widest, kExactPiece) * kExactPiece;
  const auto size = static_cast<std::size_t>(num_tasks) * stride;
  const rows_view gate{gates_.take<float>(size), num_tasks, widest, stride};
  const rows_view up{ups_.take<float>(size), num_tasks, widest, stride};
  if (!gpu_.ok()) {
    return;
  }
  exact_args args;
  args.x_stride = x.stride;
  args.out_stride = stride;
  queue_exact_runs(experts, &expert_weights::gate, x, rows, gate);
  queue_exact_runs(experts, &expert_weights::up, x, rows, up);
  multiply_exact_runs(args);
  launch_swiglu(stream_, as_rows<float>(gate), as_rows<float>(up), as_rows<float>(gate));
  launched("swiglu of experts");
  args.x_stride = stride;
  args.out_stride = out.stride;
  queue_exact_runs(experts, &expert_weights::down, gate, nullptr, out);
  multiply_exact_runs(args);
}

/// Three weights of an expert, one behind the other. False without memory for it.
bool cuda_ops::make_exact_table(std::span<const expert_weights> experts, expert_table& table) {
  table.exact_in = exact(experts.front().gate);
  table.exact_down = exact(experts.front().down);
  std::vector<exact_weight> parts;
  bool of_one_shape = true;
  for (const auto& one : experts) {
    const auto& gate = exact(one.gate);
    const auto& up = exact(one.up);
    const auto& down = exact(one.down);
    of_one_shape = of_one_shape && same_shape(gate, table.exact_in)
                   && same_shape(up, table.exact_in) && same_shape(down, table.exact_down);
    parts.insert(parts.end(), {gate, up, down});
  }
  return !of_one_shape || upload_table(parts.data(), parts.size() * sizeof(exact_weight), table);
}

/// Every choice is a product of one row, whichever other rows have chosen the same expert: simple,
/// and the best there is for a single row.
bool cuda_ops::mix_exactly(const rows_view& x, const mixture_weights& w,
                           const router_params& params, const mixture_scratch& scratch,
                           const rows_view& out) {
  const auto* table = find_experts(w.experts);
  if (table == nullptr) {
    return false;
  }
  const auto top_k = params.top_k;
  const auto num_tasks = x.num_rows * top_k;
  const auto inner = table->exact_in.num_rows;
  const auto stride = ceil_div(inner, kExactPiece) * kExactPiece;
  // Taken for the most rows there may be, so that memory moves at most once.
  const auto most_tasks = static_cast<std::size_t>(kMixedRows) * top_k;
  auto* logits =
    router_logits_.take<float>(static_cast<std::size_t>(kMixedRows) * params.num_experts);
  auto* chosen = mixture_lists_.take<std::int32_t>(2 * most_tasks);
  const rows_view gate{mixed_gates_.take<float>(most_tasks * stride), num_tasks, inner, stride};
  const rows_view up{mixed_ups_.take<float>(most_tasks * stride), num_tasks, inner, stride};
  if (!gpu_.ok()) {
    return false;
  }
  auto* weights = reinterpret_cast<float*>(chosen + most_tasks);
  launch_router_logits(stream_, as_rows<float>(x), w.router, logits);
  launch_choose_experts(stream_, logits, x.num_rows, w.bias, params, chosen, weights);
  launched("choice of experts");

  exact_args args;
  args.num_jobs = num_tasks;
  args.max_rows = 1;
  args.chosen = chosen;
  args.expert_step = 3;
  const auto multiply = [&](std::int32_t part, const exact_weight& like, const rows_view& from,
                            std::int32_t jobs_of_row, const rows_view& to) {
    args.job.w = like;
    args.job.x = static_cast<const float*>(from.data);
    args.job.out = static_cast<float*>(to.data);
    args.job.num_rows = 1;
    args.max_cols = like.num_rows;
    args.x_stride = from.stride;
    args.out_stride = to.stride;
    args.experts = static_cast<const exact_weight*>(table->memory.get()) + part;
    args.jobs_of_row = jobs_of_row;
    launch_linear_exact(stream_, args);
  };
  multiply(0, table->exact_in, x, top_k, gate);
  multiply(1, table->exact_in, x, top_k, up);
  launch_swiglu(stream_, as_rows<float>(gate), as_rows<float>(up), as_rows<float>(gate));
  multiply(2, table->exact_down, gate, 1, scratch.expert_out);
  launched("products of experts");
  if (w.shared != nullptr) {
    mlp(x, *w.shared, scratch.gate, scratch.up, scratch.shared_out);
  }
  const rows_view shared = w.shared != nullptr ? scratch.shared_out : rows_view{};
  launch_combine(stream_, as_rows<float>(scratch.expert_out), nullptr, weights, top_k,
                 as_rows<float>(shared), as_rows<float>(out));
  launched("mixture");
  return gpu_.ok();
}

} // namespace troupe::kernels::cuda
