#include "troupe/kernels/cuda/router.cuh"

namespace troupe::kernels::cuda {

namespace {

constexpr int kWarps = 8;

/// One warp an expert.
__global__ void router_logits(rows_of_bf16 x, const void* w, bool is_float, bool is_aligned,
                              std::int32_t num_experts, float* logits) {
  const std::int64_t row = blockIdx.y;
  const std::int32_t expert = blockIdx.x * kWarps + threadIdx.x / 32;
  if (expert >= num_experts) {
    return;
  }
  const float logit =
    router_logit(x.data + row * x.stride, x.num_cols, w, is_float, is_aligned, expert);
  if (threadIdx.x % 32 == 0) {
    logits[row * num_experts + expert] = logit;
  }
}

/// One warp a row.
__global__ void __launch_bounds__(32)
  choose_experts(const float* logits, const float* bias, router_params params,
                 std::int32_t* experts, float* weights) {
  extern __shared__ float memory[];
  const auto row = static_cast<std::int64_t>(blockIdx.x);
  choose_of_row(logits + row * params.num_experts, bias, params, memory,
                experts + row * params.top_k, weights + row * params.top_k);
}

} // namespace

void launch_router_logits(cudaStream_t stream, const rows_of_bf16& x, const weight_matrix& w,
                          float* logits) {
  const dim3 grid(ceil_div(w.num_rows, kWarps), x.num_rows);
  router_logits<<<grid, kWarps * 32, 0, stream>>>(x, w.data, w.type == element_type::f32,
                                                  rows_are_aligned(x, w.data), w.num_rows, logits);
}

void launch_choose_experts(cudaStream_t stream, const float* logits, std::int32_t num_rows,
                           const float* bias, const router_params& params, std::int32_t* experts,
                           float* weights) {
  const auto bytes = static_cast<std::size_t>(floats_of_choice(params)) * sizeof(float);
  choose_experts<<<num_rows, 32, bytes, stream>>>(logits, bias, params, experts, weights);
}

} // namespace troupe::kernels::cuda
