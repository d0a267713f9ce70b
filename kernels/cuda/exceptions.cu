#undef NDEBUG // the assertion is what it is for
#include <cassert>

#include "troupe/kernels/cuda/exceptions.hpp"
#include "troupe/kernels/cuda/kernels.hpp"

#include <cstdlib>
#include <cstring>

namespace troupe::kernels::cuda {

namespace {

__global__ void do_nothing() {}

__global__ void write_to(char* at) {
  *reinterpret_cast<volatile int*>(at) = 1;
}

__global__ void stop() {
  __trap();
}

__global__ void assert_equal(int a, int b) {
  assert(a == b);
}

} // namespace

bool are_exceptions_local() {
  static const bool result = [] {
    const char* enabled = std::getenv("CUDA_ENABLE_COREDUMP_ON_EXCEPTION");
    return enabled != nullptr && std::strcmp(enabled, "1") == 0;
  }();
  return result;
}

void launch_nothing(cudaStream_t stream) {
  do_nothing<<<1, 1, 0, stream>>>();
}

void launch_break_down(cudaStream_t stream, breakdown how, void* memory) {
  switch (how) {
  case breakdown::illegal_access: write_to<<<1, 1, 0, stream>>>(nullptr); break;
  case breakdown::misaligned_access:
    write_to<<<1, 1, 0, stream>>>(static_cast<char*>(memory) + 1);
    break;
  case breakdown::trap: stop<<<1, 1, 0, stream>>>(); break;
  case breakdown::assertion: assert_equal<<<1, 1, 0, stream>>>(1, 2); break;
  }
}

} // namespace troupe::kernels::cuda
