#include "nccl.hpp"

#include <cstdio>
#include <cstdlib>
#include <vector>

#include <dlfcn.h>

#include "troupe/kernels/cuda/cuda_ops.hpp"

#if __has_include(<nccl.h>)
#include <nccl.h>
#define TROUPE_HAS_NCCL
#endif

namespace gpu_bench {

#ifdef TROUPE_HAS_NCCL

namespace {

class opened_nccl final : public nccl {
public:
  explicit opened_nccl(std::span<const std::int32_t> devices) {
    handle_ = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    if (handle_ == nullptr) {
      return;
    }
    find("ncclCommInitAll", init_all_);
    find("ncclAllReduce", all_reduce_);
    find("ncclCommDestroy", destroy_);
    if (!has_all_) {
      return;
    }
    // Multicast is a matter of the whole host.
    ::setenv("NCCL_NVLS_ENABLE", "0", 1);
    ::setenv("NCCL_P2P_DISABLE", "0", 0); // the ruler is what NCCL can do
    troupe::kernels::cuda::prepare_environment();
    std::vector<ncclComm_t> ranks(devices.size());
    const std::vector<int> list(devices.begin(), devices.end());
    const auto status = init_all_(ranks.data(), static_cast<int>(list.size()), list.data());
    if (status == ncclSuccess) {
      ranks_ = ranks;
    } else {
      std::fprintf(stderr, "gpu-bench: NCCL fails with %d\n", static_cast<int>(status));
    }
  }

  ~opened_nccl() override {
    for (auto* rank : ranks_) {
      destroy_(rank);
    }
  }

  bool works() const { return !ranks_.empty(); }

  bool all_reduce(int rank, void* data, std::size_t num_elements, cudaStream_t stream) override {
    return all_reduce_(data, data, num_elements, ncclBfloat16, ncclSum, ranks_[rank], stream)
           == ncclSuccess;
  }

private:
  template <class Function>
  void find(const char* name, Function*& function) {
    function = reinterpret_cast<Function*>(dlsym(handle_, name));
    has_all_ &= function != nullptr;
  }

  void* handle_ = nullptr;
  bool has_all_ = true;
  decltype(ncclCommInitAll)* init_all_ = nullptr;
  decltype(ncclAllReduce)* all_reduce_ = nullptr;
  decltype(ncclCommDestroy)* destroy_ = nullptr;
  std::vector<ncclComm_t> ranks_;
};

} // namespace

std::unique_ptr<nccl> open_nccl(std::span<const std::int32_t> devices) {
  auto result = std::make_unique<opened_nccl>(devices);
  return result->works() ? std::move(result) : nullptr;
}

#else

std::unique_ptr<nccl> open_nccl(std::span<const std::int32_t>) {
  return nullptr;
}

#endif

} // namespace gpu_bench
