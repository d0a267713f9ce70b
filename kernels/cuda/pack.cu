#include "troupe/kernels/cuda/device.cuh"
#include "troupe/kernels/narrow_weight.hpp"

namespace troupe::kernels::cuda {

namespace {

constexpr int kThreads = 256;

/// An element before scaling. Checkpoints align nothing, but what is copied to the device is.
__device__ float raw_value(const weight_matrix& w, std::int32_t row, std::int32_t col) {
  const auto index = std::int64_t{row} * w.num_cols + col;
  switch (w.type) {
  case element_type::f32: return static_cast<const float*>(w.data)[index];
  case element_type::bf16: return __bfloat162float(static_cast<const bf16*>(w.data)[index]);
  case element_type::f16: return __half2float(static_cast<const __half*>(w.data)[index]);
  case element_type::f8_e4m3:
    return static_cast<float>(static_cast<const __nv_fp8_e4m3*>(w.data)[index]);
  case element_type::i8: return static_cast<const std::int8_t*>(w.data)[index];
  case element_type::i4: {
    const auto* bytes = static_cast<const std::uint8_t*>(w.data);
    const auto byte = bytes[std::int64_t{row} * ((w.num_cols + 1) / 2) + col / 2];
    return static_cast<float>(col % 2 == 0 ? byte & 15 : byte >> 4);
  }
  }
  return 0.0F;
}

__device__ float scaled_value(const weight_matrix& w, std::int32_t row, std::int32_t col) {
  float value = raw_value(w, row, col);
  const auto across = (w.num_cols + w.block_cols - 1) / w.block_cols;
  const auto index = std::int64_t{row / w.block_rows} * across + col / w.block_cols;
  if (w.type == element_type::i4) {
    value -= w.zeros == nullptr ? 8.0F : static_cast<float>(w.zeros[index]);
  }
  return w.scales == nullptr ? value : value * w.scales[index];
}

template <class T>
__global__ void expand(weight_matrix w, T* out) {
  const auto count = std::int64_t{w.num_rows} * w.num_cols;
  for (auto i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += std::int64_t{gridDim.x} * blockDim.x) {
    store(out + i, scaled_value(w, static_cast<std::int32_t>(i / w.num_cols),
                                static_cast<std::int32_t>(i % w.num_cols)));
  }
}

/// The code of an element as it is stored or, of wider elements, as the scale of its group has it.
__device__ std::uint8_t byte_of(const weight_matrix& w, std::int32_t row, std::int32_t col) {
  if (row >= w.num_rows || col >= w.num_cols) {
    return 0;
  }
  if (w.type == element_type::f8_e4m3 || w.type == element_type::i8) {
    return static_cast<const std::uint8_t*>(w.data)[std::int64_t{row} * w.num_cols + col];
  }
  const auto group = std::int64_t{row} * ceil_div(w.num_cols, kNarrowGroup) + col / kNarrowGroup;
  return static_cast<std::uint8_t>(narrow_code(raw_value(w, row, col), w.scales[group]));
}

__global__ void narrow(weight_matrix w, std::int64_t out_stride, std::int8_t* out) {
  const auto count = std::int64_t{w.num_rows} * w.num_cols;
  for (auto i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += std::int64_t{gridDim.x} * blockDim.x) {
    const auto row = static_cast<std::int32_t>(i / w.num_cols);
    const auto col = static_cast<std::int32_t>(i % w.num_cols);
    out[row * out_stride + col] = static_cast<std::int8_t>(byte_of(w, row, col));
  }
}

/// A warp makes the scale of one group.
__global__ void find_scales(weight_matrix w, float* scales) {
  const std::int32_t num_groups = ceil_div(w.num_cols, kNarrowGroup);
  const auto index = std::int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
  if (index >= std::int64_t{w.num_rows} * num_groups) {
    return;
  }
  const auto row = static_cast<std::int32_t>(index / num_groups);
  const std::int32_t first = static_cast<std::int32_t>(index % num_groups) * kNarrowGroup;
  const std::int32_t last = min(w.num_cols, first + kNarrowGroup);
  std::uint32_t largest = 0;
  for (std::int32_t col = first + static_cast<std::int32_t>(threadIdx.x % 32); col < last;
       col += 32) {
    largest = max(largest, magnitude_bits(raw_value(w, row, col)));
  }
  largest = __reduce_max_sync(kAllLanes, largest);
  if (threadIdx.x % 32 == 0) {
    scales[index] = narrow_scale(largest);
  }
}

/// 16 bytes of one lane (see packed_matrix).
__global__ void pack(weight_matrix w, packed_matrix to, std::int64_t count, std::int32_t* found) {
  const auto i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) {
    return;
  }
  const auto lane = static_cast<std::int32_t>(i % 32);
  const auto half = static_cast<std::int32_t>(i / 32 % 2);
  const auto chunk = static_cast<std::int32_t>(i / 64 % to.num_chunks);
  const auto tile = static_cast<std::int32_t>(i / 64 / to.num_chunks);
  const std::int32_t row = tile * kTileRows + half * 8 + lane / 4;
  const std::int32_t col = chunk * chunk_cols(to.type) + lane % 4 * 8;
  union {
    uint4 words;
    bf16 halves[8];
    std::uint8_t bytes[16];
    std::uint32_t fours[4];
  } out;
  out.words = {0, 0, 0, 0};
  switch (to.type) {
  case packed_type::bf16:
    for (int j = 0; j < 8; ++j) {
      const bool inside = row < w.num_rows && col + j < w.num_cols;
      out.halves[j] = __float2bfloat16_rn(inside ? scaled_value(w, row, col + j) : 0.0F);
    }
    break;
  case packed_type::f8:
  case packed_type::i8:
    for (int j = 0; j < 16; ++j) {
      out.bytes[j] = byte_of(w, row, col + j / 8 * 32 + j % 8);
      if (to.type == packed_type::f8 && (out.bytes[j] & 0x7F) == 0x7F) {
        *found = 1;
      }
    }
    break;
  case packed_type::i4:
    // Column 2p of eight is nibble p of its word and column 2p + 1 nibble p + 4: one shift and one
    // mask give a pair.
    for (int word = 0; word < 4; ++word) {
      for (int j = 0; j < 8; ++j) {
        const std::int32_t at = col + word * 32 + j;
        const bool inside = row < w.num_rows && at < w.num_cols;
        const auto code = inside ? static_cast<std::uint32_t>(raw_value(w, row, at)) : 0U;
        out.fours[word] |= code << (4 * (j / 2 + j % 2 * 4));
      }
    }
    break;
  }
  static_cast<uint4*>(const_cast<void*>(to.data))[i] = out.words;
}

/// A thread moves 32 columns of a row: four pieces of 16 bytes, whose pairs of columns change
/// places so that the matrix unit meets them in the order in which a lane holds those of the
/// weight.
__global__ void pack_rows(rows_of_bf16 x, const std::int32_t* slots, std::int32_t num_groups,
                          std::int64_t x_step, std::int32_t num_cols, std::int32_t num_col_groups,
                          uint4* out) {
  follow();
  const std::int32_t i = blockIdx.y * kThreads + threadIdx.x;
  if (i >= 8 * num_col_groups) {
    return;
  }
  const std::int32_t group = blockIdx.x;
  const std::int32_t job = blockIdx.z;
  const std::int32_t row = i / num_col_groups;
  const std::int32_t col_group = i % num_col_groups;
  const std::int32_t slot = group * 8 + row;
  const std::int32_t source = slots != nullptr ? slots[slot] : slot < x.num_rows ? slot : -1;
  union {
    uint4 words[4];
    std::uint32_t pairs[4][4];
    bf16 values[32];
  } in;
  for (auto& words : in.words) {
    words = {0, 0, 0, 0};
  }
  if (source >= 0) {
    const std::int32_t col = col_group * 32;
    const bf16* from = x.data + source * x.stride + job * x_step + col;
    if (col + 32 <= num_cols && reinterpret_cast<std::uintptr_t>(from) % 16 == 0) {
      for (int j = 0; j < 4; ++j) {
        in.words[j] = reinterpret_cast<const uint4*>(from)[j];
      }
    } else {
      for (int j = 0; j < 32 && col + j < num_cols; ++j) {
        in.values[j] = from[j];
      }
    }
  }
  const std::int64_t block = std::int64_t{job} * (num_col_groups / 2) + col_group / 2;
  uint4* to = out + ((block * num_groups + group) * 8 + row) * 8;
  for (int piece = 0; piece < 4; ++piece) {
    to[(col_group % 2 * 4 + piece) ^ row] = {in.pairs[0][piece], in.pairs[1][piece],
                                             in.pairs[2][piece], in.pairs[3][piece]};
  }
}

} // namespace

void launch_pack_rows(cudaStream_t stream, const rows_of_bf16& x, const std::int32_t* slots,
                      std::int32_t num_groups, std::int32_t num_jobs, std::int64_t x_step,
                      std::int32_t num_cols, void* out) {
  const auto num_col_groups = ceil_div(num_cols, kBlockCols) * (kBlockCols / 32);
  const dim3 grid(num_groups, ceil_div(8 * num_col_groups, kThreads), num_jobs);
  launch(stream, grid, kThreads, 0, pack_rows, x, slots, num_groups, x_step, num_cols,
         num_col_groups, static_cast<uint4*>(out));
}

void launch_pack(cudaStream_t stream, const weight_matrix& from, const packed_matrix& to,
                 std::int32_t* found) {
  const auto count = packed_bytes(to.num_rows, to.num_chunks) / 16;
  const auto blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  pack<<<blocks, kThreads, 0, stream>>>(from, to, count, found);
}

void launch_find_scales(cudaStream_t stream, const weight_matrix& from, float* scales) {
  const auto count = std::int64_t{from.num_rows} * ceil_div(from.num_cols, kNarrowGroup);
  constexpr int kWarps = kThreads / 32;
  const auto blocks = static_cast<unsigned>((count + kWarps - 1) / kWarps);
  find_scales<<<blocks, kThreads, 0, stream>>>(from, scales);
}

template <class T>
void launch_expand(cudaStream_t stream, const weight_matrix& from, T* out) {
  expand<<<1024, kThreads, 0, stream>>>(from, out);
}

template void launch_expand(cudaStream_t, const weight_matrix&, bf16*);
template void launch_expand(cudaStream_t, const weight_matrix&, float*);

void launch_narrow(cudaStream_t stream, const weight_matrix& from, std::int64_t out_stride,
                   std::int8_t* out) {
  narrow<<<1024, kThreads, 0, stream>>>(from, out_stride, out);
}

} // namespace troupe::kernels::cuda
