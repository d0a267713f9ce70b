#pragma once

// Products of few rows with a packed weight: the weight is read once, by warps that have their
// parts of it to themselves.
//
// What a result is made of does not depend on the number of rows: the columns are cut into
// num_splits(num_cols) parts; within a part, the matrix unit sums blocks of 128 columns, each of
// which is scaled and added in float32, in order; the parts are added in order. The kernel for many
// rows (linear_many.cuh) does the same in another shape.

#include <algorithm>

#include "troupe/kernels/cuda/linear_many.cuh"
#include "troupe/kernels/cuda/linear_wide.cuh"

namespace troupe::kernels::cuda {

inline constexpr int kLinearWarps = 8;

/// Of a list of jobs whose length the host does not know.
inline constexpr std::int32_t kJobsAtOnce = 32;

/// What a warp has of its weights in shared memory: some blocks of columns on their way. Each lane
/// reads what it copied itself, so nobody waits for others.
template <packed_type Type, int kTiles, int kTokenTiles>
struct few_shape {
  static constexpr int kPieces = kTiles * 2 * kWordsOfBlock<Type>; ///< of a lane, 16 bytes each
  static constexpr int kStageBytes = kPieces * 512;
  static constexpr int kStages = kStageBytes == 4096 && kTokenTiles == 1 ? 2 : 3;
  static constexpr int kSums = kTokenTiles * 8 * (kTiles * kTileRows + 1); ///< floats of a warp
  static constexpr int kRingBytes = kLinearWarps * kStages * kStageBytes;
  static constexpr int kSumBytes = kLinearWarps * kSums * 4;
  static constexpr int kBytes = kRingBytes > kSumBytes ? kRingBytes : kSumBytes;
};

/// One job of a block. A warp sums one part of kTiles tiles of rows of the weight for
/// 8 * kTokenTiles rows of x. kGated: of two tiles, the second is that of the second weight, and
/// both make one tile of the result.
template <packed_type Type, int kTiles, int kTokenTiles, bool kGated>
__device__ inline void multiply_few(const linear_args& args, std::int32_t index,
                                    unsigned char* memory) {
  using shape = few_shape<Type, kTiles, kTokenTiles>;
  constexpr int kWords = kWordsOfBlock<Type>;
  static_assert(!kGated || kTiles == 2);
  constexpr int kOutTiles = kGated ? 1 : kTiles;
  constexpr int kOutRows = kOutTiles * kTileRows;
  constexpr int kTokens = kTokenTiles * 8;

  const linear_job job = job_of(args, index);
  const std::int32_t first_token = blockIdx.z * kTokens;
  if (first_token >= job.num_rows) {
    return;
  }
  const bool knows_weights = args.jobs == nullptr;
  const packed_matrix& w = args.w;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const std::int32_t splits = num_splits(w.num_cols);
  const std::int32_t split = warp % splits;
  const std::int32_t group = blockIdx.x * (kLinearWarps / splits) + warp / splits;
  const std::int32_t weight_rows = job.num_cols > 0 ? job.num_cols : w.num_rows;
  const std::int32_t job_cols = job.num_cols > 0 ? job.num_cols : args.job_cols;
  const std::int32_t num_tiles = ceil_div(weight_rows, kTileRows);
  // A job may begin inside a tile.
  const std::int32_t first_row = index * args.row_step;
  if (job.num_cols > 0 && (group - warp / splits) * kOutRows >= job_cols) {
    return; // of another job, which is wider
  }
  const std::int32_t first_tile = first_row / kTileRows;
  const std::int32_t num_blocks = ceil_div(w.num_cols, kBlockCols);
  const std::int32_t first_block = split * num_blocks / splits;
  const std::int32_t last_block = (split + 1) * num_blocks / splits;

  const uint4* tile[kTiles];
  const float* scale[kTiles][2];
  const std::uint8_t* zero[kTiles][2];
#pragma unroll
  for (int r = 0; r < kTiles; ++r) {
    // Warps beyond the edge compute the last tile again, and store nothing.
    const std::int32_t index_of_tile =
      min(first_tile + group * kOutTiles + (kGated ? 0 : r), num_tiles - 1);
    const bool is_second = kGated && r == 1;
    const void* data = is_second ? job.second_data : job.data;
    const float* scales = is_second ? job.second_scales : job.scales;
    const std::uint8_t* zeros = is_second ? job.second_zeros : job.zeros;
    tile[r] =
      static_cast<const uint4*>(data) + std::int64_t{index_of_tile} * w.num_chunks * 64 + lane;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const std::int32_t row = min(index_of_tile * kTileRows + h * 8 + lane / 4, weight_rows - 1);
      const auto at = std::int64_t{row / w.block_rows} * w.num_scale_cols;
      scale[r][h] = scales == nullptr ? nullptr : scales + at;
      zero[r][h] = zeros == nullptr ? nullptr : zeros + at;
    }
  }

  auto* ring =
    reinterpret_cast<uint4*>(memory) + warp * shape::kStages * shape::kPieces * 32 + lane;
  const auto load_weights = [&](std::int32_t block, int stage) {
    uint4* to = ring + stage * shape::kPieces * 32;
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
      const uint4* from = tile[r] + block * kWords * 64;
#pragma unroll
      for (int i = 0; i < 2 * kWords; ++i) {
        copy_if(to + (r * 2 * kWords + i) * 32, from + i * 32, block < last_block);
      }
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < shape::kStages - 1; ++i) {
    load_weights(first_block + i, i);
  }
  if (knows_weights) {
    follow();
  }
  const uint4* x[kTokenTiles];
#pragma unroll
  for (int n = 0; n < kTokenTiles; ++n) {
    // Rows that are not there are computed like the first, and not stored.
    const std::int32_t token = first_token + n * 8 + lane / 4;
    const std::int32_t some = token < job.num_rows ? token : first_token;
    const std::int64_t row = job.rows == nullptr ? some : job.rows[some];
    x[n] = reinterpret_cast<const uint4*>(job.x + row * args.x_stride) + lane % 4;
  }
  uint4 values[kTokenTiles][4];
  const auto load_values = [&](std::int32_t block) {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        values[n][q] = load_row(x[n] + block * 16 + q * 4);
      }
    }
  };
  load_values(first_block);

  float total[kTiles][kTokenTiles][4] = {};
  int stage = 0;
  std::int32_t scale_at = first_block / w.blocks_per_scale;
  std::int32_t blocks_left = w.blocks_per_scale - first_block % w.blocks_per_scale; // of the scale
  for (std::int32_t block = first_block; block < last_block; ++block) {
    wait_copies<shape::kStages - 2>();
    load_weights(block + shape::kStages - 1, stage == 0 ? shape::kStages - 1 : stage - 1);
    const uint4* from = ring + stage * shape::kPieces * 32;
    stage = stage == shape::kStages - 1 ? 0 : stage + 1;
    float factor[kTiles][2];
    std::uint32_t zeros[kTiles][2];
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        factor[r][h] = scale[r][h] == nullptr ? 1.0F : __ldg(scale[r][h] + scale_at);
        zeros[r][h] = 0x43084308; // 128 + 8
        if constexpr (Type == packed_type::i4) {
          if (zero[r][h] != nullptr) {
            zeros[r][h] = 0x43004300 | __ldg(zero[r][h] + scale_at) * 0x10001U;
          }
        }
      }
    }
    if (--blocks_left == 0) {
      ++scale_at;
      blocks_left = w.blocks_per_scale;
    }
    float part[kTiles][kTokenTiles][4] = {};
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
      uint4 words[2][kWords];
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        words[0][i] = from[(r * 2 * kWords + 2 * i) * 32];
        words[1][i] = from[(r * 2 * kWords + 2 * i + 1) * 32];
      }
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        std::uint32_t upper[4];
        std::uint32_t lower[4];
        expand_group<Type>(words[0], q, zeros[r][0], upper);
        expand_group<Type>(words[1], q, zeros[r][1], lower);
        const std::uint32_t even[4] = {upper[0], lower[0], upper[1], lower[1]};
        const std::uint32_t odd[4] = {upper[2], lower[2], upper[3], lower[3]};
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          multiply_tile(part[r][n], even, values[n][q].x, values[n][q].y);
          multiply_tile(part[r][n], odd, values[n][q].z, values[n][q].w);
        }
      }
    }
    load_values(min(block + 1, last_block - 1));
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          total[r][n][i] = fmaf(part[r][n][i], factor[r][i / 2], total[r][n][i]);
        }
      }
    }
  }

  // In the place of the weights.
  auto* sums = reinterpret_cast<float*>(memory);
  constexpr int kPitch = kTiles * kTileRows + 1;
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kTiles; ++r) {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = n * 8 + lane % 4 * 2 + i % 2;
        const int row = r * kTileRows + i / 2 * 8 + lane / 4;
        sums[warp * shape::kSums + token * kPitch + row] = total[r][n][i];
      }
    }
  }
  __syncthreads();
  const int first_warp = warp / splits * splits;
  const auto sum_of = [&](int token, int row) {
    const float* at = sums + first_warp * shape::kSums + token * kPitch + row;
    float sum = *at;
    for (int s = 1; s < splits; ++s) {
      sum += at[s * shape::kSums];
    }
    return sum;
  };
  for (int i = split * 32 + lane; i < kTokens * kOutRows; i += splits * 32) {
    const int token = i / kOutRows;
    const int row = i % kOutRows;
    float value = sum_of(token, row);
    if constexpr (kGated) {
      // Rounded as two results of their own would be.
      const float up = sum_of(token, row + kTileRows);
      value = gated(__bfloat162float(__float2bfloat16_rn(value)),
                    __bfloat162float(__float2bfloat16_rn(up)));
    }
    const std::int32_t out_row = first_token + token;
    const std::int32_t out_col = group * kOutRows + row - first_row % kTileRows;
    if (out_row < job.num_rows && out_col >= 0 && out_col < job_cols) {
      store_out(args, job, out_row, out_col, value);
    }
  }
}

/// The jobs of a list are shared out among blockIdx.y.
template <packed_type Type, int kTiles, int kTokenTiles, bool kGated>
__global__ void __launch_bounds__(kLinearWarps * 32) linear_few(const linear_args args) {
  extern __shared__ __align__(128) unsigned char memory[];
  auto num_jobs = static_cast<std::int32_t>(gridDim.y);
  if (args.jobs != nullptr) {
    follow(); // another kernel may have made the list
    num_jobs = args.num_used != nullptr ? *args.num_used : args.num_jobs;
  }
  for (auto index = static_cast<std::int32_t>(blockIdx.y); index < num_jobs; index += gridDim.y) {
    multiply_few<Type, kTiles, kTokenTiles, kGated>(args, index, memory);
    __syncthreads(); // the sums have been read
  }
}

template <packed_type Type, int kTiles, int kTokenTiles, bool kGated = false>
void launch_few(cudaStream_t stream, const linear_args& args) {
  const bool aligned = args.row_step % kTileRows == 0;
  const auto groups =
    ceil_div(args.job_cols + (aligned ? 0 : kTileRows), (kGated ? 1 : kTiles) * kTileRows);
  const auto num_jobs =
    args.num_used != nullptr ? std::min(args.num_jobs, kJobsAtOnce) : args.num_jobs;
  const dim3 grid(ceil_div(groups, kLinearWarps / num_splits(args.w.num_cols)), num_jobs,
                  ceil_div(args.max_rows, kTokenTiles * 8));
  constexpr int kBytes = few_shape<Type, kTiles, kTokenTiles>::kBytes;
  const auto kernel = linear_few<Type, kTiles, kTokenTiles, kGated>;
  // Of the device that is current; costs nothing once it is set.
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  launch(stream, grid, kLinearWarps * 32, kBytes, kernel, args);
}

/// The shape that suits the number of rows and of tiles; every shape gives the same bits.
template <packed_type Type>
void launch_typed(cudaStream_t stream, const linear_args& args, std::int32_t num_multiprocessors) {
  const auto num_groups = std::int64_t{ceil_div(args.job_cols, kTileRows)} * args.num_jobs
                          * num_splits(args.w.num_cols) / kLinearWarps;
  if (args.gated) {
    launch_few<Type, 2, 1, true>(stream, args);
  } else if (args.packed_x != nullptr) {
    launch_wide<Type>(stream, args, num_multiprocessors);
  } else if (args.max_rows > 32) {
    launch_many<Type, 2, 2>(stream, args);
  } else if (args.max_rows > 8) {
    launch_few<Type, 2, 4>(stream, args);
  } else if (num_groups < 4 * std::int64_t{num_multiprocessors}) {
    launch_few<Type, 1, 1>(stream, args);
  } else {
    launch_few<Type, 2, 1>(stream, args);
  }
}

} // namespace troupe::kernels::cuda
