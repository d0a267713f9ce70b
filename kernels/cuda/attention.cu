#include "troupe/kernels/cuda/device.cuh"
#include "troupe/kernels/cuda/latent_attention.hpp"

#include <cmath>
#include <type_traits>

namespace troupe::kernels::cuda {

namespace {

constexpr int kKeysOfTile = 64;

/// Threads of a block, and keys that a warp has under way. Float32 is only ever computed here, so
/// one row of a long sequence is worth more of the GPU.
template <class T>
constexpr int kThreads = std::is_same_v<T, float> ? 512 : 128;
template <class T>
constexpr int kKeysOfWarp = std::is_same_v<T, float> ? 4 : 1;

/// What one row and head attends with, whichever the kind of attention.
template <class T>
struct query {
  const T* first;  ///< against the first part of a place
  const T* second; ///< against what lies behind it; null where there is nothing
  std::int32_t first_width;
  std::int32_t second_width;
  std::int32_t key_offset; ///< of the first part, from the begin of a place
  std::int32_t value_offset;
  std::int32_t value_width;
};

/// Softmax attention of one block for one row and head, tile by tile of keys, in order. Any widths.
template <class T>
__device__ void attend(const query<T>& q, std::int32_t row, float scale, const device_batch& batch,
                       const pages_of<T>& pages, T* out) {
  constexpr int kNumThreads = kThreads<T>;
  constexpr int kKeys = kKeysOfWarp<T>;
  extern __shared__ float memory[];
  const std::int32_t key_width = q.first_width + q.second_width;
  float* query_values = memory;           // [key_width]
  float* sums = query_values + key_width; // [value_width]
  float* scores = sums + q.value_width;   // [kKeysOfTile]
  __shared__ float block_memory[32];
  __shared__ std::int64_t places[kKeysOfTile];

  for (std::int32_t k = threadIdx.x; k < key_width; k += kNumThreads) {
    query_values[k] = load(k < q.first_width ? q.first + k : q.second + (k - q.first_width));
  }
  for (std::int32_t k = threadIdx.x; k < q.value_width; k += kNumThreads) {
    sums[k] = 0.0F;
  }
  const std::int32_t length = batch.positions[row] + 1;
  float largest = -INFINITY;
  float total = 0.0F;
  for (std::int32_t first = 0; first < length; first += kKeysOfTile) {
    const std::int32_t count = min(kKeysOfTile, length - first);
    __syncthreads();
    for (std::int32_t j = threadIdx.x; j < count; j += kNumThreads) {
      places[j] = place_of(batch, pages, row, first + j);
    }
    __syncthreads();
    for (std::int32_t j = threadIdx.x / 32 * kKeys; j < count; j += kNumThreads / 32 * kKeys) {
      const T* keys[kKeys];
      float dots[kKeys] = {};
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        keys[i] = pages.data + places[min(j + i, count - 1)] + q.key_offset;
      }
      for (std::int32_t k = threadIdx.x % 32; k < key_width; k += 32) {
#pragma unroll
        for (int i = 0; i < kKeys; ++i) {
          dots[i] = fmaf(query_values[k], load(keys[i] + k), dots[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        const float dot = warp_sum(dots[i]);
        if (threadIdx.x % 32 == 0 && j + i < count) {
          scores[j + i] = dot * scale;
        }
      }
    }
    __syncthreads();
    float best = -INFINITY;
    for (std::int32_t j = threadIdx.x; j < count; j += kNumThreads) {
      best = fmaxf(best, scores[j]);
    }
    best = fmaxf(largest, block_max(best, block_memory));
    const float shrink = largest == -INFINITY ? 0.0F : expf(largest - best);
    float part = 0.0F;
    for (std::int32_t j = threadIdx.x; j < count; j += kNumThreads) {
      scores[j] = expf(scores[j] - best);
      part += scores[j];
    }
    total = total * shrink + block_sum(part, block_memory);
    largest = best;
    for (std::int32_t k = threadIdx.x; k < q.value_width; k += kNumThreads) {
      float sum = sums[k] * shrink;
#pragma unroll(4 * kKeys)
      for (std::int32_t j = 0; j < count; ++j) {
        sum = fmaf(scores[j], load(pages.data + places[j] + q.value_offset + k), sum);
      }
      sums[k] = sum;
    }
  }
  for (std::int32_t k = threadIdx.x; k < q.value_width; k += kNumThreads) {
    store(out + k, sums[k] / total);
  }
}

std::size_t memory_of(std::int32_t key_width, std::int32_t value_width) {
  return static_cast<std::size_t>(key_width + value_width + kKeysOfTile) * sizeof(float);
}

template <class T>
__global__ void __launch_bounds__(kThreads<T>)
  latent_attention(rows_of<T> q_latent, rows_of<T> q_rope, std::int32_t q_rope_head_stride,
                   float scale, device_batch batch, pages_of<T> pages, rows_of<T> out) {
  const auto row = static_cast<std::int32_t>(blockIdx.y);
  const std::int64_t head = blockIdx.x;
  query<T> q;
  q.first = q_latent.data + row * q_latent.stride + head * pages.first_width;
  q.second = q_rope.data + row * q_rope.stride + head * q_rope_head_stride;
  q.first_width = pages.first_width;
  q.second_width = pages.second_width;
  q.key_offset = 0;
  q.value_offset = 0;
  q.value_width = pages.first_width;
  attend(q, row, scale, batch, pages, out.data + row * out.stride + head * pages.first_width);
}

template <class T>
__global__ void __launch_bounds__(kThreads<T>)
  grouped_attention(rows_of<T> q_rows, std::int32_t heads_of_group, std::int32_t head_dim,
                    float scale, device_batch batch, pages_of<T> pages, rows_of<T> out) {
  const auto row = static_cast<std::int32_t>(blockIdx.y);
  const std::int32_t head = blockIdx.x;
  const std::int32_t group = head / heads_of_group;
  query<T> q;
  q.first = q_rows.data + row * q_rows.stride + std::int64_t{head} * head_dim;
  q.second = nullptr;
  q.first_width = head_dim;
  q.second_width = 0;
  q.key_offset = group * head_dim;
  q.value_offset = pages.first_width + group * head_dim;
  q.value_width = head_dim;
  attend(q, row, scale, batch, pages, out.data + row * out.stride + std::int64_t{head} * head_dim);
}

} // namespace

template <class T>
void launch_latent_attention(cudaStream_t stream, const rows_of<T>& q_latent,
                             const rows_of<T>& q_rope, std::int32_t q_rope_head_stride,
                             std::int32_t num_heads, float scale, const device_batch& batch,
                             const pages_of<T>& pages, const rows_of<T>& out, bool is_hopper) {
  if constexpr (std::is_same_v<T, bf16>) {
    const auto addresses = reinterpret_cast<std::uintptr_t>(q_latent.data)
                           | reinterpret_cast<std::uintptr_t>(q_rope.data);
    const auto strides = q_latent.stride | q_rope.stride | q_rope_head_stride;
    if (pages.first_width == kWideLatent && pages.second_width == kWideRope && addresses % 16 == 0
        && strides % 8 == 0) {
      const auto wide = is_hopper ? launch_hopper_latent_attention : launch_wide_latent_attention;
      wide(stream, q_latent, q_rope, q_rope_head_stride, num_heads, scale, batch, pages, out);
      return;
    }
  }
  const dim3 grid(num_heads, q_latent.num_rows);
  latent_attention<T>
    <<<grid, kThreads<T>, memory_of(pages.first_width + pages.second_width, pages.first_width),
       stream>>>(q_latent, q_rope, q_rope_head_stride, scale, batch, pages, out);
}

template <class T>
void launch_grouped_attention(cudaStream_t stream, const rows_of<T>& q, std::int32_t num_heads,
                              std::int32_t num_kv_heads, float scale, const device_batch& batch,
                              const pages_of<T>& pages, const rows_of<T>& out) {
  const dim3 grid(num_heads, q.num_rows);
  const std::int32_t head_dim = pages.first_width / num_kv_heads;
  grouped_attention<T><<<grid, kThreads<T>, memory_of(head_dim, head_dim), stream>>>(
    q, num_heads / num_kv_heads, head_dim, scale, batch, pages, out);
}

template void launch_latent_attention(cudaStream_t, const rows_of<bf16>&, const rows_of<bf16>&,
                                      std::int32_t, std::int32_t, float, const device_batch&,
                                      const pages_of<bf16>&, const rows_of<bf16>&, bool);
template void launch_grouped_attention(cudaStream_t, const rows_of<bf16>&, std::int32_t,
                                       std::int32_t, float, const device_batch&,
                                       const pages_of<bf16>&, const rows_of<bf16>&);
template void launch_latent_attention(cudaStream_t, const rows_of<float>&, const rows_of<float>&,
                                      std::int32_t, std::int32_t, float, const device_batch&,
                                      const pages_of<float>&, const rows_of<float>&, bool);
template void launch_grouped_attention(cudaStream_t, const rows_of<float>&, std::int32_t,
                                       std::int32_t, float, const device_batch&,
                                       const pages_of<float>&, const rows_of<float>&);

} // namespace troupe::kernels::cuda
