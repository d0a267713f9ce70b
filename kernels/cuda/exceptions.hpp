#pragma once

#include <cuda_runtime_api.h>

namespace troupe::kernels::cuda {

/// Whether exceptions of kernels are handled within this process, as if it were to dump the state
/// of its GPU (CUDA-GDB manual, "GPU core dump support"): its context stops, and the GPU goes on
/// with others. The environment says so, which the node makes for its workers.
bool are_exceptions_local();

/// A kernel that does nothing. Where exceptions are local, the wait for a kernel that wrote where
/// there is no memory may end well all the same, if nothing was queued behind it. No kernel begins
/// in a context that has stopped, so a wait for this one does not end.
void launch_nothing(cudaStream_t stream);

} // namespace troupe::kernels::cuda
