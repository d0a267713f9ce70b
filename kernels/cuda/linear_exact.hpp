#pragma once

#include "troupe/kernels/cuda/kernels.hpp"

/// Products of float32 rows with weights as they are stored, in float32 (numerics::exact).
///
/// The order of additions is the same for any number of rows: the columns are cut into pieces of 8,
/// and the pieces into 32 parts, piece i into part i modulo 32. A part is one chain of fused
/// multiply-adds over ascending columns, and the parts are added in order.
namespace troupe::kernels::cuda {

/// Columns of a piece, and parts of a sum.
inline constexpr std::int32_t kExactPiece = 8;
inline constexpr std::int32_t kExactParts = 32;

/// Most rows of the kernel whose warps have their weights to themselves.
inline constexpr std::int32_t kFewExactRows = 16;

/// A weight, row by row. Rows have room for whole pieces, of which what lies behind the columns may
/// be anything.
struct exact_weight {
  const void* data = nullptr;
  const float* scales = nullptr;       ///< [ceil(num_rows / block_rows), num_scale_cols]
  const std::uint8_t* zeros = nullptr; ///< i4 only: as many; null stands for 8
  std::int64_t stride = 0;             ///< bytes from one row to the next
  std::int32_t num_rows = 0;
  std::int32_t num_cols = 0;
  std::int32_t block_rows = 1;
  std::int32_t block_cols = 1;
  std::int32_t num_scale_cols = 1;
  std::int32_t block_shift = -1; ///< column c has scale c >> block_shift; -1: c / block_cols
  element_type type = element_type::f32;
};

/// Bytes of a row with room for whole pieces, on a border of its pieces.
std::int64_t exact_stride(element_type type, std::int32_t num_cols);

/// block_shift of a weight.
std::int32_t exact_block_shift(std::int32_t num_cols, std::int32_t block_cols);

/// Whether one launch can multiply with both.
inline bool same_kind(const exact_weight& a, const exact_weight& b) {
  return a.type == b.type && a.block_shift == b.block_shift
         && (a.scales == nullptr) == (b.scales == nullptr);
}

/// One product.
struct exact_job {
  exact_weight w;
  const float* x = nullptr;
  const std::int32_t* rows = nullptr; ///< which rows of x; null: the first ones
  float* out = nullptr;
  std::int32_t num_rows = 0; ///< of x
};

/// The products of a launch, all with weights of one kind.
struct exact_args {
  exact_job job;                   ///< of several, any one of them
  const exact_job* jobs = nullptr; ///< several; null: `job` alone, moved as is said below
  std::int32_t num_jobs = 1;
  std::int32_t max_rows = 0; ///< of any job
  std::int32_t max_cols = 0; ///< columns of any result
  std::int64_t x_stride = 0;
  std::int64_t out_stride = 0;
  // Neighbouring rows of the weight, elements of x and out from job to job. Such a weight has no
  // scales.
  std::int32_t row_step = 0;
  std::int64_t x_step = 0;
  std::int64_t out_step = 0;
  // Or, of a mixture of experts: job i has row i / jobs_of_row of x, row i of out and the weight
  // experts[chosen[i] * expert_step].
  const std::int32_t* chosen = nullptr;
  const exact_weight* experts = nullptr;
  std::int32_t expert_step = 0;
  std::int32_t jobs_of_row = 1;
};

void launch_linear_exact(cudaStream_t stream, const exact_args& args);

} // namespace troupe::kernels::cuda
