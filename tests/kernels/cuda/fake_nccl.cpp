// A library that answers like NCCL: what tests open in place of it. It moves bytes between ranks
// that share a GPU, which NCCL refuses, or, with a null stream, in host memory. Written from the
// API reference and not from kernels/cuda/nccl_api.hpp, which it is to check. Communicators that
// block are refused; calls are under way until all ranks have made theirs.
//
// FAKE_NCCL in the environment makes it misbehave:
//   old          it is of 2017
//   refuses      communicators cannot be made
//   never-ready  communicators are never ready
//   stuck        the first call never returns
//   breaks       a communicator reports an error after the first call
//   hard-to-end  communicators cannot be aborted in time
// Built with FAKE_NCCL_LACKING, it lacks a function.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include <cuda_runtime_api.h>
#include <unistd.h>

namespace {

enum { succeeded = 0, system_error = 2, invalid_argument = 4, remote_error = 6, in_progress = 7 };

struct copy {
  const void* from;
  void* to;
  std::size_t bytes;
  int peer;
};

/// A call of one rank: what it gives to each peer and what it wants of each.
struct call {
  std::vector<copy> sent, received;
  cudaStream_t stream;
};

struct world;

bool behaves(const char* how) {
  const char* wanted = std::getenv("FAKE_NCCL");
  return wanted != nullptr && std::strcmp(wanted, how) == 0;
}

[[noreturn]] void sleep_for_ever() {
  for (;;)
    ::pause();
}

std::atomic<int> num_aborted{0};
std::atomic<std::uint64_t> num_worlds{0};
thread_local int depth = 0;

} // namespace

struct ncclComm {
  world* all;
  int rank;
  int device;
  std::atomic<int> status{in_progress};
  std::atomic<bool> is_aborted{false};
  std::vector<call> calls; ///< under way
  call grouped;            ///< of the group that is open
};

namespace {

struct world {
  std::mutex mutex;
  std::vector<ncclComm*> ranks;
  int num_made = 0;

  /// All ranks have made their call.
  void carry_out() {
    int device = 0;
    cudaGetDevice(&device);
    std::vector<cudaEvent_t> events;
    const auto meet = [&] {
      std::vector<cudaEvent_t> here;
      for (auto* one : ranks) {
        cudaSetDevice(one->device);
        cudaEventCreateWithFlags(&here.emplace_back(), cudaEventDisableTiming);
        cudaEventRecord(here.back(), one->calls.front().stream);
      }
      for (auto* one : ranks)
        for (auto* event : here)
          cudaStreamWaitEvent(one->calls.front().stream, event, 0);
      events.insert(events.end(), here.begin(), here.end());
    };
    const bool on_gpu = ranks.front()->calls.front().stream != nullptr;
    if (on_gpu)
      meet();
    for (auto* one : ranks)
      for (const auto& wanted : one->calls.front().received)
        for (const auto& given : ranks[wanted.peer]->calls.front().sent)
          if (given.peer == one->rank && given.bytes == wanted.bytes && given.from != wanted.to) {
            if (on_gpu)
              cudaMemcpyAsync(wanted.to, given.from, wanted.bytes, cudaMemcpyDefault,
                              one->calls.front().stream);
            else
              std::memcpy(wanted.to, given.from, wanted.bytes);
          }
    if (on_gpu)
      meet();
    for (auto* event : events)
      cudaEventDestroy(event);
    cudaSetDevice(device);
    for (auto* one : ranks) {
      one->calls.erase(one->calls.begin());
      one->status = behaves("breaks") ? remote_error : succeeded;
    }
  }

  int post(ncclComm* from, call made) {
    const std::lock_guard lock(mutex);
    from->status = in_progress;
    from->calls.push_back(std::move(made));
    for (auto* one : ranks)
      if (one->calls.empty())
        return in_progress;
    carry_out();
    return in_progress;
  }
};

std::mutex worlds_mutex;
std::map<std::uint64_t, world*> worlds;
thread_local ncclComm* grouping = nullptr;

void must_live(const ncclComm* comm) {
  if (comm->is_aborted) {
    std::fprintf(stderr, "fake NCCL: a communicator is used after it was aborted\n");
    std::abort();
  }
}

} // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

struct ncclUniqueId {
  char internal[128];
};

struct ncclConfig_t {
  std::size_t size;
  unsigned int magic;
  unsigned int version;
  int blocking;
  int cgaClusterSize;
  int minCTAs;
  int maxCTAs;
  const char* netName;
};

EXPORTED int fake_nccl_num_aborted() {
  return num_aborted;
}

EXPORTED int ncclGetVersion(int* version) {
  *version = behaves("old") ? 2103 : 22809;
  return succeeded;
}

EXPORTED int ncclGetUniqueId(ncclUniqueId* id) {
  if (behaves("stuck"))
    sleep_for_ever();
  const std::uint64_t number = ++num_worlds;
  std::memcpy(id->internal, &number, sizeof(number));
  return succeeded;
}

EXPORTED const char* ncclGetErrorString(int result) {
  return result == remote_error   ? "remote process exited or there was a network error"
         : result == system_error ? "unhandled system error"
         : result == in_progress  ? "NCCL operation in progress"
                                  : "another error";
}

EXPORTED const char* ncclGetLastError(ncclComm*) {
  return behaves("refuses") ? "no socket" : "";
}

EXPORTED int ncclGroupStart() {
  ++depth;
  return succeeded;
}

EXPORTED int ncclGroupEnd() {
  if (--depth > 0)
    return succeeded;
  auto* comm = std::exchange(grouping, nullptr);
  return comm == nullptr ? succeeded : comm->all->post(comm, std::exchange(comm->grouped, {}));
}

EXPORTED int ncclCommInitRankConfig(ncclComm** comm, int num_ranks, ncclUniqueId id, int rank,
                                    ncclConfig_t* config) {
  if (config->magic != 0xCAFEBEEF || config->version < 21400 || config->size < 20
      || config->blocking != 0)
    return invalid_argument;
  if (behaves("refuses"))
    return system_error;
  std::uint64_t number = 0;
  std::memcpy(&number, id.internal, sizeof(number));
  const std::lock_guard lock(worlds_mutex);
  auto*& all = worlds[number];
  if (all == nullptr) {
    all = new world;
    all->ranks.resize(num_ranks);
  }
  auto* made = new ncclComm{all, rank, 0};
  cudaGetDevice(&made->device);
  all->ranks[rank] = made;
  if (++all->num_made == num_ranks && !behaves("never-ready"))
    for (auto* one : all->ranks)
      one->status = succeeded;
  *comm = made;
  return in_progress;
}

EXPORTED int ncclCommGetAsyncError(ncclComm* comm, int* error) {
  must_live(comm);
  *error = comm->status;
  return succeeded;
}

#ifndef FAKE_NCCL_LACKING
EXPORTED int ncclCommAbort(ncclComm* comm) {
  must_live(comm);
  if (behaves("hard-to-end"))
    sleep_for_ever();
  comm->is_aborted = true;
  ++num_aborted;
  return succeeded;
}
#endif

EXPORTED int ncclAllGather(const void* from, void* to, std::size_t count, int type, ncclComm* comm,
                           cudaStream_t stream) {
  must_live(comm);
  if (type != 0)
    return invalid_argument;
  call made{{}, {}, stream};
  for (int peer = 0; peer < static_cast<int>(comm->all->ranks.size()); ++peer) {
    made.sent.push_back({from, nullptr, count, peer});
    made.received.push_back({nullptr, static_cast<char*>(to) + peer * count, count, peer});
  }
  return comm->all->post(comm, std::move(made));
}

EXPORTED int ncclSend(const void* from, std::size_t count, int type, int peer, ncclComm* comm,
                      cudaStream_t stream) {
  must_live(comm);
  if (type != 0 || depth == 0)
    return invalid_argument;
  grouping = comm;
  comm->grouped.stream = stream;
  comm->grouped.sent.push_back({from, nullptr, count, peer});
  return succeeded;
}

EXPORTED int ncclRecv(void* to, std::size_t count, int type, int peer, ncclComm* comm,
                      cudaStream_t stream) {
  must_live(comm);
  if (type != 0 || depth == 0)
    return invalid_argument;
  grouping = comm;
  comm->grouped.stream = stream;
  comm->grouped.received.push_back({nullptr, to, count, peer});
  return succeeded;
}
