#pragma once

#include <climits>
#include <cstddef>

/// The few declarations of NCCL that are used, written down here so that nothing has to be
/// installed to build. Source: NVIDIA's NCCL API reference (docs.nvidia.com/deeplearning/nccl).
namespace troupe::kernels::cuda::nccl_api {

using communicator = struct ncclComm*;
using stream = void*; ///< cudaStream_t
using result = int;   ///< ncclResult_t

inline constexpr result success = 0;
inline constexpr result in_progress = 7;

inline constexpr int type_of_bytes = 0; ///< ncclDataType_t: ncclInt8

/// ncclUniqueId
struct unique_id {
  char internal[128];
};

/// ncclConfig_t as of 2.17. Later libraries take it for what it says it is.
struct config {
  std::size_t size = sizeof(config);
  unsigned magic = 0xCAFEBEEF;
  unsigned version = 21700;
  int blocking = INT_MIN; ///< INT_MIN: not given
  int cga_cluster_size = INT_MIN;
  int min_ctas = INT_MIN;
  int max_ctas = INT_MIN;
  const char* net_name = nullptr;
};

/// The oldest library that knows all that is used.
inline constexpr int oldest_version = 21800;

struct functions {
  result (*ncclGetVersion)(int*) = nullptr;
  result (*ncclGetUniqueId)(unique_id*) = nullptr;
  result (*ncclCommInitRankConfig)(communicator*, int num_ranks, unique_id, int rank,
                                   config*) = nullptr;
  result (*ncclCommGetAsyncError)(communicator, result*) = nullptr;
  result (*ncclCommAbort)(communicator) = nullptr;
  const char* (*ncclGetErrorString)(result) = nullptr;
  const char* (*ncclGetLastError)(communicator) = nullptr;
  result (*ncclGroupStart)() = nullptr;
  result (*ncclGroupEnd)() = nullptr;
  result (*ncclAllGather)(const void*, void*, std::size_t count, int type, communicator,
                          stream) = nullptr;
  result (*ncclSend)(const void*, std::size_t count, int type, int peer, communicator,
                     stream) = nullptr;
  result (*ncclRecv)(void*, std::size_t count, int type, int peer, communicator, stream) = nullptr;
};

} // namespace troupe::kernels::cuda::nccl_api
