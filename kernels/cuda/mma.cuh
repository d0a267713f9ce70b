#pragma once

// The matrix unit, and packed weights on their way into it.

#include "troupe/kernels/cuda/device.cuh"

namespace troupe::kernels::cuda {

/// c += a . b of one 16 x 8 tile over 16 columns (PTX ISA, "mma.m16n8k16 with .bf16 floating point
/// type": the lane holds rows lane / 4 and lane / 4 + 8 of a and c, column lane / 4 of b).
__device__ inline void multiply_tile(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                     std::uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline std::uint32_t as_bits(__nv_bfloat162 value) {
  std::uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

__device__ inline __nv_bfloat162 as_pair(std::uint32_t bits) {
  __nv_bfloat162 value;
  memcpy(&value, &bits, 4);
  return value;
}

/// Four e4m3 codes as two pairs of bf16. The bits of a code, moved to where bf16 has its exponent
/// and fraction, stand for the value times 2^-120, subnormals included; there is no NaN among them
/// (see launch_pack).
__device__ inline void expand_f8(std::uint32_t codes, std::uint32_t& low, std::uint32_t& high) {
  const __nv_bfloat162 factor = as_pair(0x7B807B80); // 2^120
  const std::uint32_t a = __byte_perm(codes, 0, 0x1404);
  const std::uint32_t b = __byte_perm(codes, 0, 0x3424);
  low = as_bits(__hmul2(as_pair((a & 0x80008000) | (a >> 4 & 0x07F007F0)), factor));
  high = as_bits(__hmul2(as_pair((b & 0x80008000) | (b >> 4 & 0x07F007F0)), factor));
}

/// Four signed bytes as two pairs: the lower seven bits are added to 128 by writing them into its
/// fraction, and 128 or, with the sign, 256 is taken away.
__device__ inline void expand_i8(std::uint32_t codes, std::uint32_t& low, std::uint32_t& high) {
  const std::uint32_t a = __byte_perm(codes, 0, 0x4140);
  const std::uint32_t b = __byte_perm(codes, 0, 0x4342);
  low = as_bits(
    __hsub2(as_pair((a & 0x007F007F) | 0x43004300), as_pair((a & 0x00800080) | 0x43004300)));
  high = as_bits(
    __hsub2(as_pair((b & 0x007F007F) | 0x43004300), as_pair((b & 0x00800080) | 0x43004300)));
}

/// Lane registers of one block of kBlockCols columns of one half tile, as stored.
template <packed_type Type>
inline constexpr int kWordsOfBlock = kBlockCols / chunk_cols(Type);

/// The eight columns that a lane holds of 32, group `q` of the block, as four pairs of bf16.
/// `zero` is 128 + the zero point, twice (i4 only).
template <packed_type Type>
__device__ inline void expand_group(const uint4 (&words)[kWordsOfBlock<Type>], int q,
                                    std::uint32_t zero, std::uint32_t (&out)[4]) {
  if constexpr (Type == packed_type::bf16) {
    out[0] = words[q].x;
    out[1] = words[q].y;
    out[2] = words[q].z;
    out[3] = words[q].w;
  } else if constexpr (Type == packed_type::i4) {
    const uint4& word = words[0];
    const std::uint32_t codes = q == 0 ? word.x : q == 1 ? word.y : q == 2 ? word.z : word.w;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const std::uint32_t pair = (codes >> (4 * p) & 0x000F000F) | 0x43004300;
      out[p] = as_bits(__hsub2(as_pair(pair), as_pair(zero)));
    }
  } else {
    const uint4& word = words[q / 2];
    const std::uint32_t first = q % 2 == 0 ? word.x : word.z;
    const std::uint32_t second = q % 2 == 0 ? word.y : word.w;
    if constexpr (Type == packed_type::f8) {
      expand_f8(first, out[0], out[1]);
      expand_f8(second, out[2], out[3]);
    } else {
      expand_i8(first, out[0], out[1]);
      expand_i8(second, out[2], out[3]);
    }
  }
}

/// 16 bytes of the device's memory that another kernel may have written.
__device__ inline uint4 load_row(const uint4* from) {
  uint4 value;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from));
  return value;
}

/// The job of a block of threads: one of several, or the only one moved along.
__device__ inline linear_job job_of(const linear_args& args, unsigned index) {
  if (args.jobs != nullptr) {
    return args.jobs[index];
  }
  if (index == 1 && args.other.data != nullptr) {
    return args.other;
  }
  linear_job job = args.job;
  job.x += index * args.x_step;
  job.out = static_cast<char*>(job.out) + index * args.out_step * (args.float_out ? 4 : 2);
  return job;
}

__device__ inline void store_out(const linear_args& args, const linear_job& job, std::int32_t row,
                                 std::int32_t col, float value) {
  const auto at = row * (job.out_stride > 0 ? job.out_stride : args.out_stride) + col;
  if (args.float_out) {
    static_cast<float*>(job.out)[at] = value;
  } else {
    static_cast<bf16*>(job.out)[at] = __float2bfloat16_rn(value);
  }
}

} // namespace troupe::kernels::cuda
