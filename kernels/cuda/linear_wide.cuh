#pragma once

// Products of more than a few rows on the matrix unit of Hopper. The weight comes through shared
// memory as it is packed and is expanded in registers; rows of x were packed before
// (launch_pack_rows) in the order of the weight's columns. Two groups of four warps multiply 64
// rows of the weight each by kTokens rows of x; one thread of them sees to the copies.
//
// Sums are made as linear.cuh says. Where there are few tiles, each part of the columns has a block
// of its own, and the blocks of a cluster add their parts in order.

#include <cooperative_groups.h>

#include "troupe/kernels/cuda/wgmma.cuh"

namespace troupe::kernels::cuda {

inline constexpr int kWideRows = 128;
inline constexpr int kWideThreads = 256;

template <packed_type Type, int kTokens, bool kSplit>
struct wide_shape {
  static constexpr int kValues = kTokens / 2; ///< of a thread
  static constexpr int kWeightBytes = kWideRows / kTileRows * kWordsOfBlock<Type> * 1024;
  static constexpr int kHalfBytes = kTokens * 128; ///< 64 columns of the rows of x
  static constexpr int kStageBytes = kWeightBytes + 2 * kHalfBytes;
  static constexpr int kSumBytes = kValues * kWideThreads * 4;
  static constexpr int kBlocks = kTokens > 64 ? 1 : 2; ///< on a multiprocessor
  static constexpr int kStages = (222 * 1024 / kBlocks - 2048) / kStageBytes;
  static constexpr int kBytes = kStages * kStageBytes + 1024; // begins at 1024 bytes
  static_assert(kStages >= 2 && kSumBytes <= kStages * kStageBytes);
};

/// kSplit: one part of the columns a block, which is blockIdx.x within its cluster.
template <packed_type Type, int kTokens, bool kSplit>
__global__ void __launch_bounds__(kWideThreads, wide_shape<Type, kTokens, kSplit>::kBlocks)
  linear_wide(const __grid_constant__ linear_args args) {
#if defined(TROUPE_HOPPER)
  namespace cg = cooperative_groups;
  using shape = wide_shape<Type, kTokens, kSplit>;
  constexpr int kWords = kWordsOfBlock<Type>;
  extern __shared__ unsigned char raw_memory[];
  unsigned char* memory = aligned_memory(raw_memory);
  __shared__ std::uint64_t full[shape::kStages];
  __shared__ std::uint64_t empty[shape::kStages];

  const bool knows_weights = args.jobs == nullptr;
  if (!knows_weights) {
    follow();
  }
  const linear_job job = job_of(args, blockIdx.y);
  const packed_matrix& w = args.w;
  const std::int32_t splits = num_splits(w.num_cols);
  const std::int32_t split_of_block = kSplit ? blockIdx.x % splits : 0;
  const std::int32_t tile_of_block = kSplit ? blockIdx.x / splits : blockIdx.x;
  const std::int32_t num_token_tiles = ceil_div(args.max_rows, kTokens);
  const std::int32_t first_token = tile_of_block % num_token_tiles * kTokens;
  if (first_token >= job.num_rows) {
    return; // the whole cluster
  }
  const std::int32_t first_row = blockIdx.y * args.row_step;
  const std::int32_t row_tile = tile_of_block / num_token_tiles;
  const std::int32_t first_tile = first_row / kTileRows + row_tile * (kWideRows / kTileRows);
  const std::int32_t num_tiles = ceil_div(w.num_rows, kTileRows);
  const std::int32_t num_blocks = ceil_div(w.num_cols, kBlockCols);
  const std::int32_t first_block = kSplit ? split_of_block * num_blocks / splits : 0;
  const std::int32_t last_block = kSplit ? (split_of_block + 1) * num_blocks / splits : num_blocks;
  const int thread = threadIdx.x;
  const int lane = thread % 32;
  const int warp = thread / 32;

  const auto load_weights = [&](std::int32_t block) {
    const int stage = (block - first_block) % shape::kStages;
    unsigned char* to = memory + stage * shape::kStageBytes;
    arrive_expecting(&full[stage], shape::kStageBytes);
    for (int r = 0; r < kWideRows / kTileRows; ++r) {
      const std::int64_t tile = min(first_tile + r, num_tiles - 1);
      copy_bulk(to + r * kWords * 1024,
                static_cast<const unsigned char*>(job.data)
                  + (tile * w.num_chunks + block * kWords) * 1024,
                kWords * 1024, &full[stage]);
    }
  };
  const auto load_rows = [&](std::int32_t block) {
    const int stage = (block - first_block) % shape::kStages;
    unsigned char* to = memory + stage * shape::kStageBytes;
    const unsigned char* x = static_cast<const unsigned char*>(args.packed_x)
                             + blockIdx.y * args.packed_step
                             + (job.first_group + std::int64_t{first_token / 8}) * 1024;
    for (int half = 0; half < 2; ++half) {
      copy_bulk(to + shape::kWeightBytes + half * shape::kHalfBytes,
                x + (block * 2 + half) * args.packed_groups * 1024, shape::kHalfBytes,
                &full[stage]);
    }
  };
  const std::int32_t first_blocks = min(last_block, first_block + shape::kStages);
  if (thread == 0) {
    for (int i = 0; i < shape::kStages; ++i) {
      make_barrier(&full[i], 1);
      make_barrier(&empty[i], kWideThreads);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    for (std::int32_t block = first_block; block < first_blocks; ++block) {
      load_weights(block);
    }
  }
  if (knows_weights) {
    follow();
  }
  if (thread == 0) {
    for (std::int32_t block = first_block; block < first_blocks; ++block) {
      load_rows(block);
    }
  }
  __syncthreads();

  float total[shape::kValues] = {};
  const float* scale[2];
  const std::uint8_t* zero[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const std::int32_t tile = min(first_tile + warp, num_tiles - 1);
    const std::int32_t row = min(tile * kTileRows + h * 8 + lane / 4, w.num_rows - 1);
    const auto at = std::int64_t{row / w.block_rows} * w.num_scale_cols;
    scale[h] = job.scales == nullptr ? nullptr : job.scales + at;
    zero[h] = job.zeros == nullptr ? nullptr : job.zeros + at;
  }
  float part[shape::kValues];
  [[maybe_unused]] float sum[kSplit ? 1 : shape::kValues];
  std::int32_t split = 0;
  std::int32_t scale_at = first_block / w.blocks_per_scale;
  std::int32_t blocks_left = w.blocks_per_scale - first_block % w.blocks_per_scale; // of the scale
  for (std::int32_t block = first_block; block < last_block; ++block) {
    const int turn = block - first_block;
    const int stage = turn % shape::kStages;
    float factor[2] = {1.0F, 1.0F};
    if (scale[0] != nullptr) {
      factor[0] = __ldg(scale[0] + scale_at);
      factor[1] = __ldg(scale[1] + scale_at);
    }
    std::uint32_t zeros[2] = {0x43084308, 0x43084308}; // 128 + 8
    if constexpr (Type == packed_type::i4) {
      if (zero[0] != nullptr) {
        zeros[0] = 0x43004300 | __ldg(zero[0] + scale_at) * 0x10001U;
        zeros[1] = 0x43004300 | __ldg(zero[1] + scale_at) * 0x10001U;
      }
    }
    if (--blocks_left == 0) {
      ++scale_at;
      blocks_left = w.blocks_per_scale;
    }
    wait_barrier(&full[stage], (turn / shape::kStages) & 1);
    const unsigned char* from = memory + stage * shape::kStageBytes;
    const auto* weights = reinterpret_cast<const uint4*>(from) + warp * kWords * 64 + lane;
    const std::uint64_t x = describe_operand(shared_address(from + shape::kWeightBytes));
    std::uint32_t operands[8][4];
    uint4 words[2][kWords];
    // The second half of the block is expanded while the first is multiplied.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int q = 2 * half; q < 2 * half + 2; ++q) {
        if (q % (4 / kWords) == 0) {
          words[0][q * kWords / 4] = weights[q * kWords / 4 * 64];
          words[1][q * kWords / 4] = weights[q * kWords / 4 * 64 + 32];
        }
        std::uint32_t upper[4];
        std::uint32_t lower[4];
        expand_group<Type>(words[0], q, zeros[0], upper);
        expand_group<Type>(words[1], q, zeros[1], lower);
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          operands[2 * q + step][0] = upper[2 * step];
          operands[2 * q + step][1] = lower[2 * step];
          operands[2 * q + step][2] = upper[2 * step + 1];
          operands[2 * q + step][3] = lower[2 * step + 1];
        }
      }
      begin_group();
#pragma unroll
      for (int step = 4 * half; step < 4 * half + 4; ++step) {
        // Descriptors count in 16 bytes.
        const std::uint64_t at = x + (half * shape::kHalfBytes + step % 4 * 32) / 16;
        multiply_group<kTokens>(part, operands[step], at, step > 0 ? 1 : 0);
      }
      commit_group();
    }
    // The stage of the last block is free once the slowest warp is through with it.
    if (thread == 0 && turn > 0 && block - 1 + shape::kStages < last_block) {
      wait_barrier(&empty[(turn - 1) % shape::kStages], ((turn - 1) / shape::kStages) & 1);
      load_weights(block - 1 + shape::kStages);
      load_rows(block - 1 + shape::kStages);
    }
    __syncwarp();
    wait_groups<0>();
    arrive(&empty[stage]);
#pragma unroll
    for (int i = 0; i < shape::kValues; ++i) {
      total[i] = fmaf(part[i], factor[i / 2 % 2], total[i]);
    }
    if constexpr (!kSplit) {
      if (block + 1 == (split + 1) * num_blocks / splits) {
#pragma unroll
        for (int i = 0; i < shape::kValues; ++i) {
          sum[i] = split == 0 ? total[i] : sum[i] + total[i];
          total[i] = 0.0F;
        }
        ++split;
      }
    }
  }
  if constexpr (!kSplit) {
#pragma unroll
    for (int i = 0; i < shape::kValues; ++i) {
      total[i] = sum[i];
    }
  }

  const auto store = [&](int i, float value) {
    const std::int32_t row = first_token + i / 4 * 8 + lane % 4 * 2 + i % 2;
    const std::int32_t col =
      row_tile * kWideRows + warp * kTileRows + i / 2 % 2 * 8 + lane / 4 - first_row % kTileRows;
    if (row < job.num_rows && col >= 0 && col < args.job_cols) {
      store_out(args, job, row, col, value);
    }
  };
  if constexpr (kSplit) {
    const auto cluster = cg::this_cluster();
    auto* parts = reinterpret_cast<float*>(memory) + thread;
    __syncthreads(); // nobody multiplies any more
#pragma unroll
    for (int i = 0; i < shape::kValues; ++i) {
      parts[i * kWideThreads] = total[i];
    }
    cluster.sync();
    const int count = shape::kValues / splits;
    for (int i = split_of_block * count; i < (split_of_block + 1) * count; ++i) {
      float values[kMaxSplits]; // on their way together
#pragma unroll
      for (int s = 0; s < kMaxSplits; ++s) {
        values[s] = s < splits ? *cluster.map_shared_rank(parts + i * kWideThreads, s) : 0.0F;
      }
      float value = values[0];
#pragma unroll
      for (int s = 1; s < kMaxSplits; ++s) {
        value = s < splits ? value + values[s] : value;
      }
      store(i, value);
    }
    cluster.sync(); // nobody leaves while its memory is read
  } else {
#pragma unroll
    for (int i = 0; i < shape::kValues; ++i) {
      store(i, total[i]);
    }
  }
#endif
}

template <packed_type Type, int kTokens, bool kSplit>
void launch_wide_shape(cudaStream_t stream, const linear_args& args) {
  using shape = wide_shape<Type, kTokens, kSplit>;
  const auto kernel = linear_wide<Type, kTokens, kSplit>;
  // Of the device that is current; costs nothing once it is set.
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape::kBytes);
  const bool aligned = args.row_step % kTileRows == 0;
  const auto row_tiles = ceil_div(args.job_cols + (aligned ? 0 : kTileRows), kWideRows);
  const auto splits = kSplit ? num_splits(args.w.num_cols) : 1;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = static_cast<unsigned>(splits);
  attributes[0].val.clusterDim.y = 1;
  attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(row_tiles * ceil_div(args.max_rows, kTokens) * splits, args.num_jobs);
  config.blockDim = dim3(kWideThreads);
  config.dynamicSmemBytes = shape::kBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  cudaLaunchKernelEx(&config, kernel, args);
}

template <packed_type Type, int kTokens>
void launch_wide_tokens(cudaStream_t stream, const linear_args& args,
                        std::int32_t num_multiprocessors) {
  const auto num_blocks = std::int64_t{ceil_div(args.job_cols, kWideRows)} * args.num_jobs
                          * ceil_div(args.max_rows, kTokens);
  const auto room = std::int64_t{num_multiprocessors} * wide_shape<Type, kTokens, true>::kBlocks;
  if (num_blocks < room && num_splits(args.w.num_cols) > 1) {
    launch_wide_shape<Type, kTokens, true>(stream, args);
  } else {
    launch_wide_shape<Type, kTokens, false>(stream, args);
  }
}

template <packed_type Type>
void launch_wide(cudaStream_t stream, const linear_args& args, std::int32_t num_multiprocessors) {
  if (args.max_rows <= 64) {
    launch_wide_tokens<Type, 64>(stream, args, num_multiprocessors);
  } else {
    launch_wide_tokens<Type, 128>(stream, args, num_multiprocessors);
  }
}

} // namespace troupe::kernels::cuda
