#include "troupe/kernels/cuda/nccl_library.hpp"

#include <dlfcn.h>

namespace troupe::kernels::cuda {

namespace {

template <class Function>
void find(void* library, const char* name, Function*& to, std::string& missing) {
  to = reinterpret_cast<Function*>(::dlsym(library, name));
  if (to == nullptr && missing.empty()) {
    missing = name;
  }
}

} // namespace

std::optional<nccl_api::functions> open_nccl(const std::string& library, std::string& error) {
  void* const opened = ::dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (opened == nullptr) {
    const char* const why = ::dlerror();
    error = "NCCL cannot be opened: " + (why == nullptr ? library : std::string(why));
    return std::nullopt;
  }
  nccl_api::functions api;
  std::string missing;
#define TROUPE_FIND(name) find(opened, #name, api.name, missing)
  TROUPE_FIND(ncclGetVersion);
  TROUPE_FIND(ncclGetUniqueId);
  TROUPE_FIND(ncclCommInitRankConfig);
  TROUPE_FIND(ncclCommGetAsyncError);
  TROUPE_FIND(ncclCommAbort);
  TROUPE_FIND(ncclGetErrorString);
  TROUPE_FIND(ncclGetLastError);
  TROUPE_FIND(ncclGroupStart);
  TROUPE_FIND(ncclGroupEnd);
  TROUPE_FIND(ncclAllGather);
  TROUPE_FIND(ncclSend);
  TROUPE_FIND(ncclRecv);
#undef TROUPE_FIND
  int version = 0;
  if (!missing.empty()) {
    error = library + " has no " + missing;
  } else if (api.ncclGetVersion(&version) != nccl_api::success
             || version < nccl_api::oldest_version) {
    error = library + " is NCCL " + std::to_string(version) + ", and "
            + std::to_string(nccl_api::oldest_version) + " or later is needed";
  }
  if (!missing.empty() || version < nccl_api::oldest_version) {
    ::dlclose(opened);
    return std::nullopt;
  }
  return api;
}

} // namespace troupe::kernels::cuda
