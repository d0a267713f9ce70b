#include "troupe/kernels/cuda/device.cuh"
#include "troupe/kernels/cuda/linear_exact.hpp"

#include <algorithm>

namespace troupe::kernels::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Pieces of weights as they are stored.

constexpr int words_of_piece(element_type type) {
  switch (type) {
  case element_type::f32: return 8;
  case element_type::bf16:
  case element_type::f16: return 4;
  case element_type::i4: return 1;
  default: return 2;
  }
}

template <element_type kType>
struct raw_piece {
  std::uint32_t words[words_of_piece(kType)];
};

template <element_type kType>
__device__ raw_piece<kType> read_raw(const std::byte* row, std::int32_t piece) {
  constexpr int kWords = words_of_piece(kType);
  raw_piece<kType> raw;
  if constexpr (kWords == 1) {
    raw.words[0] = __ldg(reinterpret_cast<const std::uint32_t*>(row) + piece);
  } else if constexpr (kWords == 2) {
    const uint2 two = __ldg(reinterpret_cast<const uint2*>(row) + piece);
    raw.words[0] = two.x;
    raw.words[1] = two.y;
  } else {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 four = __ldg(reinterpret_cast<const uint4*>(row) + (piece * kWords + i) / 4);
      raw.words[i] = four.x;
      raw.words[i + 1] = four.y;
      raw.words[i + 2] = four.z;
      raw.words[i + 3] = four.w;
    }
  }
  return raw;
}

/// A whole number below 2^23 as a float: 2^23 has the units of its fraction.
__device__ float small_number(std::uint32_t number) {
  return __uint_as_float(0x4B000000U | number) - 8388608.0F;
}

/// The elements before scaling.
template <element_type kType>
__device__ void take_apart(const raw_piece<kType>& raw, float (&values)[8]) {
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    if constexpr (kType == element_type::f32) {
      values[j] = __uint_as_float(raw.words[j]);
      values[j + 1] = __uint_as_float(raw.words[j + 1]);
    } else if constexpr (kType == element_type::bf16) {
      values[j] = __uint_as_float(raw.words[j / 2] << 16);
      values[j + 1] = __uint_as_float(raw.words[j / 2] & 0xFFFF0000U);
    } else if constexpr (kType == element_type::f16) {
      __half2 pair;
      memcpy(&pair, &raw.words[j / 2], 4);
      const float2 both = __half22float2(pair);
      values[j] = both.x;
      values[j + 1] = both.y;
    } else if constexpr (kType == element_type::i4) {
      values[j] = small_number(raw.words[0] >> (4 * j) & 15U);
      values[j + 1] = small_number(raw.words[0] >> (4 * j + 4) & 15U);
    } else {
      const std::uint32_t pair = raw.words[j / 4] >> (8 * (j % 4)) & 0xFFFFU;
      if constexpr (kType == element_type::i8) {
        values[j] = small_number((pair & 0xFFU) ^ 0x80U) - 128.0F;
        values[j + 1] = small_number(pair >> 8 ^ 0x80U) - 128.0F;
      } else {
        const __half2 halves =
          __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3);
        const float2 both = __half22float2(halves);
        values[j] = both.x;
        values[j + 1] = both.y;
      }
    }
  }
}

/// Whether elements are nothing without a scale.
constexpr bool is_narrow(element_type type) {
  return type == element_type::f8_e4m3 || type == element_type::i8 || type == element_type::i4;
}

// What stands for scales and zeros that a weight does not have.
__device__ const float kNoScale = 1.0F;
__device__ const std::uint8_t kNoZero = 8;

/// A row of a weight. The scale of block i is scales[i & scale_mask], likewise the zero.
struct weight_row {
  const std::byte* data;
  const float* scales;
  const std::uint8_t* zeros;
  std::int32_t scale_mask;
  std::int32_t zero_mask;
};

__device__ weight_row row_of(const exact_weight& w, std::int32_t row) {
  const std::int64_t first = std::int64_t{row / w.block_rows} * w.num_scale_cols;
  const bool has_scales = w.scales != nullptr;
  const bool has_zeros = w.zeros != nullptr;
  return {static_cast<const std::byte*>(w.data) + row * w.stride,
          has_scales ? w.scales + first : &kNoScale, has_zeros ? w.zeros + first : &kNoZero,
          has_scales ? -1 : 0, has_zeros ? -1 : 0};
}

template <element_type kType>
__device__ float scaled(float value, const weight_row& row, std::int32_t block) {
  if constexpr (kType == element_type::i4) {
    value -= small_number(__ldg(row.zeros + (block & row.zero_mask)));
  }
  return __fmul_rn(value, __ldg(row.scales + (block & row.scale_mask)));
}

/// Whether multiply_few knows the weight.
bool is_simple(const exact_weight& w) {
  return w.block_shift >= 0 && (is_narrow(w.type) || w.scales == nullptr);
}

/// The elements of a whole piece of a simple weight.
template <element_type kType>
__device__ void expand(const exact_weight& w, const weight_row& row, std::int32_t piece,
                       const raw_piece<kType>& raw, float (&values)[8]) {
  take_apart<kType>(raw, values);
  if constexpr (is_narrow(kType)) {
    const std::int32_t block = piece * kExactPiece >> w.block_shift;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      values[j] = scaled<kType>(values[j], row, block);
    }
  }
}

/// Those of any piece of any weight, with zeros behind the last column.
template <element_type kType>
__device__ void read_any_piece(const exact_weight& w, const weight_row& row, std::int32_t piece,
                               float (&values)[8]) {
  take_apart<kType>(read_raw<kType>(row.data, piece), values);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const std::int32_t col = piece * kExactPiece + j;
    const std::int32_t last = min(col, w.num_cols - 1);
    const std::int32_t block = w.block_shift >= 0 ? last >> w.block_shift : last / w.block_cols;
    values[j] = col < w.num_cols ? scaled<kType>(values[j], row, block) : 0.0F;
  }
}

/// The job of this block. Jobs are neighbours in a grid: those that multiply with the same expert
/// then read the same weights at about the same time.
__device__ exact_job job_of(const exact_args& args) {
  const auto i = static_cast<std::int32_t>(blockIdx.x);
  if (args.jobs != nullptr) {
    return args.jobs[i];
  }
  exact_job job = args.job;
  if (args.chosen != nullptr) {
    job.w = args.experts[args.chosen[i] * args.expert_step];
    job.x += i / args.jobs_of_row * args.x_stride;
    job.out += i * args.out_stride;
  } else if (args.num_jobs > 1) {
    job.w.data = static_cast<const std::byte*>(job.w.data) + i * args.row_step * job.w.stride;
    job.w.num_rows = args.row_step;
    job.x += i * args.x_step;
    job.out += i * args.out_step;
  }
  return job;
}

/// A warp makes kRows x kCols elements of a result; a lane has a part of each sum. Rows of x begin
/// at multiples of 16 bytes, and weights are simple.
template <element_type kType, int kRows, int kCols>
__global__ void __launch_bounds__(kThreads) multiply_few(const __grid_constant__ exact_args args) {
  constexpr int kSums = kRows * kCols;
  static_assert(kSums <= 32);
  __shared__ float sums[kWarps][kSums][kExactParts + 1];
  follow();
  const exact_job job = job_of(args);
  const exact_weight& w = job.w;
  const auto lane = static_cast<std::int32_t>(threadIdx.x % 32);
  const auto warp = static_cast<std::int32_t>(threadIdx.x / 32);
  const auto first_row = static_cast<std::int32_t>(blockIdx.y) * kRows;
  const std::int32_t first_col = (static_cast<std::int32_t>(blockIdx.z) * kWarps + warp) * kCols;
  if (first_row >= job.num_rows || first_col >= w.num_rows) {
    return;
  }
  const float* from[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const std::int32_t row = min(first_row + r, job.num_rows - 1);
    from[r] = job.x + (job.rows != nullptr ? job.rows[row] : row) * args.x_stride;
  }
  weight_row weights[kCols];
#pragma unroll
  for (int c = 0; c < kCols; ++c) {
    weights[c] = row_of(w, min(first_col + c, w.num_rows - 1));
  }
  float parts[kRows][kCols] = {};
  const std::int32_t num_whole = w.num_cols / kExactPiece;
  // So many pieces of a column are on their way at a time.
  constexpr int kAhead = kRows == 1 ? 8 / kCols : 2;
  for (std::int32_t first = lane; first < num_whole; first += kAhead * kExactParts) {
    raw_piece<kType> raw[kAhead][kCols];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
#pragma unroll
      for (int c = 0; c < kCols; ++c) {
        const std::int32_t piece = min(first + i * kExactParts, num_whole - 1);
        raw[i][c] = read_raw<kType>(weights[c].data, piece);
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const std::int32_t piece = first + i * kExactParts;
      if (piece >= num_whole) {
        break;
      }
      float values[kCols][8];
#pragma unroll
      for (int c = 0; c < kCols; ++c) {
        expand<kType>(w, weights[c], piece, raw[i][c], values[c]);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const auto* at = reinterpret_cast<const float4*>(from[r]) + 2 * piece;
        const float4 low = at[0];
        const float4 high = at[1];
        const float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int c = 0; c < kCols; ++c) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            parts[r][c] = fmaf(x[j], values[c][j], parts[r][c]);
          }
        }
      }
    }
  }
  if (w.num_cols % kExactPiece != 0 && num_whole % kExactParts == lane) {
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      float values[8];
      read_any_piece<kType>(w, weights[c], num_whole, values);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const std::int32_t col = num_whole * kExactPiece + j;
          parts[r][c] = fmaf(col < w.num_cols ? from[r][col] : 0.0F, values[j], parts[r][c]);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      sums[warp][r * kCols + c][lane] = parts[r][c];
    }
  }
  __syncwarp();
  const std::int32_t row = first_row + lane / kCols;
  const std::int32_t col = first_col + lane % kCols;
  if (lane < kSums && row < job.num_rows && col < w.num_rows) {
    const std::int32_t num_parts = min(ceil_div(w.num_cols, kExactPiece), kExactParts);
    float total = 0.0F;
    for (std::int32_t part = 0; part < num_parts; ++part) {
      total += sums[warp][lane][part];
    }
    job.out[row * args.out_stride + col] = total;
  }
}

/// The pieces in the order in which a block of multiply_many meets them: part after part.
struct piece_order {
  std::int32_t num_pieces;

  __device__ std::int32_t length(std::int32_t part) const {
    return num_pieces / kExactParts + (part < num_pieces % kExactParts ? 1 : 0);
  }

  __device__ std::int32_t operator()(std::int32_t at) const {
    const std::int32_t few = num_pieces / kExactParts;
    const std::int32_t num_longer = num_pieces % kExactParts;
    const std::int32_t in_longer = num_longer * (few + 1);
    if (at < in_longer) {
      return at / (few + 1) + at % (few + 1) * kExactParts;
    }
    return num_longer + (at - in_longer) / few + (at - in_longer) % few * kExactParts;
  }
};

constexpr int kTile = 64;         ///< rows and columns of a result that a block makes
constexpr int kPieces = 4;        ///< that are in shared memory at a time
constexpr int kWidth = kTile + 4; ///< so that rows are on other banks
constexpr int kOwn = 4;           ///< rows and columns of a thread

/// A block makes kTile x kTile elements of a result, pieces of both operands coming by way of
/// shared memory. For many rows, and for those that begin anywhere.
template <element_type kType>
__global__ void __launch_bounds__(kThreads) multiply_many(const __grid_constant__ exact_args args) {
  __shared__ alignas(16) float xs[kPieces * kExactPiece][kWidth];
  __shared__ alignas(16) float ws[kPieces * kExactPiece][kWidth];
  follow();
  const exact_job job = job_of(args);
  const exact_weight& w = job.w;
  const auto first_row = static_cast<std::int32_t>(blockIdx.y) * kTile;
  const auto first_col = static_cast<std::int32_t>(blockIdx.z) * kTile;
  if (first_row >= job.num_rows || first_col >= w.num_rows) {
    return;
  }
  const auto thread = static_cast<std::int32_t>(threadIdx.x);

  // What a thread brings: a piece of one row of x and of one of the weight.
  const std::int32_t brought = thread % kTile;
  const std::int32_t slot = thread / kTile;
  const std::int32_t row = first_row + brought;
  const bool has_row = row < job.num_rows;
  const float* const from =
    !has_row ? nullptr : job.x + (job.rows != nullptr ? job.rows[row] : row) * args.x_stride;
  const bool has_col = first_col + brought < w.num_rows;
  const weight_row weights = row_of(w, has_col ? first_col + brought : 0);
  const piece_order order{ceil_div(w.num_cols, kExactPiece)};
  alignas(16) float x[8];
  float values[8];
  const bool is_aligned = reinterpret_cast<std::uintptr_t>(from) % 16 == 0;
  const auto bring = [&](std::int32_t first) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      x[j] = values[j] = 0.0F;
    }
    if (first + slot >= order.num_pieces) {
      return;
    }
    const std::int32_t piece = order(first + slot);
    const std::int32_t col = piece * kExactPiece;
    if (has_row && is_aligned && col + kExactPiece <= w.num_cols) {
      *reinterpret_cast<float4*>(x) = *reinterpret_cast<const float4*>(from + col);
      *reinterpret_cast<float4*>(x + 4) = *reinterpret_cast<const float4*>(from + col + 4);
    } else if (has_row) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        x[j] = col + j < w.num_cols ? from[col + j] : 0.0F;
      }
    }
    if (has_col) {
      read_any_piece<kType>(w, weights, piece, values);
    }
  };

  // What it computes.
  const std::int32_t own_row = thread / (kTile / kOwn) * kOwn;
  const std::int32_t own_col = thread % (kTile / kOwn) * kOwn;
  float parts[kOwn][kOwn] = {};
  float totals[kOwn][kOwn] = {};
  std::int32_t part = 0;
  std::int32_t left = order.length(0);
  bring(0);
  for (std::int32_t first = 0; first < order.num_pieces; first += kPieces) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      xs[slot * kExactPiece + j][brought] = x[j];
      ws[slot * kExactPiece + j][brought] = values[j];
    }
    __syncthreads();
    if (first + kPieces < order.num_pieces) {
      bring(first + kPieces);
    }
    for (std::int32_t at = 0; at < min(kPieces, order.num_pieces - first); ++at) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const auto& a = *reinterpret_cast<const float4*>(&xs[at * kExactPiece + j][own_row]);
        const auto& b = *reinterpret_cast<const float4*>(&ws[at * kExactPiece + j][own_col]);
        const float as[kOwn] = {a.x, a.y, a.z, a.w};
        const float bs[kOwn] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int r = 0; r < kOwn; ++r) {
#pragma unroll
          for (int c = 0; c < kOwn; ++c) {
            parts[r][c] = fmaf(as[r], bs[c], parts[r][c]);
          }
        }
      }
      if (--left > 0) {
        continue;
      }
      left = order.length(++part);
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
#pragma unroll
        for (int c = 0; c < kOwn; ++c) {
          totals[r][c] += parts[r][c];
          parts[r][c] = 0.0F;
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      const std::int32_t m = first_row + own_row + r;
      const std::int32_t n = first_col + own_col + c;
      if (m < job.num_rows && n < w.num_rows) {
        job.out[m * args.out_stride + n] = totals[r][c];
      }
    }
  }
}

template <element_type kType, int kRows, int kCols>
void launch_few(cudaStream_t stream, const exact_args& args) {
  const dim3 grid(args.num_jobs, ceil_div(args.max_rows, kRows),
                  ceil_div(args.max_cols, kWarps * kCols));
  launch(stream, grid, kThreads, 0, multiply_few<kType, kRows, kCols>, args);
}

template <element_type kType>
void launch_type(cudaStream_t stream, const exact_args& args) {
  const bool is_aligned = reinterpret_cast<std::uintptr_t>(args.job.x) % 16 == 0
                          && (args.x_stride | args.x_step) % 4 == 0;
  constexpr std::int32_t kMostCols = 65535 * kWarps; // of a grid
  if (!is_aligned || !is_simple(args.job.w) || args.max_rows > kFewExactRows
      || args.max_cols > kMostCols) {
    const dim3 grid(args.num_jobs, ceil_div(args.max_rows, kTile), ceil_div(args.max_cols, kTile));
    launch(stream, grid, kThreads, 0, multiply_many<kType>, args);
  } else if (args.max_rows == 1) {
    // A warp with several columns reads its row of x seldom, if there is enough work for all warps.
    const auto num_cols = std::int64_t{args.max_cols} * args.num_jobs;
    if (num_cols >= 16384) {
      launch_few<kType, 1, 4>(stream, args);
    } else if (num_cols >= 4096) {
      launch_few<kType, 1, 2>(stream, args);
    } else {
      launch_few<kType, 1, 1>(stream, args);
    }
  } else if (args.max_rows <= 4) {
    launch_few<kType, 4, 4>(stream, args);
  } else {
    launch_few<kType, 8, 4>(stream, args);
  }
}

} // namespace

std::int64_t exact_stride(element_type type, std::int32_t num_cols) {
  const auto pieces = std::int64_t{ceil_div(num_cols, kExactPiece)};
  return pieces * static_cast<std::int64_t>(row_bytes(type, kExactPiece));
}

std::int32_t exact_block_shift(std::int32_t num_cols, std::int32_t block_cols) {
  if (block_cols >= num_cols) {
    return 31;
  }
  std::int32_t shift = 3;
  while (shift < 30 && (1 << shift) < block_cols) {
    ++shift;
  }
  return (1 << shift) == block_cols ? shift : -1;
}

void launch_linear_exact(cudaStream_t stream, const exact_args& args) {
  switch (args.job.w.type) {
  case element_type::f32: return launch_type<element_type::f32>(stream, args);
  case element_type::bf16: return launch_type<element_type::bf16>(stream, args);
  case element_type::f16: return launch_type<element_type::f16>(stream, args);
  case element_type::f8_e4m3: return launch_type<element_type::f8_e4m3>(stream, args);
  case element_type::i8: return launch_type<element_type::i8>(stream, args);
  case element_type::i4: return launch_type<element_type::i4>(stream, args);
  }
}

} // namespace troupe::kernels::cuda
