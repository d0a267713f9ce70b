#include "troupe/kernels/cuda/router.cuh"

namespace troupe::kernels::cuda {

namespace {

constexpr int kWarps = 8;

/// So many rows share a reading of an expert's weights.
constexpr int kRows = 4;

/// One warp an expert.
template <class T>
__global__ void find_logits(rows_of<T> x, const void* w, bool is_float, bool is_aligned,
                            std::int32_t num_experts, float* out) {
  follow();
  const auto first = static_cast<std::int32_t>(blockIdx.y * kRows);
  const std::int32_t expert = blockIdx.x * kWarps + threadIdx.x / 32;
  if (expert >= num_experts) {
    return;
  }
  const T* from[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    from[row] = x.data + std::int64_t{min(first + row, x.num_rows - 1)} * x.stride;
  }
  float logits[kRows];
  router_logits<kRows>(from, x.num_cols, w, is_float, is_aligned, expert, logits);
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (first + row < x.num_rows) {
        out[std::int64_t{first + row} * num_experts + expert] = logits[row];
      }
    }
  }
}

/// One warp a row.
__global__ void __launch_bounds__(32)
  choose_experts(const float* logits, const float* bias, router_params params,
                 std::int32_t* experts, float* weights) {
  follow();
  extern __shared__ float memory[];
  const auto row = static_cast<std::int64_t>(blockIdx.x);
  choose_of_row(logits + row * params.num_experts, bias, params, memory,
                experts + row * params.top_k, weights + row * params.top_k);
}

} // namespace

template <class T>
void launch_router_logits(cudaStream_t stream, const rows_of<T>& x, const weight_matrix& w,
                          float* logits) {
  const dim3 grid(ceil_div(w.num_rows, kWarps), ceil_div(x.num_rows, kRows));
  launch(stream, grid, kWarps * 32, 0, find_logits<T>, x, w.data, w.type == element_type::f32,
         rows_are_aligned(x, w.data), w.num_rows, logits);
}

void launch_choose_experts(cudaStream_t stream, const float* logits, std::int32_t num_rows,
                           const float* bias, const router_params& params, std::int32_t* experts,
                           float* weights) {
  const auto bytes = static_cast<std::size_t>(floats_of_choice(params)) * sizeof(float);
  launch(stream, num_rows, 32, bytes, choose_experts, logits, bias, params, experts, weights);
}

template void launch_router_logits(cudaStream_t, const rows_of<bf16>&, const weight_matrix&,
                                   float*);
template void launch_router_logits(cudaStream_t, const rows_of<float>&, const weight_matrix&,
                                   float*);

} // namespace troupe::kernels::cuda
