#include "troupe/kernels/cuda/linear.cuh"

namespace troupe::kernels::cuda {

void launch_linear_bf16(cudaStream_t stream, const linear_args& args,
                        std::int32_t num_multiprocessors) {
  launch_typed<packed_type::bf16>(stream, args, num_multiprocessors);
}

} // namespace troupe::kernels::cuda
