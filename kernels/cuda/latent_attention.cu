#include "troupe/kernels/cuda/latent_attention.hpp"

#include <cmath>

#include <cooperative_groups.h>

#include "troupe/kernels/cuda/bulk_copy.cuh"

/// Absorbed latent attention on the matrix unit of GPUs later than Hopper: the heads of a row are
/// the rows of the product, so decoding is a matrix product too. A block computes 32 heads of one
/// row over a part of its keys; up to four blocks (a cluster) share the keys of a row and add their
/// parts in order. Tiles of 64 keys and the cuts between blocks depend on the position of the row
/// alone, so its bits do not depend on who else is in the batch.
namespace troupe::kernels::cuda {

namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kHeads = 32;
constexpr int kKeys = 64;
constexpr int kWidth = kWideLatent + kWideRope;
constexpr int kPitch = kWidth + 8; ///< elements; spreads the rows over the banks
constexpr int kParts = 4;
constexpr int kTilesOfPart = 4;             ///< fewer are not worth a block of their own
constexpr int kDims = kWideLatent / kWarps; ///< of the result, for a warp

constexpr int kColumnParts = 4; ///< into which the columns of a score are cut, one for a warp

struct attention_memory {
  bf16 keys[2][kKeys][kPitch];
  union {
    bf16 query[kHeads][kPitch]; ///< until every warp has its part in registers
    float scores[kColumnParts][kHeads][kKeys + 4];
  };
  bf16 powers[kHeads][kKeys + 8];
  float shrink[kHeads];
  float largest[kHeads];
  float total[kHeads];
  std::uint64_t arrived[2]; ///< keys of even and odd tiles
};

/// What a block leaves for the others of its cluster, over the keys.
struct attention_part {
  float sums[kHeads][kWideLatent];
};
static_assert(sizeof(attention_part) <= sizeof(attention_memory::keys));
static_assert(kWidth / 16 % kColumnParts == 0);

__device__ void load_matrices(std::uint32_t (&to)[4], const bf16* row) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address));
}

__device__ void load_transposed(std::uint32_t (&to)[4], const bf16* row) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address));
}

__device__ void copy_16(void* to, const void* from, bool inside) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(inside ? 16 : 0));
}

__global__ void __cluster_dims__(kParts, 1, 1) __launch_bounds__(kThreads, 1)
  wide_latent_attention(rows_of_bf16 q_latent, rows_of_bf16 q_rope, std::int32_t q_rope_head_stride,
                        std::int32_t num_heads, float scale, device_batch batch, device_pages pages,
                        rows_of_bf16 out) {
  extern __shared__ __align__(128) unsigned char raw_memory[];
  auto& memory = *reinterpret_cast<attention_memory*>(raw_memory);
  auto& part = *reinterpret_cast<attention_part*>(memory.keys);
  const auto cluster = cg::this_cluster();
  const auto row = static_cast<std::int32_t>(blockIdx.z);
  const std::int32_t first_head = blockIdx.y * kHeads;
  const std::int32_t length = batch.positions[row] + 1;
  const std::int32_t num_tiles = ceil_div(length, kKeys);
  const std::int32_t num_parts = min(kParts, ceil_div(num_tiles, kTilesOfPart));
  const auto rank = static_cast<std::int32_t>(cluster.block_rank());
  const std::int32_t first_tile = num_tiles * rank / num_parts;
  const std::int32_t last_tile = rank < num_parts ? num_tiles * (rank + 1) / num_parts : first_tile;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;

  // A thread a key. The page of a key is looked up a tile before it is needed.
  const bool loads = threadIdx.x < kKeys;
  const int my_key = threadIdx.x % kKeys;
  const std::int32_t* table = batch.tables + batch.offsets[batch.sequences[row]];
  const auto page_of = [&](std::int32_t tile) {
    const std::int32_t position = tile * kKeys + my_key;
    return loads && tile < last_tile && position < length ? table[position / pages.page_tokens]
                                                          : -1;
  };
  std::int32_t page = page_of(first_tile);
  const auto load_keys = [&](std::int32_t tile) {
    if (loads && tile < last_tile) {
      const int slot = (tile - first_tile) % 2;
      const std::int32_t position = tile * kKeys + my_key;
      bf16* to = &memory.keys[slot][my_key][0];
      if (page >= 0) {
        const auto place =
          (std::int64_t{page} * pages.page_tokens + position % pages.page_tokens) * kWidth;
        arrive_expecting(&memory.arrived[slot], kWidth * 2);
        copy_bulk(to, pages.data + place, kWidth * 2, &memory.arrived[slot]);
      } else {
        // Nothing may come of what was here before: not even a zero times it.
        for (int i = 0; i < kWidth / 8; ++i) {
          reinterpret_cast<uint4*>(to)[i] = make_uint4(0, 0, 0, 0);
        }
        arrive(&memory.arrived[slot]);
      }
    }
    page = page_of(tile + 1);
  };

  float sums[2][kDims / 8][4] = {}; // [tile of heads][8 dimensions each][of a lane]
  if (threadIdx.x == 0) {
    make_barrier(&memory.arrived[0], kKeys);
    make_barrier(&memory.arrived[1], kKeys);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  if (rank < num_parts) {
    for (int i = threadIdx.x; i < kHeads * (kWidth / 8); i += kThreads) {
      const int head = i / (kWidth / 8);
      const int col = i % (kWidth / 8) * 8;
      const std::int64_t index = first_head + head;
      const bf16* from =
        col < kWideLatent
          ? q_latent.data + row * q_latent.stride + index * kWideLatent + col
          : q_rope.data + row * q_rope.stride + index * q_rope_head_stride + (col - kWideLatent);
      copy_16(&memory.query[head][col], index < num_heads ? from : q_latent.data,
              index < num_heads);
    }
    load_keys(first_tile);
    if (threadIdx.x < kHeads) {
      memory.largest[threadIdx.x] = -INFINITY;
      memory.total[threadIdx.x] = 0.0F;
    }
    // For scores, a warp has 16 heads, half of the keys and a fourth of the columns, of which it
    // keeps the queries.
    constexpr int kSteps = kWidth / 16 / kColumnParts;
    const int column_part = warp / 2 % kColumnParts;
    const int my_heads = warp % 2 * 16;
    std::uint32_t query[kSteps][4];
    asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;");
    __syncthreads();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int col = (column_part * kSteps + step) * 16 + lane / 16 * 8;
      load_matrices(query[step], &memory.query[my_heads + lane % 16][col]);
    }
    __syncthreads(); // scores take their place
    for (std::int32_t tile = first_tile; tile < last_tile; ++tile) {
      const int turn = tile - first_tile;
      load_keys(tile + 1);
      wait_barrier(&memory.arrived[turn % 2], turn / 2 & 1);
      const auto& keys = memory.keys[turn % 2];

      {
        const int first_key = warp / (2 * kColumnParts) * (kKeys / 2);
        float scores[4][4] = {};
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const int col = (column_part * kSteps + step) * 16 + lane / 8 % 2 * 8;
#pragma unroll
          for (int n = 0; n < 4; n += 2) {
            std::uint32_t b[4];
            load_matrices(b, &keys[first_key + n * 8 + lane / 16 * 8 + lane % 8][col]);
            multiply_tile(scores[n], query[step], b[0], b[1]);
            multiply_tile(scores[n + 1], query[step], b[2], b[3]);
          }
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int i = 0; i < 4; i += 2) {
            const int head = my_heads + i / 2 * 8 + lane / 4;
            const int key = first_key + n * 8 + lane % 4 * 2;
            *reinterpret_cast<float2*>(&memory.scores[column_part][head][key]) =
              make_float2(scores[n][i], scores[n][i + 1]);
          }
        }
      }
      __syncthreads();

      // Softmax: a warp has two heads, a lane two keys of each.
      constexpr int kMine = kHeads / kWarps;
      float first[kMine];
      float second[kMine];
      float before[kMine];
      float best[kMine];
      const std::int32_t position = tile * kKeys + lane;
#pragma unroll
      for (int j = 0; j < kMine; ++j) {
        const int head = warp * kMine + j;
        before[j] = memory.largest[head];
        first[j] = memory.scores[0][head][lane];
        second[j] = memory.scores[0][head][lane + 32];
#pragma unroll
        for (int p = 1; p < kColumnParts; ++p) {
          first[j] += memory.scores[p][head][lane];
          second[j] += memory.scores[p][head][lane + 32];
        }
        first[j] = position < length ? first[j] * scale : -INFINITY;
        second[j] = position + 32 < length ? second[j] * scale : -INFINITY;
        best[j] = fmaxf(first[j], second[j]);
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
#pragma unroll
        for (int j = 0; j < kMine; ++j) {
          best[j] = fmaxf(best[j], __shfl_xor_sync(kAllLanes, best[j], step));
        }
      }
      float added[kMine];
#pragma unroll
      for (int j = 0; j < kMine; ++j) {
        best[j] = fmaxf(best[j], before[j]);
        first[j] = exp2f((first[j] - best[j]) * 1.44269504F);
        second[j] = exp2f((second[j] - best[j]) * 1.44269504F);
        added[j] = first[j] + second[j];
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
#pragma unroll
        for (int j = 0; j < kMine; ++j) {
          added[j] += __shfl_xor_sync(kAllLanes, added[j], step);
        }
      }
#pragma unroll
      for (int j = 0; j < kMine; ++j) {
        const int head = warp * kMine + j;
        memory.powers[head][lane] = __float2bfloat16_rn(first[j]);
        memory.powers[head][lane + 32] = __float2bfloat16_rn(second[j]);
        __syncwarp(); // every lane has read what the first one writes
        if (lane == 0) {
          const float shrink = exp2f((before[j] - best[j]) * 1.44269504F);
          memory.shrink[head] = shrink;
          memory.largest[head] = best[j];
          memory.total[head] = memory.total[head] * shrink + added[j];
        }
      }
      __syncthreads();

      // Weighted latents: a warp has all heads and 32 dimensions.
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const float upper = memory.shrink[m * 16 + lane / 4];
        const float lower = memory.shrink[m * 16 + 8 + lane / 4];
#pragma unroll
        for (int n = 0; n < kDims / 8; ++n) {
          sums[m][n][0] *= upper;
          sums[m][n][1] *= upper;
          sums[m][n][2] *= lower;
          sums[m][n][3] *= lower;
        }
      }
#pragma unroll
      for (int k = 0; k < kKeys; k += 16) {
        std::uint32_t a[2][4];
        load_matrices(a[0], &memory.powers[lane % 16][k + lane / 16 * 8]);
        load_matrices(a[1], &memory.powers[16 + lane % 16][k + lane / 16 * 8]);
#pragma unroll
        for (int n = 0; n < kDims / 8; n += 2) {
          std::uint32_t b[4];
          load_transposed(b, &keys[k + lane % 16][warp * kDims + n * 8 + lane / 16 * 8]);
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            multiply_tile(sums[m][n], a[m], b[0], b[1]);
            multiply_tile(sums[m][n + 1], a[m], b[2], b[3]);
          }
        }
      }
      __syncthreads(); // keys, scores and powers are written again
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < kDims / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          part.sums[m * 16 + i / 2 * 8 + lane / 4][warp * kDims + n * 8 + lane % 4 * 2 + i % 2] =
            sums[m][n][i];
        }
      }
    }
  }
  cluster.sync();
  if (rank < num_parts) {
    const int dims = kWideLatent / num_parts; // of each block; 512 / 3 leaves two to the last
    const int first_dim = rank * dims;
    const int last_dim = rank + 1 == num_parts ? kWideLatent : first_dim + dims;
    for (int head = warp; head < kHeads; head += kWarps) {
      if (first_head + head >= num_heads) {
        break;
      }
      float largest[kParts];
      float weight[kParts];
      float best = -INFINITY;
      float total = 0.0F;
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        largest[p] = p < num_parts ? *cluster.map_shared_rank(&memory.largest[head], p) : -INFINITY;
        best = fmaxf(best, largest[p]);
      }
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        weight[p] = exp2f((largest[p] - best) * 1.44269504F);
        if (p < num_parts) {
          total += weight[p] * *cluster.map_shared_rank(&memory.total[head], p);
        }
      }
      bf16* to = out.data + row * out.stride + std::int64_t{first_head + head} * kWideLatent;
      for (int dim = first_dim + lane; dim < last_dim; dim += 32) {
        float sum = 0.0F;
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
          if (p < num_parts) {
            sum += weight[p] * *cluster.map_shared_rank(&part.sums[head][dim], p);
          }
        }
        to[dim] = __float2bfloat16_rn(sum / total);
      }
    }
  }
  cluster.sync(); // nobody leaves while its memory is read
}

} // namespace

void launch_wide_latent_attention(cudaStream_t stream, const rows_of_bf16& q_latent,
                                  const rows_of_bf16& q_rope, std::int32_t q_rope_head_stride,
                                  std::int32_t num_heads, float scale, const device_batch& batch,
                                  const device_pages& pages, const rows_of_bf16& out) {
  constexpr auto kBytes = static_cast<int>(sizeof(attention_memory));
  cudaFuncSetAttribute(wide_latent_attention, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  const dim3 grid(kParts, ceil_div(num_heads, kHeads), q_latent.num_rows);
  wide_latent_attention<<<grid, kThreads, kBytes, stream>>>(q_latent, q_rope, q_rope_head_stride,
                                                            num_heads, scale, batch, pages, out);
}

} // namespace troupe::kernels::cuda
