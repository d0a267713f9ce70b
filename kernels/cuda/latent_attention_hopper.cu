#include "troupe/kernels/cuda/latent_attention.hpp"

#include <cmath>

#include <cooperative_groups.h>

#include "troupe/kernels/cuda/wgmma.cuh"

/// Absorbed latent attention on the matrix unit of Hopper: the heads of a row are the rows of the
/// product, so decoding is a matrix product too. A block computes 64 heads of one row over a part
/// of its keys; up to four blocks (a cluster) share the keys of a row and add their parts in order.
/// Tiles of 64 keys and the cuts between blocks depend on the position of the row alone, so its
/// bits do not depend on who else is in the batch.
namespace troupe::kernels::cuda {

namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 256; ///< two groups of four warps
constexpr int kHeads = 64;
constexpr int kKeys = 64;
constexpr int kWidth = kWideLatent + kWideRope;
constexpr int kChunkCols = 64; ///< of 128 bytes, which is what the matrix unit swizzles
constexpr int kChunks = kWidth / kChunkCols;
constexpr int kChunkBytes = kKeys * kChunkCols * 2;
constexpr int kTileBytes = kChunks * kChunkBytes;
constexpr int kParts = 4;
[[maybe_unused]] constexpr int kTilesOfPart = 4; ///< fewer are not worth a block of their own
static_assert(kHeads == kKeys);                  // tiles of both are laid out alike

/// Tiles are [kChunks][64 rows][128 bytes], pieces of 16 bytes exchanged by row.
struct attention_memory {
  unsigned char query[kTileBytes];
  unsigned char keys[2][kTileBytes];
  unsigned char powers[kHeads * kKeys * 2];
  float best[2][kHeads]; ///< of the halves of a tile
};
constexpr int kMemoryBytes = sizeof(attention_memory) + 1024; // begins at 1024 bytes
static_assert(kMemoryBytes <= 227 * 1024);

/// What a block leaves for the others of its cluster, over the keys.
struct attention_part {
  float sums[kHeads][kWideLatent];
};
static_assert(sizeof(attention_part) <= sizeof(attention_memory::keys));

/// Over the powers, behind the last tile.
struct attention_totals {
  float halves[2][kHeads];
  float largest[kHeads];
  float total[kHeads];
  float weights[kParts][kHeads];
};
static_assert(sizeof(attention_totals) <= sizeof(attention_memory::powers));

#if defined(TROUPE_HOPPER)

/// Where a piece of 16 bytes of a row of 128 lies.
__device__ int place_of_piece(int row, int piece) {
  return row * 128 + ((piece ^ row % 8) * 16);
}

__device__ void show_to_matrix_unit() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#endif

__global__ void __cluster_dims__(kParts, 1, 1) __launch_bounds__(kThreads, 1)
  hopper_latent_attention(rows_of_bf16 q_latent, rows_of_bf16 q_rope,
                          std::int32_t q_rope_head_stride, std::int32_t num_heads, float scale,
                          device_batch batch, device_pages pages, rows_of_bf16 out) {
#if defined(TROUPE_HOPPER)
  extern __shared__ unsigned char raw_memory[];
  auto& memory = *reinterpret_cast<attention_memory*>(aligned_memory(raw_memory));
  const auto cluster = cg::this_cluster();
  // The last rows of a batch tend to have the most keys, and come first.
  const auto row = static_cast<std::int32_t>(gridDim.z - 1 - blockIdx.z);
  const std::int32_t first_head = blockIdx.y * kHeads;
  const std::int32_t length = batch.positions[row] + 1;
  const std::int32_t num_tiles = ceil_div(length, kKeys);
  const std::int32_t num_parts = min(kParts, ceil_div(num_tiles, kTilesOfPart));
  const auto rank = static_cast<std::int32_t>(cluster.block_rank());
  if (rank >= num_parts) {
    return; // nobody looks at its memory
  }
  const std::int32_t first_tile = num_tiles * rank / num_parts;
  const std::int32_t last_tile = num_tiles * (rank + 1) / num_parts;
  const auto thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int half = __shfl_sync(kAllLanes, thread / 128,
                               0); // of the keys of a tile, then of the dimensions of the result
  const int my_row = thread / 32 % 4 * 16 + lane / 4; // and the eighth behind it

  // A thread copies the same piece of two keys of each chunk. Their pages are looked up a tile
  // before they are needed.
  const int piece = thread % 8;
  const std::int32_t* table = batch.tables + batch.offsets[batch.sequences[row]];
  std::int32_t page[2];
  const auto find_pages = [&](std::int32_t tile) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const std::int32_t position = tile * kKeys + thread / 8 + j * 32;
      page[j] = tile < last_tile && position < length ? table[position / pages.page_tokens] : -1;
    }
  };
  const auto load_keys = [&](std::int32_t tile) {
    unsigned char* to = memory.keys[(tile - first_tile) % 2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int key = thread / 8 + j * 32;
      const std::int32_t position = tile * kKeys + key;
      const bool inside = page[j] >= 0;
      const std::int64_t token =
        std::int64_t{page[j]} * pages.page_tokens + position % pages.page_tokens;
      const bf16* from = pages.data + (inside ? token * kWidth + piece * 8 : 0);
      // Nothing may come of what was here before, not even a zero times it: the rest gets zeros.
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        copy_async(to + chunk * kChunkBytes + place_of_piece(key, piece),
                   from + (inside ? chunk * kChunkCols : 0), inside);
      }
    }
    commit_copies();
    find_pages(tile + 1);
  };

  // Positions and tables come from the host, before any kernel of a step.
  find_pages(first_tile);
  follow();
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int head = thread / 8 + j * 32;
    const bool inside = first_head + head < num_heads;
    const std::int64_t index = inside ? first_head + head : 0;
    const bf16* latent = q_latent.data + row * q_latent.stride + index * kWideLatent + piece * 8;
    const bf16* rope = q_rope.data + row * q_rope.stride + index * q_rope_head_stride + piece * 8;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      copy_async(memory.query + chunk * kChunkBytes + place_of_piece(head, piece),
                 chunk * kChunkCols < kWideLatent ? latent + chunk * kChunkCols : rope, inside);
    }
  }
  load_keys(first_tile);

  // Descriptors count in 16 bytes.
  const std::uint64_t query = describe_operand(shared_address(memory.query));
  const std::uint64_t powers = describe_operand(shared_address(memory.powers));
  float sums[kWideLatent / 4] = {}; // 256 dimensions of 64 heads by 128 threads
  float largest[2] = {-INFINITY, -INFINITY};
  float total[2] = {0.0F, 0.0F}; // of this lane's keys
  for (std::int32_t tile = first_tile; tile < last_tile; ++tile) {
    const std::uint32_t keys = shared_address(memory.keys[(tile - first_tile) % 2]);
    const std::uint64_t some_keys = describe_operand(keys + half * (kKeys / 2) * 128);
    wait_copies<0>();
    show_to_matrix_unit();
    __syncthreads(); // the tile is there, and nobody needs the one before

    float scores[16]; // 32 keys of 64 heads
    begin_group();
#pragma unroll
    for (int step = 0; step < kWidth / 16; ++step) {
      const std::uint32_t at = step / 4 * kChunkBytes + step % 4 * 32;
      multiply_shared(scores, query + at / 16, some_keys + at / 16, step > 0 ? 1 : 0);
    }
    commit_group();
    if (tile + 1 < last_tile) {
      load_keys(tile + 1);
    }
    wait_groups<0>();

    float best[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const std::int32_t position =
        tile * kKeys + half * (kKeys / 2) + i / 4 * 8 + lane % 4 * 2 + i % 2;
      scores[i] = position < length ? scores[i] * scale : -INFINITY;
      best[i / 2 % 2] = fmaxf(best[i / 2 % 2], scores[i]);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      best[h] = fmaxf(best[h], __shfl_xor_sync(kAllLanes, best[h], 1));
      best[h] = fmaxf(best[h], __shfl_xor_sync(kAllLanes, best[h], 2));
      if (lane % 4 == 0) {
        memory.best[half][my_row + 8 * h] = best[h];
      }
    }
    __syncthreads();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      best[h] =
        fmaxf(fmaxf(memory.best[0][my_row + 8 * h], memory.best[1][my_row + 8 * h]), largest[h]);
      const float shrink = exp2f((largest[h] - best[h]) * 1.44269504F);
      largest[h] = best[h];
      total[h] *= shrink;
#pragma unroll
      for (int i = 0; i < kWideLatent / 4; i += 4) {
        sums[i + 2 * h] *= shrink;
        sums[i + 2 * h + 1] *= shrink;
      }
    }
#pragma unroll
    for (int i = 0; i < 16; i += 2) {
      const int h = i / 2 % 2;
      const float first = exp2f((scores[i] - largest[h]) * 1.44269504F);
      const float second = exp2f((scores[i + 1] - largest[h]) * 1.44269504F);
      total[h] += first;
      total[h] += second;
      unsigned char* to =
        memory.powers + place_of_piece(my_row + 8 * h, half * 4 + i / 4) + lane % 4 * 4;
      *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(first, second);
    }
    show_to_matrix_unit();
    __syncthreads();

    const std::uint64_t values =
      describe_across(keys + half * (kChunks / 2) * kChunkBytes, kChunkBytes);
    begin_group();
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      multiply_shared_across(sums, powers + step * 32 / 16, values + step * 16 * 128 / 16, 1);
    }
    commit_group();
    wait_groups<0>();
  }

  __syncthreads(); // the powers and the keys have been read
  auto& totals = *reinterpret_cast<attention_totals*>(memory.powers);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    total[h] += __shfl_xor_sync(kAllLanes, total[h], 1);
    total[h] += __shfl_xor_sync(kAllLanes, total[h], 2);
    if (lane % 4 == 0) {
      totals.halves[half][my_row + 8 * h] = total[h];
    }
  }
  __syncthreads();
  bf16* to = out.data + row * out.stride + std::int64_t{first_head} * kWideLatent;
  if (num_parts == 1) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int head = my_row + 8 * h;
      const float sum = totals.halves[0][head] + totals.halves[1][head];
      if (first_head + head < num_heads) {
#pragma unroll
        for (int i = 0; i < kWideLatent / 4; i += 4) {
          const int dim = half * (kWideLatent / 2) + i * 2 + lane % 4 * 2;
          *reinterpret_cast<__nv_bfloat162*>(to + head * kWideLatent + dim) =
            __floats2bfloat162_rn(sums[i + 2 * h] / sum, sums[i + 2 * h + 1] / sum);
        }
      }
    }
    return;
  }

  auto& part = *reinterpret_cast<attention_part*>(memory.keys);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int head = my_row + 8 * h;
    if (half == 0 && lane % 4 == 0) {
      totals.largest[head] = largest[h];
      totals.total[head] = totals.halves[0][head] + totals.halves[1][head];
    }
#pragma unroll
    for (int i = 0; i < kWideLatent / 4; i += 4) {
      const int dim = half * (kWideLatent / 2) + i * 2 + lane % 4 * 2;
      *reinterpret_cast<float2*>(&part.sums[head][dim]) =
        make_float2(sums[i + 2 * h], sums[i + 2 * h + 1]);
    }
  }
  cluster.sync();
  if (thread < kHeads) {
    float weights[kParts];
    float best = -INFINITY;
    for (int p = 0; p < num_parts; ++p) {
      best = fmaxf(best, *cluster.map_shared_rank(&totals.largest[thread], p));
    }
    float sum = 0.0F;
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      weights[p] = 0.0F;
      if (p < num_parts) {
        weights[p] =
          exp2f((*cluster.map_shared_rank(&totals.largest[thread], p) - best) * 1.44269504F);
        sum += weights[p] * *cluster.map_shared_rank(&totals.total[thread], p);
      }
    }
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      totals.weights[p][thread] = weights[p] / sum;
    }
  }
  __syncthreads();
  // Each block adds a part of the dimensions, four at a time.
  const int first_four = kWideLatent / 4 * rank / num_parts;
  const int count = kWideLatent / 4 * (rank + 1) / num_parts - first_four;
#pragma unroll 2
  for (int i = thread; i < kHeads * count; i += kThreads) {
    const int head = i / count;
    const int dim = (first_four + i % count) * 4;
    if (first_head + head < num_heads) {
      float4 sum = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        if (p < num_parts) {
          const float4 more =
            *reinterpret_cast<const float4*>(cluster.map_shared_rank(&part.sums[head][dim], p));
          const float weight = totals.weights[p][head];
          sum.x = fmaf(weight, more.x, sum.x);
          sum.y = fmaf(weight, more.y, sum.y);
          sum.z = fmaf(weight, more.z, sum.z);
          sum.w = fmaf(weight, more.w, sum.w);
        }
      }
      const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(sum.x, sum.y),
                                       __floats2bfloat162_rn(sum.z, sum.w)};
      *reinterpret_cast<uint2*>(to + head * kWideLatent + dim) =
        make_uint2(as_bits(pairs[0]), as_bits(pairs[1]));
    }
  }
  cluster.sync(); // nobody leaves while its memory is read
#endif
}

} // namespace

void launch_hopper_latent_attention(cudaStream_t stream, const rows_of_bf16& q_latent,
                                    const rows_of_bf16& q_rope, std::int32_t q_rope_head_stride,
                                    std::int32_t num_heads, float scale, const device_batch& batch,
                                    const device_pages& pages, const rows_of_bf16& out) {
  cudaFuncSetAttribute(hopper_latent_attention, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       kMemoryBytes);
  const dim3 grid(kParts, ceil_div(num_heads, kHeads), q_latent.num_rows);
  launch(stream, grid, kThreads, kMemoryBytes, hopper_latent_attention, q_latent, q_rope,
         q_rope_head_stride, num_heads, scale, batch, pages, out);
}

} // namespace troupe::kernels::cuda
