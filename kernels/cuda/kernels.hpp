#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include "troupe/kernels/cuda/packed_matrix.hpp"
#include "troupe/kernels/ops.hpp"

/// The kernels of the GPU, queued on a stream. All pointers are to device memory.
namespace troupe::kernels::cuda {

using bf16 = __nv_bfloat16;

/// Rows of activations: of bf16 or, with exact numerics, of float. What is declared below for T
/// exists for these two.
template <class T>
struct rows_of {
  T* data = nullptr;
  std::int32_t num_rows = 0;
  std::int32_t num_cols = 0;
  std::int64_t stride = 0;
};

using rows_of_bf16 = rows_of<bf16>;

template <class T>
rows_of<T> as_rows(const rows_view& x) {
  return {static_cast<T*>(x.data), x.num_rows, x.num_cols, x.stride};
}

inline rows_of_bf16 as_bf16(const rows_view& x) {
  return as_rows<bf16>(x);
}

/// Where the rows of a micro-batch stand, in device memory (see batch_view).
struct device_batch {
  const std::int32_t* positions = nullptr;
  const std::int32_t* sequences = nullptr;
  const std::int32_t* tables = nullptr;
  const std::int32_t* offsets = nullptr;
};

/// Pages whose places hold two parts: latent and key, or keys and values.
template <class T>
struct pages_of {
  T* data = nullptr;
  std::int32_t page_tokens = 0;
  std::int32_t first_width = 0;
  std::int32_t second_width = 0;
};

using device_pages = pages_of<bf16>;

// Weights (pack.cu).

/// Makes `to.data` and, of a quantized weight, `to.scales` from a recipe.
void launch_make(cudaStream_t stream, const weight_recipe& recipe, const weight_matrix& to);

/// The scales that a weight of wider elements in device memory has in 8 bit (narrow_weight.hpp).
void launch_find_scales(cudaStream_t stream, const weight_matrix& from, float* scales);

/// Writes `to.data` from a weight in device memory, which is rounded where it is wider than `to`:
/// it has the scales of launch_find_scales then. `found` is set to 1 where an f8 weight holds a
/// NaN, which the product kernels do not know.
void launch_pack(cudaStream_t stream, const weight_matrix& from, const packed_matrix& to,
                 std::int32_t* found);

/// out[r, c] = the value of a weight in device memory, rounded to T, dense.
template <class T>
void launch_expand(cudaStream_t stream, const weight_matrix& from, T* out);

/// Rounds a weight in device memory to 8 bit, with the scales of launch_find_scales, which it has:
/// rows of codes, `out_stride` bytes apart.
void launch_narrow(cudaStream_t stream, const weight_matrix& from, std::int64_t out_stride,
                   std::int8_t* out);

// Element by element (element.cu).

template <class T>
void launch_embed(cudaStream_t stream, const weight_matrix& table, const std::int32_t* ids,
                  std::int32_t num_ids, const rows_of<T>& out);
template <class T>
void launch_rms_norm(cudaStream_t stream, const rows_of<T>& x, const float* weight, float epsilon,
                     const rows_of<T>& out);
/// Pairs are neighbours, or half of rope_dim apart.
template <class T>
void launch_rope(cudaStream_t stream, const rows_of<T>& x, std::int32_t num_heads,
                 std::int32_t head_stride, std::int32_t offset, std::int32_t rope_dim,
                 const std::int32_t* positions, const float* inv_freq, float magnitude,
                 bool halves);
template <class T>
void launch_append(cudaStream_t stream, const rows_of<T>& first, const rows_of<T>& second,
                   const device_batch& batch, const pages_of<T>& pages);
template <class T>
void launch_swiglu(cudaStream_t stream, const rows_of<T>& gate, const rows_of<T>& up,
                   const rows_of<T>& out);
template <class T>
void launch_add(cudaStream_t stream, const rows_of<T>& x, const rows_of<T>& delta);
/// x += delta, rounded; out = rms_norm(x).
template <class T>
void launch_add_rms_norm(cudaStream_t stream, const rows_of<T>& x, const rows_of<T>& delta,
                         const float* weight, float epsilon, const rows_of<T>& out);
template <class T>
void launch_add_bias(cudaStream_t stream, const rows_of<T>& x, const float* bias);
/// rows: null where row m, choice j has row m * top_k + j of expert_out.
template <class T>
void launch_combine(cudaStream_t stream, const rows_of<T>& expert_out, const std::int32_t* rows,
                    const float* weights, std::int32_t top_k, const rows_of<T>& shared,
                    const rows_of<T>& out);
/// Does what no context survives, for drills. `memory`: some that there is, 8 bytes at least.
void launch_break_down(cudaStream_t stream, breakdown how, void* memory);
/// Sets *found to 1 where a value is not finite.
template <class T>
void launch_find_not_finite(cudaStream_t stream, const rows_of<T>& x, std::int32_t* found);
/// Copies whole pieces of 16 bytes: what the memory can do, for measuring.
void launch_copy(cudaStream_t stream, const void* from, void* to, std::size_t bytes);
/// out = x with every group of group_cols columns padded with zeros to padded_cols, dense.
void launch_pad(cudaStream_t stream, const rows_of_bf16& x, std::int32_t num_groups,
                std::int32_t group_stride, std::int32_t group_cols, std::int32_t padded_cols,
                bf16* out);

// Products (linear.cuh, linear_*.cu).

/// One product of a launch; all of a launch have the same shape and type of weight.
struct linear_job {
  const void* data = nullptr;
  const float* scales = nullptr;
  const std::uint8_t* zeros = nullptr;
  const bf16* x = nullptr;
  const std::int32_t* rows = nullptr; ///< which rows of x; null: the first ones
  void* out = nullptr;
  std::int32_t num_rows = 0;    ///< of x
  std::int32_t first_group = 0; ///< of packed rows
  // Of few rows alone.
  std::int32_t num_cols = 0;   ///< of the result, and rows of the weight; 0: as linear_args says
  std::int32_t out_stride = 0; ///< 0: as linear_args says
  const void* second_data = nullptr; ///< of linear_args::gated: the weight of the second product
  const float* second_scales = nullptr;
  const std::uint8_t* second_zeros = nullptr;
};

struct linear_args {
  packed_matrix w; ///< shape; data, scales and zeros come from the job
  linear_job job;
  linear_job other;                 ///< the second of two jobs, if it has data
  const linear_job* jobs = nullptr; ///< several; null: `job` alone, moved by the steps below
  std::int32_t num_jobs = 1;
  const std::int32_t* num_used = nullptr; ///< how many of the jobs there are; null: all. Few rows
  std::int32_t max_rows = 0;              ///< of any job
  std::int32_t job_cols = 0;              ///< columns of the result, which are rows of the weight
  std::int32_t row_step = 0; ///< rows of the weight, elements of x and out from job to job
  std::int64_t x_step = 0;
  std::int64_t out_step = 0;
  std::int64_t x_stride = 0; ///< readable up to whole blocks, rows begin at multiples of 16 bytes
  std::int64_t out_stride = 0;
  bool float_out = false;
  bool gated = false; ///< out = silu(x . w) * (x . second weight); at most kGatedRows rows
  const void* packed_x = nullptr; ///< rows as launch_pack_rows leaves them; null: not packed
  std::int64_t packed_groups = 0; ///< groups of eight rows
  std::int64_t packed_step = 0;   ///< bytes from job to job
};

/// Rows of a job with linear_args::gated.
inline constexpr std::int32_t kGatedRows = 8;

/// Groups of packed rows that a kernel may read beyond the last.
inline constexpr std::int32_t kSpareGroups = 16;

/// Packs rows for the matrix unit of Hopper: num_jobs times (x moved on by x_step each time)
/// [64 columns][group][8 rows][128 bytes], the columns of a row in the order of packed_matrix and
/// its pieces of 16 bytes exchanged by row. slots[i] is the row of x that comes to place i, -1
/// none; null: the first ones.
void launch_pack_rows(cudaStream_t stream, const rows_of_bf16& x, const std::int32_t* slots,
                      std::int32_t num_groups, std::int32_t num_jobs, std::int64_t x_step,
                      std::int32_t num_cols, void* out);

/// One for each type of weight, compiled apart.
void launch_linear_bf16(cudaStream_t stream, const linear_args& args,
                        std::int32_t num_multiprocessors);
void launch_linear_f8(cudaStream_t stream, const linear_args& args,
                      std::int32_t num_multiprocessors);
void launch_linear_i8(cudaStream_t stream, const linear_args& args,
                      std::int32_t num_multiprocessors);
void launch_linear_i4(cudaStream_t stream, const linear_args& args,
                      std::int32_t num_multiprocessors);

// Attention (attention.cu).

template <class T>
void launch_latent_attention(cudaStream_t stream, const rows_of<T>& q_latent,
                             const rows_of<T>& q_rope, std::int32_t q_rope_head_stride,
                             std::int32_t num_heads, float scale, const device_batch& batch,
                             const pages_of<T>& pages, const rows_of<T>& out, bool is_hopper);
template <class T>
void launch_grouped_attention(cudaStream_t stream, const rows_of<T>& q, std::int32_t num_heads,
                              std::int32_t num_kv_heads, float scale, const device_batch& batch,
                              const pages_of<T>& pages, const rows_of<T>& out);

// Routing and sampling (router.cu, sampler.cu, draw.cu).

/// logits[m, e] = x[m] . w[e], one warp each.
template <class T>
void launch_router_logits(cudaStream_t stream, const rows_of<T>& x, const weight_matrix& w,
                          float* logits);
void launch_choose_experts(cudaStream_t stream, const float* logits, std::int32_t num_rows,
                           const float* bias, const router_params& params, std::int32_t* experts,
                           float* weights);

/// sampling_params as the device takes them.
struct device_sampling {
  float temperature = 0.0F;
  std::int32_t top_k = 0;
  float top_p = 1.0F;
  float min_p = 0.0F;
  double uniform = 0.0; ///< the random number of this token
  std::int32_t num_logprobs = 0;
  std::int32_t target = -1;
  std::int32_t first_banned = 0;
  std::int32_t num_banned = 0;
};

/// What a part of a row of logits holds.
struct logit_survey {
  unsigned long long best = 0;    ///< rank of the best token of the part
  unsigned long long allowed = 0; ///< of those that are not banned
  double powers = 0.0;            ///< sum of exp(logit - best logit of the part)
};

/// Parts of a row that are surveyed by blocks of their own.
inline constexpr std::int32_t kSurveys = 16;

/// Rows of logits in float32.
struct logit_rows {
  const float* data = nullptr;
  std::int64_t stride = 0;
  std::int32_t num_rows = 0;
  std::int32_t num_tokens = 0;
};

/// `any_drawn`: there is a row whose token is not the best one. Scratch: `surveys` [num_rows,
/// kSurveys], `allowed` [num_rows, num_tokens], null where nothing is banned.
void launch_sample(cudaStream_t stream, const logit_rows& rows, const device_sampling* params,
                   bool any_drawn, const std::int32_t* banned, logit_survey* surveys,
                   float* allowed, sampled_token* out);

/// The part of it that draws: sets the tokens of the rows concerned, and nothing else.
void launch_draw(cudaStream_t stream, const logit_rows& rows, const device_sampling* params,
                 const logit_survey* surveys, const float* allowed, sampled_token* out);

} // namespace troupe::kernels::cuda
