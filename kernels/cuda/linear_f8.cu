#include "troupe/kernels/cuda/linear.cuh"

namespace troupe::kernels::cuda {

void launch_linear_f8(cudaStream_t stream, const linear_args& args,
                      std::int32_t num_multiprocessors) {
  launch_typed<packed_type::f8>(stream, args, num_multiprocessors);
}

} // namespace troupe::kernels::cuda
