#pragma once

#include <cstdint>
#include <string>

#include <cuda_runtime_api.h>

namespace troupe::kernels::cuda {

/// Whether a call of the CUDA runtime succeeded. If not, `error` says what failed on which GPU, and
/// the runtime's own note of it is cleared, so that the next call is not blamed.
inline bool succeeded(cudaError_t status, std::int32_t device, const char* what,
                      std::string& error) {
  if (status == cudaSuccess) {
    return true;
  }
  cudaGetLastError();
  error = "cuda:" + std::to_string(device) + ": " + what + ": " + cudaGetErrorName(status) + ": "
          + cudaGetErrorString(status);
  return false;
}

} // namespace troupe::kernels::cuda
