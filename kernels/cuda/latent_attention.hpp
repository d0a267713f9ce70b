#pragma once

#include "troupe/kernels/cuda/kernels.hpp"

namespace troupe::kernels::cuda {

/// The widths of DeepSeek-V2, V3 and R1, which the matrix unit serves.
inline constexpr std::int32_t kWideLatent = 512;
inline constexpr std::int32_t kWideRope = 64;

void launch_wide_latent_attention(cudaStream_t stream, const rows_of_bf16& q_latent,
                                  const rows_of_bf16& q_rope, std::int32_t q_rope_head_stride,
                                  std::int32_t num_heads, float scale, const device_batch& batch,
                                  const device_pages& pages, const rows_of_bf16& out);

/// The same on Hopper, with other bits.
void launch_hopper_latent_attention(cudaStream_t stream, const rows_of_bf16& q_latent,
                                    const rows_of_bf16& q_rope, std::int32_t q_rope_head_stride,
                                    std::int32_t num_heads, float scale, const device_batch& batch,
                                    const device_pages& pages, const rows_of_bf16& out);

} // namespace troupe::kernels::cuda
