#include "troupe/kernels/cpu/fast_ops.hpp"

#include <algorithm>
#include <cassert>
#include <cmath>

#include "troupe/kernels/cpu/bf16.hpp"
#include "troupe/kernels/narrow_weight.hpp"

namespace troupe::kernels::cpu {

namespace {

/// Rows of one item of work: enough to pay for bringing weights into the caches.
constexpr std::int32_t kRowsOfItem = 128;

/// Bytes of weights of one item, where a product is short of memory bandwidth.
constexpr std::int64_t kBytesOfItem = 1 << 17;

/// Elements worth rounding on several threads.
constexpr std::int64_t kElementsToShare = 1 << 15;

/// Products and what bringing a byte of weights costs in products, for comparing items.
constexpr std::int64_t kProductsOfByte = 8;

constexpr std::int32_t kPanelsOfTile = 4;

std::int32_t ceil_div(std::int64_t a, std::int64_t b) {
  return static_cast<std::int32_t>((a + b - 1) / b);
}

float* row_of(const rows_view& rows, std::int32_t row) {
  return static_cast<float*>(rows.data) + std::int64_t{row} * rows.stride;
}

const packed_weight* packed_of(const weight_matrix& w) {
  return static_cast<const packed_weight*>(w.packed);
}

/// Elements of the sum that share a scale in the packed form; 0 if that form has none for it.
std::int32_t group_of(const weight_matrix& w) {
  if (w.scales == nullptr || w.block_cols >= w.num_cols || w.block_cols % kLargestGroup == 0) {
    return kLargestGroup;
  }
  return w.block_cols % 4 == 0 && w.block_cols < kLargestGroup ? w.block_cols : 0;
}

/// True if rows are rounded for one as for the other.
bool rounds_alike(const packed_weight& a, const packed_weight& b) {
  return (a.kind == packed_kind::i8) == (b.kind == packed_kind::i8) && a.num_cols == b.num_cols
         && (a.kind != packed_kind::i8 || a.group == b.group);
}

/// Rounded to 8 bit by group, as fast_table::quantise_row does.
void to_bytes_and_back(const float* x, std::int32_t count, std::int32_t group, float* out) {
  for (std::int32_t first = 0; first < count; first += group) {
    const std::int32_t stop = std::min(count, first + group);
    float largest = 0.0F;
    bool finite = true;
    for (std::int32_t k = first; k < stop; ++k) {
      largest = std::max(largest, std::fabs(x[k]));
      finite = finite && std::isfinite(x[k]);
    }
    const float scale = finite ? largest * (1.0F / 127.0F) : std::nanf("");
    const float inverse = largest > 0.0F ? 127.0F / largest : 0.0F;
    for (std::int32_t k = first; k < stop; ++k) {
      out[k] = std::nearbyint(x[k] * inverse) * scale;
    }
  }
}

} // namespace

fast_ops::fast_ops(const kernel_table& kernels, const fast_table* fast, std::int32_t num_threads,
                   std::atomic<std::uint64_t>* progress)
  : cpu_ops(kernels, num_threads, progress), fast_(fast), memory_(pool().size()) {
  add_to_description(fast == nullptr ? ", fast numerics emulated" : ", fast numerics");
}

unsigned char* fast_ops::multiply_scratch(std::int32_t thread) {
  return memory_[thread].multiply.take(kMultiplyScratch);
}

weight_matrix fast_ops::place(const weight_matrix& weight, weight_use use) {
  weight_matrix result = cpu_ops::place(weight, use);
  result.packed = nullptr;
  if (fast_ == nullptr || use == weight_use::stored || weight.type == element_type::i4) {
    return result;
  }
  static_assert(kNarrowGroup == kLargestGroup);
  packed_weight packed;
  bool done = false;
  if (use == weight_use::narrow_product && size_of(weight.type) > 1 && weight.scales == nullptr) {
    std::vector<std::int8_t> codes(static_cast<std::size_t>(weight.num_rows) * weight.num_cols);
    std::vector<float> scales(static_cast<std::size_t>(weight.num_rows)
                              * ceil_div(weight.num_cols, kLargestGroup));
    narrow(weight, codes.data(), scales.data());
    auto narrowed = narrowed_shape(weight);
    narrowed.data = codes.data();
    narrowed.scales = scales.data();
    done = pack(narrowed, packed);
  } else {
    done = pack(result, packed);
  }
  if (done) {
    packed_.push_back(packed);
    result.packed = &packed_.back();
  }
  return result;
}

bool fast_ops::pack(const weight_matrix& weight, packed_weight& packed) {
  packed.num_rows = weight.num_rows;
  packed.num_cols = weight.num_cols;
  packed.depth = ceil_div(weight.num_cols, 4) * 4;
  if (size_of(weight.type) == 1) {
    packed.kind = weight.type == element_type::i8 ? packed_kind::i8 : packed_kind::f8;
    packed.group = group_of(weight);
    const bool by_panel = weight.scales == nullptr || weight.block_rows % kPackedColumns == 0
                          || weight.block_rows >= weight.num_rows;
    packed.scale_width = by_panel ? 1 : kPackedColumns;
  }
  const bool scaled = weight.scales != nullptr;
  if (packed.kind == packed_kind::bf16 ? scaled : packed.group == 0) {
    return false;
  }
  if (packed.group > 0) {
    packed.num_groups = ceil_div(packed.depth, packed.group);
  }
  packed.data = arena_.take(packed.data_bytes());
  packed.scales = reinterpret_cast<float*>(arena_.take(packed.scale_bytes()));
  if (packed.data == nullptr || packed.scales == nullptr) {
    return false;
  }
  const std::int32_t num_panels = packed.num_panels();
  const std::int32_t chunks = std::clamp(ceil_div(packed.data_bytes(), 1 << 18), 1, num_panels);
  pool().run(chunks, [&](std::int32_t chunk, std::int32_t) {
    const auto first = static_cast<std::int32_t>(std::int64_t{num_panels} * chunk / chunks);
    const auto last = static_cast<std::int32_t>(std::int64_t{num_panels} * (chunk + 1) / chunks);
    fast_->pack(weight, packed, first, last);
    tick();
  });
  return true;
}

rows_view fast_ops::rounded(const rows_view& x, const weight_matrix& w, std::int32_t num_segments,
                            std::int32_t segment_stride) {
  rows_view result;
  result.num_rows = x.num_rows;
  result.num_cols = num_segments * w.num_cols;
  result.stride = result.num_cols;
  result.data = rounded_.take(std::int64_t{x.num_rows} * result.stride);
  const std::int32_t group = group_of(w) == 0 ? kLargestGroup : group_of(w);
  for_rows(x.num_rows, 4 * std::int64_t{result.num_cols}, [&](std::int32_t m, std::int32_t) {
    for (std::int32_t s = 0; s < num_segments; ++s) {
      const float* from = row_of(x, m) + std::int64_t{s} * segment_stride;
      float* to = row_of(result, m) + std::int64_t{s} * w.num_cols;
      if (w.type == element_type::i8) {
        to_bytes_and_back(from, w.num_cols, group, to);
      } else {
        std::transform(from, from + w.num_cols, to, nearest_bf16);
      }
    }
  });
  return result;
}

fast_rows fast_ops::take_rows(std::int32_t num_rows, const packed_weight& w, row_memory& memory) {
  fast_rows result;
  // An odd number of cache lines, so that the rows of a tile do not fall into the same sets.
  const bool bytes = w.kind == packed_kind::i8;
  const std::int32_t line = bytes ? 64 : 32;
  result.stride = std::int64_t{ceil_div(w.depth, 2 * line) * 2 + 1} * line;
  if (bytes) {
    result.data = memory.bytes.take(num_rows * result.stride);
    result.scales = memory.scales.take(std::int64_t{num_rows} * w.num_groups);
    result.offsets = memory.offsets.take(std::int64_t{num_rows} * w.num_groups);
  } else {
    result.data = memory.halves.take(num_rows * result.stride);
  }
  return result;
}

template <class Row>
fast_rows fast_ops::round_rows(std::int32_t num_rows, const packed_weight& w, row_memory& memory,
                               const Row& row) {
  const fast_rows result = take_rows(num_rows, w, memory);
  const bool bytes = w.kind == packed_kind::i8;
  std::int8_t* whole = memory.bytes.take(0);
  std::uint16_t* halves = memory.halves.take(0);
  float* scales = memory.scales.take(0);
  std::int32_t* offsets = memory.offsets.take(0);
  const auto round = [&](std::int32_t m) {
    if (bytes) {
      const std::int64_t at = std::int64_t{m} * w.num_groups;
      fast_->quantise_row(row(m), w.num_cols, w.depth, w.group, whole + m * result.stride,
                          scales + at, offsets + at);
    } else {
      fast_->round_row(row(m), w.num_cols, w.depth, halves + m * result.stride);
    }
  };
  const std::int64_t elements = std::int64_t{num_rows} * w.num_cols;
  if (elements < kElementsToShare) {
    for (std::int32_t m = 0; m < num_rows; ++m) {
      round(m);
    }
    return result;
  }
  const std::int32_t chunks = std::min<std::int32_t>(num_rows, pool().size() * 4);
  pool().run(chunks, [&](std::int32_t chunk, std::int32_t) {
    const auto last = static_cast<std::int32_t>(std::int64_t{num_rows} * (chunk + 1) / chunks);
    for (auto m = static_cast<std::int32_t>(std::int64_t{num_rows} * chunk / chunks); m < last;
         ++m) {
      round(m);
    }
    tick();
  });
  return result;
}

void fast_ops::multiply(std::span<const fast_args> products) {
  const std::int32_t threads = pool().size();
  cuts_.clear();
  std::int32_t num_items = 0;
  std::int64_t work = 0;
  for (const fast_args& args : products) {
    const std::int32_t num_panels = args.w->num_panels();
    const std::int32_t num_rows = args.num_rows;
    const std::int64_t panel_bytes = args.w->panel_bytes();
    product_cut cut{args, 1, 1, ceil_div(num_rows, kRowsOfItem)};
    // Half a bundle would read every other pair of cache lines, and memory delivers them all; but
    // no thread should go without work.
    if (num_panels >= 2 * kBundlePanels * threads) {
      cut.unit = kBundlePanels;
    }
    const std::int32_t units = ceil_div(num_panels, cut.unit);
    const std::int64_t largest = std::max<std::int64_t>(kBytesOfItem / panel_bytes, 1);
    // As many cuts for one thread as for the other: they end together.
    cut.cuts = std::max(ceil_div(num_panels, largest), 1);
    cut.cuts = std::min(units, ceil_div(cut.cuts, threads) * threads);
    if (cut.row_blocks > 1) {
      cut.cuts = units;
    }
    const std::int32_t wanted = threads * 8;
    while (cut.cuts * cut.row_blocks < wanted && num_rows / cut.row_blocks >= 64) {
      cut.row_blocks *= 2;
    }
    work += num_rows * panel_bytes * num_panels;
    num_items += cut.cuts * cut.row_blocks;
    cuts_.push_back(cut);
  }
  const auto one = [&](std::int32_t item, std::int32_t thread) {
    const product_cut* cut = cuts_.data();
    while (item >= cut->cuts * cut->row_blocks) {
      item -= cut->cuts * cut->row_blocks;
      ++cut;
    }
    multiply(*cut, item, thread);
    tick();
  };
  if (work > 1 << 15) {
    return pool().run(num_items, one);
  }
  for (std::int32_t item = 0; item < num_items; ++item) {
    one(item, 0);
  }
}

void fast_ops::multiply(const product_cut& cut, std::int32_t item, std::int32_t thread) {
  const std::int64_t column = item / cut.row_blocks;
  const std::int64_t block = item % cut.row_blocks;
  const auto row = static_cast<std::int32_t>(cut.args.num_rows * block / cut.row_blocks);
  fast_args part = cut.args;
  part.num_rows = static_cast<std::int32_t>(cut.args.num_rows * (block + 1) / cut.row_blocks) - row;
  if (part.rows == nullptr) {
    const std::int64_t element = part.w->kind == packed_kind::i8 ? 1 : 2;
    part.x.data = static_cast<const char*>(part.x.data) + row * part.x.stride * element;
    part.x.scales += std::int64_t{row} * part.w->num_groups;
    part.x.offsets += std::int64_t{row} * part.w->num_groups;
  } else {
    part.rows += row;
  }
  part.out += row * part.out_stride;
  const std::int32_t num_panels = part.w->num_panels();
  const std::int32_t units = ceil_div(num_panels, cut.unit);
  const auto first = static_cast<std::int32_t>(units * column / cut.cuts * cut.unit);
  const auto last = static_cast<std::int32_t>(units * (column + 1) / cut.cuts * cut.unit);
  fast_->multiply(part, first, std::min(last, num_panels), multiply_scratch(thread));
}

void fast_ops::linear(const rows_view& x, const weight_matrix& w, const rows_view& out) {
  if (packed_of(w) == nullptr) {
    return cpu_ops::linear(rounded(x, w, 1, 0), w, out);
  }
  const linear_part part{w, out};
  linears(x, {&part, 1});
}

void fast_ops::linears(const rows_view& x, std::span<const linear_part> parts) {
  constexpr std::size_t most = 4;
  const packed_weight* first = packed_of(parts.front().w);
  const bool alike =
    parts.size() <= most && std::all_of(parts.begin(), parts.end(), [&](const linear_part& part) {
      return packed_of(part.w) != nullptr && rounds_alike(*packed_of(part.w), *first);
    });
  if (!alike) {
    for (const linear_part& part : parts) {
      linear(x, part.w, part.out);
    }
    return;
  }
  fast_args args[most];
  const fast_rows rows =
    round_rows(x.num_rows, *first, input_, [&](std::int32_t m) { return row_of(x, m); });
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const auto& [w, out] = parts[i];
    assert(x.num_cols == w.num_cols && out.num_cols == w.num_rows && out.num_rows == x.num_rows);
    args[i].w = packed_of(w);
    args[i].x = rows;
    args[i].num_rows = x.num_rows;
    args[i].out = static_cast<float*>(out.data);
    args[i].out_stride = out.stride;
  }
  multiply({args, parts.size()});
}

void fast_ops::linear_per_head(const rows_view& x, std::int32_t x_head_stride,
                               const weight_matrix& w, std::int32_t num_heads, const rows_view& out,
                               std::int32_t out_head_stride) {
  const packed_weight* packed = packed_of(w);
  const std::int32_t out_dim = w.num_rows / num_heads;
  if (packed == nullptr || out_dim % kPackedColumns != 0) {
    return cpu_ops::linear_per_head(rounded(x, w, num_heads, x_head_stride), w.num_cols, w,
                                    num_heads, out, out_head_stride);
  }
  const fast_rows rows = round_rows(x.num_rows * num_heads, *packed, input_, [&](std::int32_t i) {
    return row_of(x, i / num_heads) + std::int64_t{i % num_heads} * x_head_stride;
  });
  std::int32_t* head_rows = head_rows_.take(std::int64_t{x.num_rows} * num_heads);
  for (std::int32_t h = 0; h < num_heads; ++h) {
    for (std::int32_t m = 0; m < x.num_rows; ++m) {
      head_rows[std::int64_t{h} * x.num_rows + m] = m * num_heads + h;
    }
  }
  const std::int32_t panels = out_dim / kPackedColumns;
  const std::int32_t row_blocks = ceil_div(x.num_rows, kRowsOfItem);
  pool().run(num_heads * row_blocks, [&](std::int32_t item, std::int32_t thread) {
    const std::int32_t head = item / row_blocks;
    const std::int64_t block = item % row_blocks;
    const auto row = static_cast<std::int32_t>(x.num_rows * block / row_blocks);
    fast_args args;
    args.w = packed;
    args.x = rows;
    args.rows = head_rows + std::int64_t{head} * x.num_rows + row;
    args.num_rows = static_cast<std::int32_t>(x.num_rows * (block + 1) / row_blocks) - row;
    args.out = row_of(out, row) + std::int64_t{head} * out_head_stride;
    args.first_column = head * out_dim;
    args.out_stride = out.stride;
    fast_->multiply(args, head * panels, (head + 1) * panels, multiply_scratch(thread));
    tick();
  });
}

void fast_ops::mlp(const rows_view& x, const expert_weights& w, const rows_view& gate,
                   const rows_view& up, const rows_view& out) {
  if (packed_of(w.gate) == nullptr || packed_of(w.up) == nullptr || packed_of(w.down) == nullptr) {
    return cpu_ops::mlp(x, w, gate, up, out);
  }
  own_tasks_.clear();
  for (std::int32_t m = 0; m < x.num_rows; ++m) {
    own_tasks_.push_back({m, 0});
  }
  run_experts(x, own_tasks_, {&w, 1}, out);
}

void fast_ops::experts_one_by_one(const rows_view& x, std::span<const expert_task> tasks,
                                  std::span<const expert_weights> experts, const rows_view& out) {
  const auto num_tasks = static_cast<std::int32_t>(tasks.size());
  for (std::int32_t first = 0, last = 0; first < num_tasks; first = last) {
    while (last < num_tasks && tasks[last].expert == tasks[first].expert) {
      ++last;
    }
    const expert_weights& expert = experts[tasks[first].expert];
    const auto view = [&](scratch<float>& memory, std::int32_t num_cols) {
      rows_view rows;
      rows.data = memory.take(std::int64_t{last - first} * num_cols);
      rows.num_rows = last - first;
      rows.num_cols = rows.stride = num_cols;
      return rows;
    };
    const rows_view in = view(gathered_, x.num_cols);
    for (std::int32_t t = first; t < last; ++t) {
      std::copy_n(row_of(x, tasks[t].row), x.num_cols, row_of(in, t - first));
    }
    const rows_view gate = view(gates_, expert.gate.num_rows);
    const rows_view up = view(ups_, expert.up.num_rows);
    linear(in, expert.gate, gate);
    linear(in, expert.up, up);
    swiglu(gate, up, gate);
    rows_view part = out;
    part.data = row_of(out, first);
    part.num_rows = last - first;
    linear(gate, expert.down, part);
  }
}

/// Cuts every run of tasks of one expert into rows and panels that make items of similar size.
template <class Weight>
void fast_ops::list_items(std::span<const expert_task> tasks, const Weight& weight) {
  items_.clear();
  const auto num_tasks = static_cast<std::int32_t>(tasks.size());
  for (std::int32_t first = 0, last = 0; first < num_tasks; first = last) {
    const std::int32_t expert = tasks[first].expert;
    while (last < num_tasks && tasks[last].expert == expert) {
      ++last;
    }
    const packed_weight& w = weight(expert);
    const std::int32_t num_panels = w.num_panels();
    const std::int32_t row_blocks = ceil_div(last - first, kRowsOfItem);
    const std::int32_t rows = ceil_div(last - first, row_blocks);
    const std::int64_t cost =
      w.panel_bytes() * std::max<std::int64_t>(1, rows / (2 * kProductsOfByte));
    const std::int32_t step =
      std::max(kPanelsOfTile, ceil_div(kBytesOfItem / cost, kPanelsOfTile) * kPanelsOfTile);
    for (std::int32_t row = first; row < last; row += rows) {
      for (std::int32_t panel = 0; panel < num_panels; panel += step) {
        items_.push_back(
          {expert, row, std::min(rows, last - row), panel, std::min(num_panels, panel + step)});
      }
    }
  }
}

template <class Work>
void fast_ops::run_items(Work&& work) {
  pool().run(static_cast<std::int32_t>(items_.size()), [&](std::int32_t i, std::int32_t thread) {
    work(items_[i], thread);
    tick();
  });
}

void fast_ops::round_halves(const float* x, std::int32_t count, std::uint16_t* out) const {
  if (fast_ != nullptr) {
    fast_->round_row(x, count, count, out);
  } else {
    std::transform(x, x + count, out, bf16_bits);
  }
}

void fast_ops::widen_halves(const std::uint16_t* x, std::int32_t count, float* out) const {
  if (fast_ != nullptr) {
    fast_->widen_row(x, count, out);
  } else {
    std::transform(x, x + count, out, bf16_value);
  }
}

void fast_ops::round_floats(const float* x, std::int32_t count, float* out) const {
  constexpr std::int32_t most = 512;
  std::uint16_t halves[most];
  for (std::int32_t first = 0; first < count; first += most) {
    const std::int32_t part = std::min(most, count - first);
    round_halves(x + first, part, halves);
    widen_halves(halves, part, out + first);
  }
}

void fast_ops::export_rows(const rows_view& from, void* to) {
  auto* halves = static_cast<std::uint16_t*>(to);
  for_rows(from.num_rows, from.num_cols, [&](std::int32_t m, std::int32_t) {
    round_halves(row_of(from, m), from.num_cols, halves + std::int64_t{m} * from.num_cols);
  });
}

void fast_ops::import_rows(const void* from, const rows_view& to) {
  const auto* halves = static_cast<const std::uint16_t*>(from);
  for_rows(to.num_rows, to.num_cols, [&](std::int32_t m, std::int32_t) {
    widen_halves(halves + std::int64_t{m} * to.num_cols, to.num_cols, row_of(to, m));
  });
}

void fast_ops::experts(const rows_view& x, std::span<const expert_task> tasks,
                       std::span<const expert_weights> experts, const rows_view& out) {
  if (tasks.empty()) {
    return;
  }
  // Rows that are rounded to bf16 for the products need it no sooner.
  const expert_weights& sample = experts[tasks[0].expert];
  const packed_weight* packed = packed_of(sample.gate);
  const bool is_i8 =
    packed != nullptr ? packed->kind == packed_kind::i8 : sample.gate.type == element_type::i8;
  rows_view input = x;
  if (is_i8) {
    input.data = exchanged_.take(std::int64_t{x.num_rows} * x.num_cols);
    input.stride = x.num_cols;
    for_rows(x.num_rows, x.num_cols, [&](std::int32_t m, std::int32_t) {
      round_floats(row_of(x, m), x.num_cols, row_of(input, m));
    });
  }
  run_experts(input, tasks, experts, out);
  for_rows(static_cast<std::int32_t>(tasks.size()), out.num_cols,
           [&](std::int32_t m, std::int32_t) {
             round_floats(row_of(out, m), out.num_cols, row_of(out, m));
           });
}

void fast_ops::run_experts(const rows_view& x, std::span<const expert_task> tasks,
                           std::span<const expert_weights> experts, const rows_view& out) {
  const auto num_tasks = static_cast<std::int32_t>(tasks.size());
  const expert_weights& sample = experts[tasks[0].expert];
  const packed_weight* in_like = packed_of(sample.gate);
  const packed_weight* down_like = packed_of(sample.down);
  const auto is_like = [](const weight_matrix& w, const packed_weight* like) {
    const packed_weight* packed = packed_of(w);
    return packed != nullptr && like != nullptr && packed->num_cols == like->num_cols
           && packed->num_rows == like->num_rows && packed->group == like->group
           && (packed->kind == packed_kind::i8) == (like->kind == packed_kind::i8);
  };
  bool alike = true;
  for (std::int32_t t = 0; t < num_tasks; ++t) {
    if (t == 0 || tasks[t].expert != tasks[t - 1].expert) {
      const expert_weights& expert = experts[tasks[t].expert];
      alike = alike && is_like(expert.gate, in_like) && is_like(expert.up, in_like)
              && is_like(expert.down, down_like);
    }
  }
  if (!alike) {
    return experts_one_by_one(x, tasks, experts, out);
  }
  std::int32_t* task_rows = task_rows_.take(num_tasks);
  for (std::int32_t t = 0; t < num_tasks; ++t) {
    task_rows[t] = tasks[t].row;
  }
  const fast_rows input =
    round_rows(x.num_rows, *in_like, input_, [&](std::int32_t m) { return row_of(x, m); });
  const std::int64_t width = ceil_div(in_like->num_rows, kPackedColumns) * kPackedColumns;
  float* gates = gates_.take(num_tasks * width);
  list_items(tasks,
             [&](std::int32_t e) -> const packed_weight& { return *packed_of(experts[e].gate); });
  // Rounding to bf16 takes no more than the element, and so no waiting for the rest of the row.
  const bool by_element = down_like->kind != packed_kind::i8;
  fast_rows inner;
  if (by_element) {
    inner = take_rows(num_tasks, *down_like, inner_);
  }
  std::uint16_t* halves = inner_.halves.take(0);
  run_items([&](const expert_item& item, std::int32_t thread) {
    const expert_weights& expert = experts[item.expert];
    const std::int32_t first = item.first_panel * kPackedColumns;
    const std::int64_t columns = std::int64_t{item.last_panel - item.first_panel} * kPackedColumns;
    float* ups = memory_[thread].tile.take(item.num_tasks * columns);
    fast_args args;
    args.x = input;
    args.rows = task_rows + item.first_task;
    args.num_rows = item.num_tasks;
    args.w = packed_of(expert.gate);
    args.out = gates + item.first_task * width;
    args.out_stride = width;
    fast_->multiply(args, item.first_panel, item.last_panel, multiply_scratch(thread));
    args.w = packed_of(expert.up);
    args.out = ups;
    args.out_stride = columns;
    args.first_column = first;
    fast_->multiply(args, item.first_panel, item.last_panel, multiply_scratch(thread));
    const std::int64_t count = std::min<std::int64_t>(columns, in_like->num_rows - first);
    for (std::int32_t t = 0; t < item.num_tasks; ++t) {
      float* gate = gates + (item.first_task + t) * width + first;
      kernels().swiglu(gate, ups + t * columns, count, gate);
      if (by_element) {
        const std::int32_t depth =
          first + columns >= in_like->num_rows ? down_like->depth - first : columns;
        fast_->round_row(gate, count, depth, halves + (item.first_task + t) * inner.stride + first);
      }
    }
  });
  if (!by_element) {
    inner =
      round_rows(num_tasks, *down_like, inner_, [&](std::int32_t t) { return gates + t * width; });
  }
  for (std::int32_t t = 0; t < num_tasks; ++t) {
    task_rows[t] = t;
  }
  list_items(tasks,
             [&](std::int32_t e) -> const packed_weight& { return *packed_of(experts[e].down); });
  run_items([&](const expert_item& item, std::int32_t thread) {
    fast_args args;
    args.x = inner;
    args.rows = task_rows + item.first_task;
    args.num_rows = item.num_tasks;
    args.w = packed_of(experts[item.expert].down);
    args.out = row_of(out, item.first_task);
    args.out_stride = out.stride;
    fast_->multiply(args, item.first_panel, item.last_panel, multiply_scratch(thread));
  });
}

} // namespace troupe::kernels::cpu
