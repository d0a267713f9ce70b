#pragma once

// Products of few rows with a packed weight: the weight is read once, straight into registers.
//
// What a result is made of does not depend on the number of rows: the columns are cut into
// num_splits(num_cols) parts; within a part, the matrix unit sums blocks of 128 columns, each of
// which is scaled and added in float32, in order; the parts are added in order. The kernel for many
// rows (linear_many.cuh) does the same in another shape.

#include "troupe/kernels/cuda/linear_many.cuh"
#include "troupe/kernels/cuda/linear_wide.cuh"

namespace troupe::kernels::cuda {

inline constexpr int kLinearWarps = 8;

template <packed_type Type, int kTiles>
struct weight_block {
  uint4 words[kTiles][2][kWordsOfBlock<Type>];
};

/// A warp sums one part of kTiles tiles of rows of the weight for 8 * kTokenTiles rows of x.
/// kGated: of two tiles, the second is that of the second weight, and both make one tile of the
/// result.
template <packed_type Type, int kTiles, int kTokenTiles, bool kGated>
__global__ void __launch_bounds__(kLinearWarps * 32) linear_few(const linear_args args) {
  constexpr int kWords = kWordsOfBlock<Type>;
  static_assert(!kGated || kTiles == 2);
  constexpr int kRows = kTiles * kTileRows;
  constexpr int kOutTiles = kGated ? 1 : kTiles;
  constexpr int kOutRows = kOutTiles * kTileRows;
  constexpr int kTokens = kTokenTiles * 8;
  __shared__ float sums[kLinearWarps][kTokens][kRows + 1];

  const linear_job job = job_of(args, blockIdx.y);
  const std::int32_t first_token = blockIdx.z * kTokens;
  if (first_token >= job.num_rows) {
    return;
  }
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
  const std::int32_t first_row = blockIdx.y * args.row_step;
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
    const std::int32_t index =
      min(first_tile + group * kOutTiles + (kGated ? 0 : r), num_tiles - 1);
    const bool is_second = kGated && r == 1;
    const void* data = is_second ? job.second_data : job.data;
    const float* scales = is_second ? job.second_scales : job.scales;
    const std::uint8_t* zeros = is_second ? job.second_zeros : job.zeros;
    tile[r] = static_cast<const uint4*>(data) + std::int64_t{index} * w.num_chunks * 64 + lane;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const std::int32_t row = min(index * kTileRows + h * 8 + lane / 4, weight_rows - 1);
      const auto at = std::int64_t{row / w.block_rows} * w.num_scale_cols;
      scale[r][h] = scales == nullptr ? nullptr : scales + at;
      zero[r][h] = zeros == nullptr ? nullptr : zeros + at;
    }
  }
  const uint4* x[kTokenTiles];
#pragma unroll
  for (int n = 0; n < kTokenTiles; ++n) {
    const std::int32_t token = first_token + n * 8 + lane / 4;
    x[n] = nullptr;
    if (token < job.num_rows) {
      const std::int64_t row = job.rows == nullptr ? token : job.rows[token];
      x[n] = reinterpret_cast<const uint4*>(job.x + row * args.x_stride) + lane % 4;
    }
  }

  const auto load_weights = [&](std::int32_t block, weight_block<Type, kTiles>& to) {
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const std::int32_t chunk = block * kWords + i;
        const bool inside = block < last_block && chunk < w.num_chunks;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          to.words[r][h][i] =
            inside ? load_once(tile[r] + chunk * 64 + h * 32) : make_uint4(0, 0, 0, 0);
        }
      }
    }
  };

  float total[kTiles][kTokenTiles][4] = {};
  weight_block<Type, kTiles> next;
  load_weights(first_block, next);
  for (std::int32_t block = first_block; block < last_block; ++block) {
    const weight_block<Type, kTiles> now = next;
    uint4 values[kTokenTiles][4];
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const std::int32_t at = block * 4 + q;
        const bool inside = x[n] != nullptr && at * 32 < w.num_chunks * chunk_cols(Type);
        values[n][q] = inside ? __ldg(x[n] + at * 4) : make_uint4(0, 0, 0, 0);
      }
    }
    load_weights(block + 1, next);
    float part[kTiles][kTokenTiles][4] = {};
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
      std::uint32_t zeros[2] = {0x43084308, 0x43084308}; // 128 + 8
      if constexpr (Type == packed_type::i4) {
        if (zero[r][0] != nullptr) {
          zeros[0] = 0x43004300 | zero[r][0][block / w.blocks_per_scale] * 0x10001U;
          zeros[1] = 0x43004300 | zero[r][1][block / w.blocks_per_scale] * 0x10001U;
        }
      }
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        std::uint32_t upper[4];
        std::uint32_t lower[4];
        expand_group<Type>(now.words[r][0], q, zeros[0], upper);
        expand_group<Type>(now.words[r][1], q, zeros[1], lower);
        const std::uint32_t even[4] = {upper[0], lower[0], upper[1], lower[1]};
        const std::uint32_t odd[4] = {upper[2], lower[2], upper[3], lower[3]};
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          multiply_tile(part[r][n], even, values[n][q].x, values[n][q].y);
          multiply_tile(part[r][n], odd, values[n][q].z, values[n][q].w);
        }
      }
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
  }

#pragma unroll
  for (int r = 0; r < kTiles; ++r) {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[warp][n * 8 + lane % 4 * 2 + i % 2][r * kTileRows + i / 2 * 8 + lane / 4] =
          total[r][n][i];
      }
    }
  }
  __syncthreads();
  const int first_warp = warp / splits * splits;
  const auto sum_of = [&](int token, int row) {
    float sum = sums[first_warp][token][row];
    for (int s = 1; s < splits; ++s) {
      sum += sums[first_warp + s][token][row];
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

template <packed_type Type, int kTiles, int kTokenTiles, bool kGated = false>
void launch_few(cudaStream_t stream, const linear_args& args) {
  const bool aligned = args.row_step % kTileRows == 0;
  const auto groups =
    ceil_div(args.job_cols + (aligned ? 0 : kTileRows), (kGated ? 1 : kTiles) * kTileRows);
  const dim3 grid(ceil_div(groups, kLinearWarps / num_splits(args.w.num_cols)), args.num_jobs,
                  ceil_div(args.max_rows, kTokenTiles * 8));
  linear_few<Type, kTiles, kTokenTiles, kGated><<<grid, kLinearWarps * 32, 0, stream>>>(args);
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
    launch_few<Type, 1, 4>(stream, args);
  } else if (num_groups < 4 * std::int64_t{num_multiprocessors}) {
    launch_few<Type, 1, 1>(stream, args);
  } else {
    launch_few<Type, 2, 1>(stream, args);
  }
}

} // namespace troupe::kernels::cuda
