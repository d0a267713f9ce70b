#pragma once

// Products of many rows where there is no matrix unit of Hopper: tiles of both operands in shared
// memory, three blocks of columns on their way. Sums are made as linear.cuh says, so a row gets the
// same bits from either kernel.

#include "troupe/kernels/cuda/wgmma.cuh"

namespace troupe::kernels::cuda {

/// 2 by 4 warps, each with kRowTiles tiles of 16 rows of the weight by kTokenTiles tiles of 8 rows
/// of x.
template <packed_type Type, int kRowTiles, int kTokenTiles>
struct many_shape {
  static constexpr int kThreads = 256;
  static constexpr int kRows = 2 * kRowTiles * kTileRows;
  static constexpr int kTokens = 4 * kTokenTiles * 8;
  static constexpr int kStages = 3;
  static constexpr int kWeightBytes = kRows * 64 * kWordsOfBlock<Type>;
  static constexpr int kTokenBytes = kTokens * kBlockCols * 2;
  static constexpr int kStageBytes = kWeightBytes + kTokenBytes;
  static constexpr int kOutStride = kRows + 4; // floats; spreads the rows over the banks
  static constexpr int kSums = kRowTiles * kTokenTiles * 4;
  static constexpr int kOutBytes = kTokens * kOutStride * 4;
  static constexpr int kBytes = kStages * kStageBytes;
  static_assert(kOutBytes <= kBytes);
};

template <packed_type Type, int kRowTiles, int kTokenTiles>
__global__ void __launch_bounds__(256, 1) linear_many(const linear_args args) {
#if !defined(TROUPE_HOPPER)
  using shape = many_shape<Type, kRowTiles, kTokenTiles>;
  constexpr int kWords = kWordsOfBlock<Type>;
  extern __shared__ __align__(128) unsigned char memory[];

  const linear_job job = job_of(args, blockIdx.y);
  const std::int32_t first_token = blockIdx.z * shape::kTokens;
  if (first_token >= job.num_rows) {
    return;
  }
  const packed_matrix& w = args.w;
  const int thread = threadIdx.x;
  const int lane = thread % 32;
  const int warp_row = thread / 32 % 2;
  const int warp_col = thread / 64;
  const std::int32_t num_tiles = ceil_div(w.num_rows, kTileRows);
  const std::int32_t first_row = blockIdx.y * args.row_step;
  const std::int32_t first_tile = first_row / kTileRows + blockIdx.x * (shape::kRows / kTileRows);
  const std::int32_t num_blocks = ceil_div(w.num_cols, kBlockCols);
  const std::int32_t splits = num_splits(w.num_cols);

  // Each thread copies the same 16 bytes of rows of every block of columns.
  constexpr int kTokenCopies = shape::kTokens * 16 / shape::kThreads;
  std::int32_t from[kTokenCopies]; // -1: nobody's
#pragma unroll
  for (int i = 0; i < kTokenCopies; ++i) {
    const int token = first_token + (thread + i * shape::kThreads) / 16;
    from[i] = token >= job.num_rows ? -1 : job.rows == nullptr ? token : job.rows[token];
  }
  const auto load_block = [&](std::int32_t block) {
    if (block < num_blocks) {
      unsigned char* stage = memory + block % shape::kStages * shape::kStageBytes;
      constexpr int kPieces = 64 * kWords; // of 16 bytes, of one tile
#pragma unroll
      for (int i = 0; i < shape::kWeightBytes / 16 / shape::kThreads; ++i) {
        const int piece = thread + i * shape::kThreads;
        const std::int32_t tile = min(first_tile + piece / kPieces, num_tiles - 1);
        const std::int32_t chunk = block * kWords + piece % kPieces / 64;
        const auto at = (std::int64_t{tile} * w.num_chunks + chunk) * 64 + piece % 64;
        const bool inside = chunk < w.num_chunks;
        copy_async(stage + piece * 16, static_cast<const uint4*>(job.data) + (inside ? at : 0),
                   inside);
      }
      unsigned char* tokens = stage + shape::kWeightBytes;
#pragma unroll
      for (int i = 0; i < kTokenCopies; ++i) {
        const int token = (thread + i * shape::kThreads) / 16;
        const int piece = thread % 16;
        const std::int32_t col = block * kBlockCols + piece * 8;
        const bool inside = from[i] >= 0 && col < w.num_chunks * chunk_cols(Type);
        // Groups of 32 columns change places from row to row, so that lanes meet other banks.
        copy_async(tokens + token * 256 + ((piece / 4 ^ token % 4) * 4 + piece % 4) * 16,
                   job.x + (inside ? from[i] * args.x_stride + col : 0), inside);
      }
    }
    commit_copies();
  };

  const float* scale[kRowTiles][2];
  const std::uint8_t* zero[kRowTiles][2];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const std::int32_t tile = min(first_tile + warp_row * kRowTiles + r, num_tiles - 1);
      const std::int32_t row = min(tile * kTileRows + h * 8 + lane / 4, w.num_rows - 1);
      const auto at = std::int64_t{row / w.block_rows} * w.num_scale_cols;
      scale[r][h] = job.scales == nullptr ? nullptr : job.scales + at;
      zero[r][h] = job.zeros == nullptr ? nullptr : job.zeros + at;
    }
  }

#pragma unroll
  for (int i = 0; i < shape::kStages - 1; ++i) {
    load_block(i);
  }
  float total[kRowTiles][kTokenTiles][4] = {};
  float sum[kRowTiles][kTokenTiles][4] = {}; // of the parts that are done
  std::int32_t split = 0;
  for (std::int32_t block = 0; block < num_blocks; ++block) {
    wait_copies<shape::kStages - 2>();
    __syncthreads();
    load_block(block + shape::kStages - 1);
    const unsigned char* stage = memory + block % shape::kStages * shape::kStageBytes;
    const auto* weights =
      reinterpret_cast<const uint4*>(stage) + warp_row * kRowTiles * 64 * kWords + lane;
    const unsigned char* tokens =
      stage + shape::kWeightBytes + (warp_col * kTokenTiles * 8 + lane / 4) * 256 + lane % 4 * 16;
    float part[kRowTiles][kTokenTiles][4] = {};
    std::uint32_t zeros[kRowTiles][2];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      zeros[r][0] = zeros[r][1] = 0x43084308; // 128 + 8
      if constexpr (Type == packed_type::i4) {
        if (zero[r][0] != nullptr) {
          zeros[r][0] = 0x43004300 | zero[r][0][block / w.blocks_per_scale] * 0x10001U;
          zeros[r][1] = 0x43004300 | zero[r][1][block / w.blocks_per_scale] * 0x10001U;
        }
      }
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      uint4 values[kTokenTiles];
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        const int group = q ^ lane / 4 % 4;
        values[n] = *reinterpret_cast<const uint4*>(tokens + n * 8 * 256 + group * 64);
      }
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        // Of a chunk only the words of this group are used; the compiler drops the other loads.
        uint4 words[2][kWords];
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
          words[0][i] = weights[(r * kWords + i) * 64];
          words[1][i] = weights[(r * kWords + i) * 64 + 32];
        }
        std::uint32_t upper[4];
        std::uint32_t lower[4];
        expand_group<Type>(words[0], q, zeros[r][0], upper);
        expand_group<Type>(words[1], q, zeros[r][1], lower);
        const std::uint32_t even[4] = {upper[0], lower[0], upper[1], lower[1]};
        const std::uint32_t odd[4] = {upper[2], lower[2], upper[3], lower[3]};
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          multiply_tile(part[r][n], even, values[n].x, values[n].y);
        }
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          multiply_tile(part[r][n], odd, values[n].z, values[n].w);
        }
      }
    }
    const bool ends_split = block + 1 == (split + 1) * num_blocks / splits;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      float factor[2] = {1.0F, 1.0F};
      if (scale[r][0] != nullptr) {
        factor[0] = scale[r][0][block / w.blocks_per_scale];
        factor[1] = scale[r][1][block / w.blocks_per_scale];
      }
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          total[r][n][i] = fmaf(part[r][n][i], factor[i / 2], total[r][n][i]);
        }
      }
    }
    if (ends_split) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            sum[r][n][i] = split == 0 ? total[r][n][i] : sum[r][n][i] + total[r][n][i];
            total[r][n][i] = 0.0F;
          }
        }
      }
      ++split;
    }
  }

  // Through shared memory, so that neighbouring threads write neighbouring columns.
  wait_copies<0>();
  __syncthreads();
  auto* results = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = (warp_col * kTokenTiles + n) * 8 + lane % 4 * 2 + i % 2;
        const int row = (warp_row * kRowTiles + r) * kTileRows + i / 2 * 8 + lane / 4;
        results[token * shape::kOutStride + row] = sum[r][n][i];
      }
    }
  }
  __syncthreads();
  const std::int32_t first_col = blockIdx.x * shape::kRows - first_row % kTileRows;
  for (int i = thread; i < shape::kTokens * shape::kRows; i += shape::kThreads) {
    const int row = i % shape::kRows;
    const std::int32_t out_row = first_token + i / shape::kRows;
    const std::int32_t out_col = first_col + row;
    if (out_row < job.num_rows && out_col >= 0 && out_col < args.job_cols) {
      store_out(args, job, out_row, out_col, results[i / shape::kRows * shape::kOutStride + row]);
    }
  }
#endif
}

template <packed_type Type, int kRowTiles, int kTokenTiles>
void launch_many(cudaStream_t stream, const linear_args& args) {
  using shape = many_shape<Type, kRowTiles, kTokenTiles>;
  const auto kernel = linear_many<Type, kRowTiles, kTokenTiles>;
  // Of the device that is current; costs nothing once it is set.
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape::kBytes);
  const bool aligned = args.row_step % kTileRows == 0;
  const dim3 grid(ceil_div(args.job_cols + (aligned ? 0 : kTileRows), shape::kRows), args.num_jobs,
                  ceil_div(args.max_rows, shape::kTokens));
  kernel<<<grid, shape::kThreads, shape::kBytes, stream>>>(args);
}

} // namespace troupe::kernels::cuda
