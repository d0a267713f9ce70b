#include "troupe/kernels/cuda/device.cuh"

#include <algorithm>
#include <type_traits>

namespace troupe::kernels::cuda {

namespace {

constexpr int kThreads = 256;

/// A thread has kEmbedded neighbouring columns.
constexpr int kEmbedded = 8;

template <class T>
__global__ void embed(const void* table, bool is_float, bool is_aligned, std::int64_t num_cols,
                      const std::int32_t* ids, rows_of<T> out) {
  follow();
  const auto row = std::int64_t{ids[blockIdx.x]};
  const std::int64_t first = (std::int64_t{blockIdx.y} * kThreads + threadIdx.x) * kEmbedded;
  T* to = out.data + blockIdx.x * out.stride;
  if constexpr (std::is_same_v<T, bf16>) {
    if (is_aligned && first < num_cols) {
      const bf16* from = static_cast<const bf16*>(table) + row * num_cols + first;
      *reinterpret_cast<uint4*>(to + first) = *reinterpret_cast<const uint4*>(from);
      return;
    }
  }
  const std::int64_t last = first + kEmbedded < num_cols ? first + kEmbedded : num_cols;
  for (auto k = first; k < last; ++k) {
    if (is_float) {
      store(to + k, static_cast<const float*>(table)[row * num_cols + k]);
    } else {
      store(to + k, load(static_cast<const bf16*>(table) + row * num_cols + k));
    }
  }
}

/// One block a row; a thread keeps what it read, so that out may be x.
template <class T>
__global__ void rms_norm(rows_of<T> x, const float* weight, float epsilon, rows_of<T> out) {
  __shared__ float memory[32];
  follow();
  const T* from = x.data + blockIdx.x * x.stride;
  T* to = out.data + blockIdx.x * out.stride;
  float squares = 0.0F;
  for (std::int32_t k = threadIdx.x; k < x.num_cols; k += kThreads) {
    const float value = load(from + k);
    squares = fmaf(value, value, squares);
  }
  const float mean = block_sum(squares, memory) / static_cast<float>(x.num_cols);
  const float inverse = 1.0F / sqrtf(mean + epsilon);
  for (std::int32_t k = threadIdx.x; k < x.num_cols; k += kThreads) {
    store(to + k, load(from + k) * inverse * weight[k]);
  }
}

/// The same for rows of whole pieces of 16 bytes, at most one for each thread. kAdds: x += delta
/// before, and what is normed is what x then holds.
template <bool kAdds>
__global__ void __launch_bounds__(1024)
  rms_norm_pieces(rows_of_bf16 x, const bf16* delta, std::int64_t delta_stride, const float* weight,
                  float epsilon, rows_of_bf16 out) {
  __shared__ float memory[32];
  const auto at = static_cast<std::int32_t>(threadIdx.x);
  const bool mine = at < x.num_cols / 8;
  union {
    uint4 words = {0, 0, 0, 0};
    std::uint32_t pairs[4];
  } in;
  follow();
  if (mine) {
    in.words = reinterpret_cast<const uint4*>(x.data + blockIdx.x * x.stride)[at];
    if constexpr (kAdds) {
      const uint4 more = reinterpret_cast<const uint4*>(delta + blockIdx.x * delta_stride)[at];
      const std::uint32_t pairs[4] = {more.x, more.y, more.z, more.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float low = __uint_as_float(in.pairs[j] << 16) + __uint_as_float(pairs[j] << 16);
        const float high =
          __uint_as_float(in.pairs[j] & 0xFFFF0000U) + __uint_as_float(pairs[j] & 0xFFFF0000U);
        const auto pair = __floats2bfloat162_rn(low, high);
        memcpy(&in.pairs[j], &pair, 4);
      }
      reinterpret_cast<uint4*>(x.data + blockIdx.x * x.stride)[at] = in.words;
    }
  }
  float values[8];
  float squares = 0.0F;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    values[2 * j] = __uint_as_float(in.pairs[j] << 16);
    values[2 * j + 1] = __uint_as_float(in.pairs[j] & 0xFFFF0000U);
    squares = fmaf(values[2 * j], values[2 * j], squares);
    squares = fmaf(values[2 * j + 1], values[2 * j + 1], squares);
  }
  const float mean = block_sum(squares, memory) / static_cast<float>(x.num_cols);
  const float inverse = 1.0F / sqrtf(mean + epsilon);
  if (mine) {
    const auto* weights = reinterpret_cast<const float4*>(weight) + 2 * at;
    const float4 low = weights[0];
    const float4 high = weights[1];
    const float factors[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const auto pair = __floats2bfloat162_rn(values[2 * j] * inverse * factors[2 * j],
                                              values[2 * j + 1] * inverse * factors[2 * j + 1]);
      memcpy(&in.pairs[j], &pair, 4);
    }
    reinterpret_cast<uint4*>(out.data + blockIdx.x * out.stride)[at] = in.words;
  }
}

template <class T>
__global__ void rope(rows_of<T> x, std::int32_t num_heads, std::int32_t head_stride,
                     std::int32_t offset, std::int32_t num_pairs, const std::int32_t* positions,
                     const float* inv_freq, float magnitude, bool halves) {
  follow();
  const auto i = static_cast<std::int32_t>(blockIdx.y * kThreads + threadIdx.x);
  if (i >= num_heads * num_pairs) {
    return;
  }
  const auto position = static_cast<float>(positions[blockIdx.x]);
  const std::int32_t pair = i % num_pairs;
  T* head = x.data + blockIdx.x * x.stride + offset + std::int64_t{i / num_pairs} * head_stride;
  T* first = head + (halves ? pair : 2 * pair);
  T* second = head + (halves ? pair + num_pairs : 2 * pair + 1);
  float sine;
  float cosine;
  sincosf(position * inv_freq[pair], &sine, &cosine);
  sine *= magnitude;
  cosine *= magnitude;
  const float a = load(first);
  const float b = load(second);
  store(first, a * cosine - b * sine);
  store(second, a * sine + b * cosine);
}

template <class T>
__global__ void append(rows_of<T> first, rows_of<T> second, device_batch batch, pages_of<T> pages) {
  follow();
  const auto row = static_cast<std::int32_t>(blockIdx.x);
  T* to = pages.data + place_of(batch, pages, row, batch.positions[row]);
  for (std::int32_t k = threadIdx.x; k < pages.first_width; k += blockDim.x) {
    to[k] = first.data[row * first.stride + k];
  }
  for (std::int32_t k = threadIdx.x; k < pages.second_width; k += blockDim.x) {
    to[pages.first_width + k] = second.data[row * second.stride + k];
  }
}

template <class T>
__global__ void swiglu(rows_of<T> gate, rows_of<T> up, rows_of<T> out) {
  follow();
  const std::int64_t row = blockIdx.y;
  const std::int32_t k = blockIdx.x * kThreads + threadIdx.x;
  if (k < gate.num_cols) {
    const float g = load(gate.data + row * gate.stride + k);
    const float u = load(up.data + row * up.stride + k);
    store(out.data + row * out.stride + k, gated(g, u));
  }
}

template <class T>
__global__ void add(rows_of<T> x, const T* delta, std::int64_t delta_stride, const float* bias) {
  follow();
  const std::int64_t row = blockIdx.y;
  const std::int32_t k = blockIdx.x * kThreads + threadIdx.x;
  if (k < x.num_cols) {
    T* at = x.data + row * x.stride + k;
    store(at, load(at) + (bias != nullptr ? bias[k] : load(delta + row * delta_stride + k)));
  }
}

template <class T>
__global__ void combine(rows_of<T> expert_out, const std::int32_t* rows, const float* weights,
                        std::int32_t top_k, rows_of<T> shared, rows_of<T> out) {
  follow();
  const std::int64_t row = blockIdx.y;
  const std::int32_t k = blockIdx.x * kThreads + threadIdx.x;
  if (k >= out.num_cols) {
    return;
  }
  float sum = 0.0F;
  for (std::int32_t j = 0; j < top_k; ++j) {
    const std::int64_t from = rows == nullptr ? row * top_k + j : rows[row * top_k + j];
    sum = fmaf(weights[row * top_k + j], load(expert_out.data + from * expert_out.stride + k), sum);
  }
  if (shared.data != nullptr) {
    sum += load(shared.data + row * shared.stride + k);
  }
  T* at = out.data + row * out.stride + k;
  store(at, load(at) + sum);
}

template <class T>
__global__ void find_not_finite(rows_of<T> x, std::int32_t* found) {
  const T* row = x.data + blockIdx.x * x.stride;
  for (std::int32_t k = threadIdx.x; k < x.num_cols; k += blockDim.x) {
    if ((__float_as_uint(load(row + k)) & 0x7F800000U) == 0x7F800000U) {
      *found = 1;
    }
  }
}

__global__ void pad(rows_of_bf16 x, std::int32_t num_groups, std::int32_t group_stride,
                    std::int32_t group_cols, std::int32_t padded_cols, bf16* out) {
  const std::int64_t row = blockIdx.x;
  const std::int64_t width = std::int64_t{num_groups} * padded_cols;
  for (std::int64_t i = threadIdx.x; i < width; i += blockDim.x) {
    const auto col = static_cast<std::int32_t>(i % padded_cols);
    const std::int64_t from = i / padded_cols * group_stride + col;
    out[row * width + i] =
      col < group_cols ? x.data[row * x.stride + from] : __float2bfloat16_rn(0.0F);
  }
}

/// Four pieces on their way in each thread.
__global__ void copy_pieces(const uint4* from, uint4* to, std::int64_t count) {
  const std::int64_t step = std::int64_t{gridDim.x} * kThreads;
  std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (; i + 3 * step < count; i += 4 * step) {
    const uint4 values[4] = {from[i], from[i + step], from[i + 2 * step], from[i + 3 * step]};
    for (int j = 0; j < 4; ++j) {
      to[i + j * step] = values[j];
    }
  }
  for (; i < count; i += step) {
    to[i] = from[i];
  }
}

template <class T>
dim3 grid_of(const rows_of<T>& x) {
  return {static_cast<unsigned>(ceil_div(x.num_cols, kThreads)), static_cast<unsigned>(x.num_rows)};
}

/// Rows along y, of which a grid has at most 65,535.
template <class T, class Work>
void for_row_ranges(const rows_of<T>& x, const Work& work) {
  constexpr std::int32_t kMost = 65535;
  for (std::int32_t first = 0; first < x.num_rows; first += kMost) {
    work(first, std::min(kMost, x.num_rows - first));
  }
}

template <class T>
rows_of<T> slice(rows_of<T> x, std::int32_t first, std::int32_t count) {
  x.data = x.data == nullptr ? nullptr : x.data + first * x.stride;
  x.num_rows = count;
  return x;
}

/// Whether rms_norm_pieces can do it, which knows bf16 alone. Rows of a model are all aligned or
/// none of them is, so a row always meets the same kernel.
bool is_in_pieces(const rows_of_bf16& x, const float* weight, const rows_of_bf16& out) {
  const auto addresses = reinterpret_cast<std::uintptr_t>(x.data)
                         | reinterpret_cast<std::uintptr_t>(out.data)
                         | reinterpret_cast<std::uintptr_t>(weight);
  const bool whole = addresses % 16 == 0 && (x.stride | out.stride | x.num_cols) % 8 == 0;
  return whole && x.num_cols <= 8 * 1024;
}

} // namespace

template <class T>
void launch_embed(cudaStream_t stream, const weight_matrix& table, const std::int32_t* ids,
                  std::int32_t num_ids, const rows_of<T>& out) {
  const auto addresses =
    reinterpret_cast<std::uintptr_t>(table.data) | reinterpret_cast<std::uintptr_t>(out.data);
  const bool is_float = table.type == element_type::f32;
  const bool is_aligned =
    !is_float && addresses % 16 == 0 && (out.stride | table.num_cols) % kEmbedded == 0;
  const dim3 grid(num_ids, ceil_div(table.num_cols, kThreads * kEmbedded));
  launch(stream, grid, kThreads, 0, embed<T>, table.data, is_float, is_aligned, table.num_cols, ids,
         out);
}

template <class T>
void launch_rms_norm(cudaStream_t stream, const rows_of<T>& x, const float* weight, float epsilon,
                     const rows_of<T>& out) {
  if constexpr (std::is_same_v<T, bf16>) {
    if (is_in_pieces(x, weight, out)) {
      const auto threads = ceil_div(x.num_cols / 8, 32) * 32;
      launch(stream, x.num_rows, threads, 0, rms_norm_pieces<false>, x, nullptr, 0, weight, epsilon,
             out);
      return;
    }
  }
  launch(stream, x.num_rows, kThreads, 0, rms_norm<T>, x, weight, epsilon, out);
}

template <class T>
void launch_rope(cudaStream_t stream, const rows_of<T>& x, std::int32_t num_heads,
                 std::int32_t head_stride, std::int32_t offset, std::int32_t rope_dim,
                 const std::int32_t* positions, const float* inv_freq, float magnitude,
                 bool halves) {
  const dim3 grid(x.num_rows, ceil_div(num_heads * (rope_dim / 2), kThreads));
  launch(stream, grid, kThreads, 0, rope<T>, x, num_heads, head_stride, offset, rope_dim / 2,
         positions, inv_freq, magnitude, halves);
}

template <class T>
void launch_append(cudaStream_t stream, const rows_of<T>& first, const rows_of<T>& second,
                   const device_batch& batch, const pages_of<T>& pages) {
  launch(stream, first.num_rows, kThreads, 0, append<T>, first, second, batch, pages);
}

template <class T>
void launch_swiglu(cudaStream_t stream, const rows_of<T>& gate, const rows_of<T>& up,
                   const rows_of<T>& out) {
  for_row_ranges(gate, [&](std::int32_t first, std::int32_t count) {
    const auto part = slice(gate, first, count);
    launch(stream, grid_of(part), kThreads, 0, swiglu<T>, part, slice(up, first, count),
           slice(out, first, count));
  });
}

template <class T>
void launch_add(cudaStream_t stream, const rows_of<T>& x, const rows_of<T>& delta) {
  for_row_ranges(x, [&](std::int32_t first, std::int32_t count) {
    const auto part = slice(x, first, count);
    launch(stream, grid_of(part), kThreads, 0, add<T>, part, slice(delta, first, count).data,
           delta.stride, nullptr);
  });
}

template <class T>
void launch_add_rms_norm(cudaStream_t stream, const rows_of<T>& x, const rows_of<T>& delta,
                         const float* weight, float epsilon, const rows_of<T>& out) {
  if constexpr (std::is_same_v<T, bf16>) {
    const bool delta_is_whole =
      reinterpret_cast<std::uintptr_t>(delta.data) % 16 == 0 && delta.stride % 8 == 0;
    if (delta_is_whole && is_in_pieces(x, weight, out)) {
      const auto threads = ceil_div(x.num_cols / 8, 32) * 32;
      launch(stream, x.num_rows, threads, 0, rms_norm_pieces<true>, x, delta.data, delta.stride,
             weight, epsilon, out);
      return;
    }
  }
  launch_add(stream, x, delta);
  launch_rms_norm(stream, x, weight, epsilon, out);
}

template <class T>
void launch_add_bias(cudaStream_t stream, const rows_of<T>& x, const float* bias) {
  for_row_ranges(x, [&](std::int32_t first, std::int32_t count) {
    const auto part = slice(x, first, count);
    launch(stream, grid_of(part), kThreads, 0, add<T>, part, nullptr, 0, bias);
  });
}

template <class T>
void launch_combine(cudaStream_t stream, const rows_of<T>& expert_out, const std::int32_t* rows,
                    const float* weights, std::int32_t top_k, const rows_of<T>& shared,
                    const rows_of<T>& out) {
  for_row_ranges(out, [&](std::int32_t first, std::int32_t count) {
    const auto part = slice(out, first, count);
    const auto at = std::int64_t{first} * top_k;
    const bool in_order = rows == nullptr;
    launch(stream, grid_of(part), kThreads, 0, combine<T>,
           in_order ? slice(expert_out, first * top_k, count * top_k) : expert_out,
           in_order ? nullptr : rows + at, weights + at, top_k, slice(shared, first, count), part);
  });
}

template <class T>
void launch_find_not_finite(cudaStream_t stream, const rows_of<T>& x, std::int32_t* found) {
  find_not_finite<T><<<x.num_rows, kThreads, 0, stream>>>(x, found);
}

void launch_copy(cudaStream_t stream, const void* from, void* to, std::size_t bytes) {
  const auto count = static_cast<std::int64_t>(bytes / 16);
  const auto blocks = std::clamp<std::int64_t>((count + kThreads - 1) / kThreads, 1, 4096);
  copy_pieces<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
    static_cast<const uint4*>(from), static_cast<uint4*>(to), count);
}

void launch_pad(cudaStream_t stream, const rows_of_bf16& x, std::int32_t num_groups,
                std::int32_t group_stride, std::int32_t group_cols, std::int32_t padded_cols,
                bf16* out) {
  pad<<<x.num_rows, kThreads, 0, stream>>>(x, num_groups, group_stride, group_cols, padded_cols,
                                           out);
}

template void launch_embed(cudaStream_t, const weight_matrix&, const std::int32_t*, std::int32_t,
                           const rows_of<bf16>&);
template void launch_rms_norm(cudaStream_t, const rows_of<bf16>&, const float*, float,
                              const rows_of<bf16>&);
template void launch_rope(cudaStream_t, const rows_of<bf16>&, std::int32_t, std::int32_t,
                          std::int32_t, std::int32_t, const std::int32_t*, const float*, float,
                          bool);
template void launch_append(cudaStream_t, const rows_of<bf16>&, const rows_of<bf16>&,
                            const device_batch&, const pages_of<bf16>&);
template void launch_swiglu(cudaStream_t, const rows_of<bf16>&, const rows_of<bf16>&,
                            const rows_of<bf16>&);
template void launch_add(cudaStream_t, const rows_of<bf16>&, const rows_of<bf16>&);
template void launch_add_rms_norm(cudaStream_t, const rows_of<bf16>&, const rows_of<bf16>&,
                                  const float*, float, const rows_of<bf16>&);
template void launch_add_bias(cudaStream_t, const rows_of<bf16>&, const float*);
template void launch_combine(cudaStream_t, const rows_of<bf16>&, const std::int32_t*, const float*,
                             std::int32_t, const rows_of<bf16>&, const rows_of<bf16>&);
template void launch_find_not_finite(cudaStream_t, const rows_of<bf16>&, std::int32_t*);

template void launch_embed(cudaStream_t, const weight_matrix&, const std::int32_t*, std::int32_t,
                           const rows_of<float>&);
template void launch_rms_norm(cudaStream_t, const rows_of<float>&, const float*, float,
                              const rows_of<float>&);
template void launch_rope(cudaStream_t, const rows_of<float>&, std::int32_t, std::int32_t,
                          std::int32_t, std::int32_t, const std::int32_t*, const float*, float,
                          bool);
template void launch_append(cudaStream_t, const rows_of<float>&, const rows_of<float>&,
                            const device_batch&, const pages_of<float>&);
template void launch_swiglu(cudaStream_t, const rows_of<float>&, const rows_of<float>&,
                            const rows_of<float>&);
template void launch_add(cudaStream_t, const rows_of<float>&, const rows_of<float>&);
template void launch_add_rms_norm(cudaStream_t, const rows_of<float>&, const rows_of<float>&,
                                  const float*, float, const rows_of<float>&);
template void launch_add_bias(cudaStream_t, const rows_of<float>&, const float*);
template void launch_combine(cudaStream_t, const rows_of<float>&, const std::int32_t*, const float*,
                             std::int32_t, const rows_of<float>&, const rows_of<float>&);
template void launch_find_not_finite(cudaStream_t, const rows_of<float>&, std::int32_t*);

} // namespace troupe::kernels::cuda
