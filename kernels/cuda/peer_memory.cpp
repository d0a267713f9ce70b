#include "troupe/kernels/cuda/peer_memory.hpp"

#include <algorithm>
#include <vector>

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "troupe/kernels/cuda/runtime_error.hpp"

namespace troupe::kernels::cuda {

namespace {

/// Functions of the driver. Asked for by name, so that programs need no library of the driver to
/// start.
struct driver {
  decltype(&cuGetErrorName) error_name = nullptr;
  decltype(&cuMemGetAllocationGranularity) granularity = nullptr;
  decltype(&cuMemAddressReserve) reserve = nullptr;
  decltype(&cuMemAddressFree) free_addresses = nullptr;
  decltype(&cuMemCreate) create = nullptr;
  decltype(&cuMemRelease) release = nullptr;
  decltype(&cuMemMap) map = nullptr;
  decltype(&cuMemUnmap) unmap = nullptr;
  decltype(&cuMemSetAccess) set_access = nullptr;
  bool is_whole = true;

  driver() {
    find("cuGetErrorName", error_name);
    find("cuMemGetAllocationGranularity", granularity);
    find("cuMemAddressReserve", reserve);
    find("cuMemAddressFree", free_addresses);
    find("cuMemCreate", create);
    find("cuMemRelease", release);
    find("cuMemMap", map);
    find("cuMemUnmap", unmap);
    find("cuMemSetAccess", set_access);
  }

private:
  template <class Function>
  void find(const char* name, Function& function) {
    constexpr unsigned kVersion = 12000;
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    if (cudaGetDriverEntryPointByVersion(name, &found, kVersion, cudaEnableDefault, &result)
          != cudaSuccess
        || result != cudaDriverEntryPointSuccess) {
      cudaGetLastError();
      is_whole = false;
    }
    function = reinterpret_cast<Function>(found);
  }
};

const driver& the_driver() {
  static const driver result;
  return result;
}

/// What has been done so far, undone in the reverse order.
struct mapping {
  CUdeviceptr address = 0;
  std::size_t size = 0;
  CUmemGenericAllocationHandle memory = 0;
  bool has_memory = false;
  bool is_mapped = false;

  ~mapping() {
    const auto& calls = the_driver();
    if (is_mapped) {
      calls.unmap(address, size);
    }
    if (has_memory) {
      calls.release(memory);
    }
    if (address != 0) {
      calls.free_addresses(address, size);
    }
  }
};

bool check(CUresult status, std::int32_t device, const char* what, std::string& error) {
  if (status == CUDA_SUCCESS) {
    return true;
  }
  const char* name = nullptr;
  the_driver().error_name(status, &name);
  error = "cuda:" + std::to_string(device) + ": " + what + ": " + (name == nullptr ? "" : name);
  return false;
}

} // namespace

std::shared_ptr<std::byte> make_peer_memory(std::int32_t owner,
                                            std::span<const std::int32_t> devices,
                                            std::size_t bytes, std::string& error) {
  std::vector<CUmemAccessDesc> access;
  for (const std::int32_t device : devices) {
    int reaches = 1;
    if (device != owner
        && !succeeded(cudaDeviceCanAccessPeer(&reaches, device, owner), device, "peer access",
                      error)) {
      return nullptr;
    }
    if (reaches == 0) {
      error = "cuda:" + std::to_string(device)
              + " cannot reach the memory of cuda:" + std::to_string(owner);
      return nullptr;
    }
    if (std::none_of(access.begin(), access.end(),
                     [&](const auto& one) { return one.location.id == device; })) {
      access.push_back(
        {{CU_MEM_LOCATION_TYPE_DEVICE, {device}}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE});
    }
  }
  // The runtime makes the contexts that the driver's functions need.
  if (!succeeded(cudaSetDevice(owner), owner, "cudaSetDevice", error)) {
    return nullptr;
  }
  const auto& calls = the_driver();
  if (!calls.is_whole) {
    error = "the driver lacks functions for virtual memory";
    return nullptr;
  }
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location = {CU_MEM_LOCATION_TYPE_DEVICE, {owner}};
  std::size_t unit = 0;
  if (!check(calls.granularity(&unit, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED), owner,
             "cuMemGetAllocationGranularity", error)) {
    return nullptr;
  }
  const auto result = std::make_shared<mapping>();
  result->size = (std::max<std::size_t>(bytes, 1) + unit - 1) / unit * unit;
  if (!check(calls.reserve(&result->address, result->size, 0, 0, 0), owner, "cuMemAddressReserve",
             error)
      || !check(calls.create(&result->memory, result->size, &properties, 0), owner, "cuMemCreate",
                error)) {
    return nullptr;
  }
  result->has_memory = true;
  if (!check(calls.map(result->address, result->size, 0, result->memory, 0), owner, "cuMemMap",
             error)) {
    return nullptr;
  }
  result->is_mapped = true;
  if (!check(calls.set_access(result->address, result->size, access.data(), access.size()), owner,
             "cuMemSetAccess", error)) {
    return nullptr;
  }
  auto* const at = reinterpret_cast<std::byte*>(result->address);
  if (!succeeded(cudaMemset(at, 0, result->size), owner, "clearing peer memory", error)
      || !succeeded(cudaDeviceSynchronize(), owner, "clearing peer memory", error)) {
    return nullptr;
  }
  return {result, at};
}

} // namespace troupe::kernels::cuda
