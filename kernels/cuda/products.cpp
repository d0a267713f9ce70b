#include "troupe/kernels/cuda/backend.hpp"

#include <algorithm>
#include <cassert>
#include <numeric>

#include "troupe/kernels/cuda/trace.hpp"
#include "troupe/kernels/made_weight.hpp"
#include "troupe/kernels/narrow_weight.hpp"

/// Weights and products of cuda_ops.
namespace troupe::kernels::cuda {

namespace {

/// From so many rows on, packing them for the matrix unit of Hopper pays.
constexpr std::int32_t kWideFrom = 33;

/// Most rows of the kernel whose warps have their weights to themselves.
constexpr std::int32_t kFewRows = 32;

/// Product weights whose notes share a table.
constexpr std::size_t kNotes = 16384;

/// Of a weight, what is brought to the device at once, unless its scales want more rows.
constexpr std::size_t kStagedBytes = std::size_t{64} << 20;

bool is_scaled(const weight_matrix& w) {
  return w.scales != nullptr || (w.recipe != nullptr && w.recipe->block_rows > 0);
}

/// Rows of a weight that are brought to the device at once: whole tiles, and whole blocks of rows
/// that share a scale.
std::int32_t staged_rows(const weight_matrix& w) {
  const bool blocks_matter = is_scaled(w) && w.block_rows < w.num_rows;
  const auto unit = blocks_matter ? std::lcm(kTileRows, w.block_rows) : kTileRows;
  const auto unit_bytes = unit * std::max<std::size_t>(row_bytes(w.type, w.num_cols), 1);
  return static_cast<std::int32_t>(std::max<std::size_t>(kStagedBytes / unit_bytes, 1)) * unit;
}

std::size_t num_scales(const weight_matrix& w) {
  return static_cast<std::size_t>(ceil_div(w.num_rows, w.block_rows))
         * ceil_div(w.num_cols, w.block_cols);
}

packed_type product_type(element_type type) {
  switch (type) {
  case element_type::f8_e4m3: return packed_type::f8;
  case element_type::i8: return packed_type::i8;
  case element_type::i4: return packed_type::i4;
  default: return packed_type::bf16;
  }
}

} // namespace

std::shared_ptr<void> cuda_ops::take_weight(std::size_t bytes) {
  auto memory = weight_pool_.take(bytes);
  if (memory == nullptr) {
    gpu_.check(cudaErrorMemoryAllocation, "memory for weights");
  }
  return memory;
}

std::shared_ptr<void> cuda_ops::upload_weight(const void* from, std::size_t bytes) {
  auto memory = take_weight(bytes);
  if (memory != nullptr && !weights_are_there_) {
    gpu_.check(cudaMemcpyAsync(memory.get(), from, bytes, cudaMemcpyHostToDevice, stream_),
               "upload of a weight");
  }
  return memory;
}

/// Decides how a weight is stored. Scales must not change inside a block of columns that the
/// matrix unit sums; other weights are expanded.
void cuda_ops::choose_packing(const weight_matrix& weight, packed_matrix& to) const {
  to.num_rows = weight.num_rows;
  to.num_cols = weight.num_cols;
  to.type = product_type(weight.type);
  const bool one_scale = weight.block_cols >= weight.num_cols;
  if (to.type != packed_type::bf16) {
    const bool scaled = weight.scales != nullptr || weight.zeros != nullptr;
    if (scaled && !one_scale && weight.block_cols % kBlockCols != 0) {
      to.type = packed_type::bf16;
    } else if (scaled) {
      to.block_rows = weight.block_rows;
      to.num_scale_cols = ceil_div(weight.num_cols, weight.block_cols);
      to.blocks_per_scale = one_scale ? std::max(ceil_div(weight.num_cols, kBlockCols), 1)
                                      : weight.block_cols / kBlockCols;
    }
  }
  to.num_chunks = num_chunks(to.type, weight.num_cols);
}

std::shared_ptr<void> cuda_ops::place_scales(const weight_matrix& weight) {
  const auto bytes = num_scales(weight) * sizeof(float);
  return weight.recipe != nullptr ? take_weight(bytes) : upload_weight(weight.scales, bytes);
}

/// Brings a weight to the device some rows at a time, as it is stored, so that little room is
/// needed, and hands them on: use(rows, number of the first).
void cuda_ops::stage(const weight_matrix& weight, const weight_matrix& on_device,
                     const std::function<void(weight_matrix rows, std::int32_t first)>& use) {
  const auto step = staged_rows(weight);
  const auto width = row_bytes(weight.type, weight.num_cols);
  for (std::int32_t first = 0; first < weight.num_rows; first += step) {
    auto rows = on_device;
    rows.num_rows = std::min(step, weight.num_rows - first);
    const auto bytes = rows.num_rows * width;
    auto* raw = staging_.take<std::byte>(std::max(bytes, kStagedBytes));
    if (!gpu_.ok()) {
      return;
    }
    rows.data = raw;
    const auto skipped = static_cast<std::size_t>(first / weight.block_rows)
                         * ceil_div(weight.num_cols, weight.block_cols);
    rows.scales = on_device.scales == nullptr ? nullptr : on_device.scales + skipped;
    rows.zeros = on_device.zeros == nullptr ? nullptr : on_device.zeros + skipped;
    if (weight.recipe != nullptr) {
      auto recipe = *weight.recipe;
      recipe.first_row += first;
      launch_make(stream_, recipe, rows);
      launched("making of a weight");
    } else {
      const auto* from = static_cast<const std::byte*>(weight.data) + first * width;
      gpu_.check(cudaMemcpyAsync(raw, from, bytes, cudaMemcpyHostToDevice, stream_),
                 "upload of a weight");
    }
    use(rows, first);
  }
}

weight_matrix cuda_ops::place_rows(const weight_matrix& weight, const weight_matrix& on_device) {
  auto placed = std::make_unique<placed_weight>();
  const auto count = static_cast<std::size_t>(weight.num_rows) * weight.num_cols;
  const bool is_plain = !is_scaled(weight) && weight.zeros == nullptr;
  const bool keeps_type = weight.type == element_type::f32 && is_plain;
  // What bf16 does not hold is rounded to it, or not at all.
  const bool is_bf16 = weight.type == element_type::bf16 && is_plain;
  weight_matrix result = weight;
  result.recipe = nullptr;
  result.type = keeps_type || (is_exact() && !is_bf16) ? element_type::f32 : element_type::bf16;
  result.scales = nullptr;
  result.zeros = nullptr;
  placed->data = take_weight(count * size_of(result.type));
  if (placed->data == nullptr) {
    return result;
  }
  if (!weights_are_there_) { // else it is as its predecessor left it
    stage(weight, on_device, [&](const weight_matrix& rows, std::int32_t first) {
      const auto at = static_cast<std::size_t>(first) * weight.num_cols;
      auto* to = static_cast<std::byte*>(placed->data.get()) + at * size_of(result.type);
      if (keeps_type) {
        const auto bytes = static_cast<std::size_t>(rows.num_rows) * rows.num_cols * sizeof(float);
        gpu_.check(cudaMemcpyAsync(to, rows.data, bytes, cudaMemcpyDeviceToDevice, stream_),
                   "copy of a weight");
      } else {
        if (result.type == element_type::f32) {
          launch_expand(stream_, rows, reinterpret_cast<float*>(to));
        } else {
          launch_expand(stream_, rows, reinterpret_cast<bf16*>(to));
        }
        launched("expansion of a weight");
      }
    });
  }
  result.data = placed->data.get();
  weights_.push_back(std::move(placed));
  return result;
}

/// Where it is noted how a product weight was packed, beside the weights themselves: a successor
/// packs as its predecessor did. With exact numerics the note is the type of its elements,
/// otherwise whether it holds NaN.
std::int32_t* cuda_ops::next_note() {
  if (num_products_ % kNotes == 0) {
    notes_ = take_weight(kNotes * sizeof(std::int32_t));
    if (notes_ == nullptr) {
      return nullptr;
    }
    if (weights_are_there_) {
      known_notes_.resize(kNotes);
      gpu_.check(cudaMemcpyAsync(known_notes_.data(), notes_.get(), kNotes * sizeof(std::int32_t),
                                 cudaMemcpyDeviceToHost, stream_),
                 "copy of notes");
      synchronise();
    }
  }
  return static_cast<std::int32_t*>(notes_.get()) + num_products_++ % kNotes;
}

/// What a predecessor has noted there.
std::int32_t cuda_ops::known_note(const std::int32_t* note) const {
  return known_notes_[note - static_cast<const std::int32_t*>(notes_.get())];
}

/// Packs a weight. False if it holds NaN, which only bf16 can say; the note then says so too.
bool cuda_ops::pack(const weight_matrix& weight, const weight_matrix& on_device,
                    const packed_matrix& to, std::int32_t* note) {
  const bool is_bf16 = to.type == packed_type::bf16;
  const bool narrows = to.type == packed_type::i8 && weight.type != element_type::i8;
  if (weights_are_there_) {
    return is_bf16 || known_note(note) == 0;
  }
  auto* found = is_bf16 ? static_cast<std::int32_t*>(flag_.get()) : note;
  std::int32_t has_nan = 0;
  gpu_.check(cudaMemsetAsync(found, 0, sizeof(std::int32_t), stream_), "clearing a flag");
  stage(weight, on_device, [&](weight_matrix rows, std::int32_t first) {
    if (narrows) {
      auto* scales = const_cast<float*>(to.scales) + std::int64_t{first} * to.num_scale_cols;
      launch_find_scales(stream_, rows, scales);
      launched("scales of a weight");
      rows.scales = scales;
    }
    auto part = to;
    part.data = static_cast<const std::byte*>(to.data) + packed_bytes(first, to.num_chunks);
    part.num_rows = rows.num_rows;
    launch_pack(stream_, rows, part, found);
    launched("packing of a weight");
  });
  gpu_.check(cudaMemcpyAsync(&has_nan, found, sizeof(has_nan), cudaMemcpyDeviceToHost, stream_),
             "copy of a flag");
  synchronise();
  return is_bf16 || has_nan == 0;
}

weight_matrix cuda_ops::place(const weight_matrix& weight, weight_use use) {
  weight_matrix result = weight;
  result.packed = nullptr;
  result.recipe = nullptr;
  if (!begin(weight.num_rows)) {
    return result;
  }
  auto placed = std::make_unique<placed_weight>();
  weight_matrix on_device = weight;
  if (is_scaled(weight)) {
    placed->scales = place_scales(weight);
    on_device.scales = static_cast<const float*>(placed->scales.get());
  }
  if (weight.zeros != nullptr) {
    placed->zeros = upload_weight(weight.zeros, num_scales(weight));
    on_device.zeros = static_cast<const std::uint8_t*>(placed->zeros.get());
  }
  if (use == weight_use::stored) {
    result = place_rows(weight, on_device);
    synchronise(); // scales go away with `placed`
    return result;
  }
  if (is_exact()) {
    return place_exact(weight, on_device, use, std::move(placed));
  }
  auto shape = on_device;
  if (is_narrowed(weight, use)) {
    shape = narrowed_shape(weight);
    placed->scales = take_weight(num_scales(shape) * sizeof(float));
    shape.scales = static_cast<const float*>(placed->scales.get());
    result = shape;
  }
  auto& packed = placed->packed;
  choose_packing(shape, packed);
  packed.scales = shape.scales;
  auto* note = next_note();
  if (note == nullptr) {
    return result;
  }
  for (bool done = false; !done;) {
    placed->data = take_weight(packed_bytes(packed.num_rows, packed.num_chunks));
    if (placed->data == nullptr) {
      return result;
    }
    packed.data = placed->data.get();
    done = pack(weight, on_device, packed, note);
    if (!done) {
      packed = {};
      packed.num_rows = weight.num_rows;
      packed.num_cols = weight.num_cols;
      packed.num_chunks = num_chunks(packed.type, weight.num_cols);
    }
  }
  if (packed.type == packed_type::bf16) {
    placed->scales = nullptr;
    placed->zeros = nullptr;
    packed.scales = nullptr;
  } else {
    packed.zeros = on_device.zeros;
  }
  result.data = packed.data;
  result.scales = packed.scales;
  result.zeros = packed.zeros;
  result.packed = &packed;
  weights_.push_back(std::move(placed));
  return result;
}

const packed_matrix& cuda_ops::packed(const weight_matrix& w) const {
  assert(w.packed != nullptr); // not placed for products
  return *static_cast<const packed_matrix*>(w.packed);
}

cuda_ops::readable_rows cuda_ops::make_readable(const rows_view& x, std::int32_t num_groups,
                                                std::int32_t group_stride, const packed_matrix& w) {
  const auto width = ceil_div(w.num_cols, kBlockCols) * kBlockCols;
  const auto address = reinterpret_cast<std::uintptr_t>(x.data);
  if (width == w.num_cols && address % 16 == 0 && x.stride % 8 == 0 && group_stride % 8 == 0) {
    return {static_cast<const bf16*>(x.data), x.stride, group_stride};
  }
  const auto row_width = static_cast<std::int64_t>(num_groups) * width;
  auto* copy = padded_.take<bf16>(static_cast<std::size_t>(x.num_rows) * row_width);
  if (gpu_.ok()) {
    launch_pad(stream_, as_bf16(x), num_groups, group_stride, w.num_cols, width, copy);
    launched("padding of rows");
  }
  return {copy, row_width, width};
}

/// Packs rows for the matrix unit where that pays, and says so in `args`.
bool cuda_ops::pack_rows(const rows_of_bf16& x, std::span<const std::int32_t> slots,
                         std::int32_t num_jobs, std::int64_t x_step, std::int32_t num_cols,
                         linear_args& args) {
  const auto num_slots = slots.empty() ? x.num_rows : static_cast<std::int32_t>(slots.size());
  const auto num_groups = ceil_div(num_slots, 8);
  const auto num_halves = ceil_div(num_cols, kBlockCols) * 2;
  args.packed_groups = num_groups;
  const auto step = std::int64_t{num_halves} * num_groups * 1024;
  args.packed_step = num_jobs > 1 ? step : 0;
  auto* image =
    packed_rows_.take<std::byte>(static_cast<std::size_t>(step * num_jobs + kSpareGroups * 1024));
  const auto* device_slots = slots.empty() ? nullptr : ring_.put(slots);
  if (!gpu_.ok()) {
    return false;
  }
  launch_pack_rows(stream_, x, device_slots, num_groups, num_jobs, x_step, num_cols, image);
  launched("packing of rows");
  args.packed_x = image;
  return true;
}

void cuda_ops::multiply(const linear_args& args) {
  if (!gpu_.ok()) {
    return;
  }
  const auto num_multiprocessors = gpu_.num_multiprocessors();
  switch (args.w.type) {
  case packed_type::bf16: launch_linear_bf16(stream_, args, num_multiprocessors); break;
  case packed_type::f8: launch_linear_f8(stream_, args, num_multiprocessors); break;
  case packed_type::i8: launch_linear_i8(stream_, args, num_multiprocessors); break;
  case packed_type::i4: launch_linear_i4(stream_, args, num_multiprocessors); break;
  }
  launched("linear");
}

/// num_jobs products of neighbouring columns of x with neighbouring rows of w.
void cuda_ops::multiply_rows(const rows_view& x, std::int32_t x_step, const weight_matrix& w,
                             std::int32_t num_jobs, const rows_view& out, std::int32_t out_step,
                             bool float_out) {
  if (!begin(x.num_rows)) {
    return;
  }
  if (is_exact()) {
    multiply_exact(x, x_step, w, num_jobs, out, out_step);
    return;
  }
  linear_args args;
  args.w = packed(w);
  assert(args.w.num_rows % num_jobs == 0);
  args.job_cols = args.row_step = args.w.num_rows / num_jobs;
  args.num_jobs = num_jobs;
  args.max_rows = x.num_rows;
  args.job = {args.w.data, args.w.scales, args.w.zeros, nullptr, nullptr, out.data, x.num_rows};
  args.out_stride = out.stride;
  args.out_step = out_step;
  args.float_out = float_out;
  if (gpu_.is_hopper() && x.num_rows >= kWideFrom) {
    pack_rows(as_bf16(x), {}, num_jobs, x_step, args.w.num_cols, args);
  } else {
    const auto input = make_readable(x, num_jobs, x_step, args.w);
    args.job.x = input.data;
    args.x_stride = input.stride;
    args.x_step = input.group_stride;
  }
  multiply(args);
}

void cuda_ops::linear(const rows_view& x, const weight_matrix& w, const rows_view& out) {
  multiply_rows(x, x.num_cols, w, 1, out, 0, false);
}

void cuda_ops::logits(const rows_view& x, const weight_matrix& w, const rows_view& out) {
  multiply_rows(x, x.num_cols, w, 1, out, 0, true);
}

/// Two products of few rows, each too small to keep a GPU busy, in one launch.
void cuda_ops::linears(const rows_view& x, std::span<const linear_part> parts) {
  const bool is_pair = !is_exact() && parts.size() == 2 && x.num_rows <= kFewRows
                       && same_layout(packed(parts[0].w), packed(parts[1].w));
  if (!is_pair) {
    for (const auto& part : parts) {
      linear(x, part.w, part.out);
    }
    return;
  }
  if (!begin(x.num_rows)) {
    return;
  }
  const auto input = make_readable(x, 1, x.num_cols, packed(parts[0].w));
  const auto job_of = [&](const linear_part& part) {
    const auto& w = packed(part.w);
    linear_job job{w.data, w.scales, w.zeros, input.data, nullptr, part.out.data, x.num_rows};
    job.num_cols = w.num_rows;
    job.out_stride = part.out.stride;
    return job;
  };
  linear_args args;
  args.w = packed(parts[0].w);
  args.job = job_of(parts[0]);
  args.other = job_of(parts[1]);
  args.num_jobs = 2;
  args.max_rows = x.num_rows;
  args.job_cols = std::max(args.job.num_cols, args.other.num_cols);
  args.x_stride = input.stride;
  multiply(args);
}

void cuda_ops::mlp(const rows_view& x, const expert_weights& w, const rows_view& gate,
                   const rows_view& up, const rows_view& out) {
  if (is_exact() || x.num_rows > kGatedRows || !same_shape(packed(w.gate), packed(w.up))) {
    ops::mlp(x, w, gate, up, out);
    return;
  }
  if (!begin(x.num_rows)) {
    return;
  }
  const auto& first = packed(w.gate);
  const auto& second = packed(w.up);
  const auto input = make_readable(x, 1, x.num_cols, first);
  linear_args args;
  args.w = first;
  args.job = {first.data, first.scales, first.zeros, input.data, nullptr, gate.data, x.num_rows};
  args.job.second_data = second.data;
  args.job.second_scales = second.scales;
  args.job.second_zeros = second.zeros;
  args.gated = true;
  args.max_rows = x.num_rows;
  args.job_cols = first.num_rows;
  args.x_stride = input.stride;
  args.out_stride = gate.stride;
  multiply(args);
  linear(gate, w.down, out);
}

void cuda_ops::linear_per_head(const rows_view& x, std::int32_t x_head_stride,
                               const weight_matrix& w, std::int32_t num_heads, const rows_view& out,
                               std::int32_t out_head_stride) {
  multiply_rows(x, x_head_stride, w, num_heads, out, out_head_stride, false);
}

/// Takes neighbouring tasks of one expert together, and gives those with many rows their places
/// among the packed ones: `slots_` by row of the input, `task_slots_` by task.
void cuda_ops::find_runs(std::span<const expert_task> tasks) {
  runs_.clear();
  slots_.clear();
  task_slots_.clear();
  for (std::size_t first = 0; first < tasks.size();) {
    auto last = first + 1;
    while (last < tasks.size() && tasks[last].expert == tasks[first].expert) {
      ++last;
    }
    expert_run run;
    run.expert = tasks[first].expert;
    run.first_task = static_cast<std::int32_t>(first);
    run.num_tasks = static_cast<std::int32_t>(last - first);
    if (!is_exact() && gpu_.is_hopper() && run.num_tasks >= kWideFrom) {
      run.first_group = static_cast<std::int32_t>(slots_.size() / 8);
      for (auto task = first; task < last; ++task) {
        slots_.push_back(tasks[task].row);
        task_slots_.push_back(static_cast<std::int32_t>(task));
      }
      const auto whole = (slots_.size() + 7) / 8 * 8;
      slots_.resize(whole, -1);
      task_slots_.resize(whole, -1);
    }
    runs_.push_back(run);
    first = last;
  }
}

void cuda_ops::queue_runs(std::span<const expert_weights> experts,
                          weight_matrix expert_weights::*part, const readable_rows& x,
                          const std::int32_t* task_rows, bf16* out, std::int64_t out_stride) {
  for (const auto& run : runs_) {
    const auto& w = packed(experts[run.expert].*part);
    const std::int64_t first = run.first_task;
    linear_job job{w.data,        w.scales,
                   w.zeros,       x.data,
                   nullptr,       out + first * out_stride,
                   run.num_tasks, std::max(run.first_group, 0)};
    if (task_rows != nullptr) {
      job.rows = task_rows + first;
    } else {
      job.x += first * x.stride;
    }
    queue_.push_back({job, &w});
  }
}

/// Runs of the same shape and of about the same number of rows go together.
void cuda_ops::multiply_runs(linear_args args) {
  const auto size_class = [](const queued_job& one) {
    const auto rows = one.job.num_rows;
    return rows <= 8 ? 0 : rows < kWideFrom ? 1 : rows <= 64 ? 2 : 3;
  };
  const auto same_kind = [&](const queued_job& a, const queued_job& b) {
    return size_class(a) == size_class(b) && a.w->type == b.w->type
           && a.w->num_rows == b.w->num_rows && a.w->num_cols == b.w->num_cols
           && a.w->block_rows == b.w->block_rows && a.w->num_scale_cols == b.w->num_scale_cols;
  };
  const auto* packed_x = args.packed_x;
  while (!queue_.empty()) {
    const auto kind = queue_.back();
    const auto rest = std::partition(queue_.begin(), queue_.end(),
                                     [&](const auto& one) { return !same_kind(one, kind); });
    args.w = *kind.w;
    args.job_cols = args.w.num_rows;
    args.num_jobs = static_cast<std::int32_t>(queue_.end() - rest);
    args.packed_x = kind.job.num_rows < kWideFrom ? nullptr : packed_x;
    args.max_rows = 0;
    jobs_.clear();
    for (auto one = rest; one != queue_.end(); ++one) {
      jobs_.push_back(one->job);
      args.max_rows = std::max(args.max_rows, one->job.num_rows);
    }
    args.jobs = ring_.put(std::span<const linear_job>(jobs_));
    multiply(args);
    queue_.erase(rest, queue_.end());
  }
}

void cuda_ops::experts(const rows_view& x, std::span<const expert_task> tasks,
                       std::span<const expert_weights> experts, const rows_view& out) {
  const auto num_tasks = static_cast<std::int32_t>(tasks.size());
  if (!begin(num_tasks)) {
    return;
  }
  const trace range("experts");
  if (is_exact()) {
    compute_experts_exactly(x, tasks, experts, out);
    return;
  }
  task_rows_.clear();
  std::int32_t widest = 0;
  for (const auto& task : tasks) {
    task_rows_.push_back(task.row);
    widest = std::max(widest, experts[task.expert].gate.num_rows);
  }
  find_runs(tasks);
  const auto* rows = ring_.put(std::span<const std::int32_t>(task_rows_));
  const auto size = static_cast<std::size_t>(num_tasks) * widest;
  const rows_view gate{gates_.take<bf16>(size), num_tasks, widest, widest};
  const rows_view up{ups_.take<bf16>(size), num_tasks, widest, widest};
  if (!gpu_.ok()) {
    return;
  }
  const auto& one = experts[tasks.front().expert];
  if (gpu_.is_hopper()) {
    // As if every run that is packed ended in a group of its own: how tasks are spread over experts
    // does not decide whether memory moves.
    const auto most_slots = static_cast<std::size_t>(num_tasks + 7 * (num_tasks / kWideFrom));
    const auto width = ceil_div(std::max(x.num_cols, widest), kBlockCols) * kBlockCols;
    packed_rows_.take<bf16>((most_slots + 8 * kSpareGroups) * width);
  }

  linear_args args;
  if (!slots_.empty()) {
    pack_rows(as_bf16(x), slots_, 1, 0, x.num_cols, args);
  }
  const auto input = make_readable(x, 1, x.num_cols, packed(one.gate));
  queue_runs(experts, &expert_weights::gate, input, rows, as_bf16(gate).data, widest);
  queue_runs(experts, &expert_weights::up, input, rows, as_bf16(up).data, widest);
  args.x_stride = input.stride;
  args.out_stride = widest;
  multiply_runs(args);
  launch_swiglu(stream_, as_bf16(gate), as_bf16(up), as_bf16(gate));
  launched("swiglu of experts");

  if (!slots_.empty()) {
    pack_rows(as_bf16(gate), task_slots_, 1, 0, widest, args);
  }
  const auto middle = make_readable(gate, 1, widest, packed(one.down));
  queue_runs(experts, &expert_weights::down, middle, nullptr, as_bf16(out).data, out.stride);
  args.x_stride = middle.stride;
  args.out_stride = out.stride;
  multiply_runs(args);
}

} // namespace troupe::kernels::cuda
