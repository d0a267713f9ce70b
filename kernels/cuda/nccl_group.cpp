#include "troupe/kernels/cuda/nccl_group.hpp"

#include <algorithm>
#include <thread>

#include <cuda_runtime_api.h>

#include "troupe/kernels/cuda/nccl_library.hpp"
#include "troupe/kernels/cuda/runtime_error.hpp"

namespace troupe::kernels::cuda {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

namespace {

/// Larger rows are added up in parts of so many pieces: 64 MiB.
constexpr std::int64_t kMostPieces = std::int64_t{4} << 20;

/// More than two ranks gather up to so many pieces: 256 KiB. Another call of NCCL costs about as
/// much time as to send them.
constexpr std::uint32_t kMostGathered = std::uint32_t{16} << 10;

/// How long NCCL may take to start: it loads code, and looks at how the GPUs are connected.
constexpr milliseconds kStartPatience{20'000};

/// Pieces that one rank adds up.
std::uint32_t share_of(std::uint32_t num_pieces, std::int32_t num_ranks) {
  return (num_pieces + num_ranks - 1) / num_ranks;
}

} // namespace

std::shared_ptr<nccl_group> nccl_group::make(const std::string& library,
                                             std::span<const std::int32_t> devices,
                                             std::int32_t max_rows, std::int32_t num_cols,
                                             milliseconds deadline, std::string& error) {
  const auto api = open_nccl(library, error);
  if (!api) {
    return nullptr;
  }
  const std::shared_ptr<nccl_group> result(new nccl_group);
  result->devices_.assign(devices.begin(), devices.end());
  if (!result->take_memory(max_rows, num_cols, error)) {
    return nullptr;
  }
  const auto begin = steady_clock::now();
  result->communicators_ = nccl_communicators::make(*api, devices, result->progress_,
                                                    kStartPatience, kStartPatience, error);
  if (result->communicators_ == nullptr) {
    return nullptr;
  }
  // The first calls of NCCL connect the GPUs, for which a step has no time.
  const auto rest = std::chrono::ceil<milliseconds>(begin + kStartPatience - steady_clock::now());
  if (!result->rehearse(num_cols, rest, error)) {
    return nullptr;
  }
  result->communicators_->set_deadline(deadline);
  return result;
}

nccl_group::~nccl_group() {
  if (communicators_ != nullptr && !communicators_->stop()) {
    return; // kernels may still run that use the memory
  }
  for (std::size_t rank = 0; rank < memory_.size(); ++rank) {
    cudaSetDevice(devices_[rank]);
    cudaFree(memory_[rank].pieces);
    cudaFree(memory_[rank].own);
  }
}

bool nccl_group::take_memory(std::int32_t max_rows, std::int32_t num_cols, std::string& error) {
  const std::int64_t row = pieces_per_row<bf16>(num_cols);
  most_ = static_cast<std::uint32_t>(std::max(std::min(row * max_rows, kMostPieces), row));
  // What is gathered, or what is sent and what is received of pieces that are shared out.
  const std::int64_t pieces = std::max<std::int64_t>(
    size() * std::int64_t{size() > 2 ? std::min(most_, kMostGathered) : most_},
    size() > 2 ? 2 * size() * std::int64_t{share_of(most_, size())} : 0);
  void* seen = nullptr;
  if (!succeeded(cudaSetDevice(devices_.front()), devices_.front(), "cudaSetDevice", error)
      || !succeeded(cudaHostAlloc(&seen, sizeof(rank_progress) * kMostRanks,
                                  cudaHostAllocPortable | cudaHostAllocMapped),
                    devices_.front(), "memory for the progress of ranks", error)) {
    return false;
  }
  progress_ = {static_cast<rank_progress*>(seen), [](rank_progress* at) { cudaFreeHost(at); }};
  std::fill_n(progress_.get(), kMostRanks, rank_progress{});
  for (const std::int32_t device : devices_) {
    auto& memory = memory_.emplace_back();
    memory.seen = &progress_[memory_.size() - 1];
    if (!succeeded(cudaSetDevice(device), device, "cudaSetDevice", error)
        || !succeeded(cudaMalloc(reinterpret_cast<void**>(&memory.pieces),
                                 static_cast<std::size_t>(pieces) * sizeof(uint4)),
                      device, "memory for parts of sums", error)
        || !succeeded(cudaMalloc(reinterpret_cast<void**>(&memory.own), sizeof(rank_progress)),
                      device, "memory for counters", error)
        || !succeeded(cudaMemset(memory.own, 0, sizeof(rank_progress)), device, "clearing counters",
                      error)
        || !succeeded(load_nccl_kernels(), device, "loading kernels", error)) {
      return false;
    }
  }
  return true;
}

/// A sum of few rows, and one of many.
bool nccl_group::rehearse(std::int32_t num_cols, milliseconds patience, std::string& error) {
  const auto most_rows = static_cast<std::int32_t>(most_ / pieces_per_row<bf16>(num_cols));
  const auto num_rows = size() > 2 ? std::min<std::int32_t>(
                          most_rows, static_cast<std::int32_t>(kMostGathered) * 8 / num_cols + 1)
                                   : 1;
  const auto until = steady_clock::now() + patience;
  std::vector<std::string> errors(devices_.size());
  const auto rehearse_rank = [&](std::int32_t rank) {
    const auto device = devices_[rank];
    void* memory = nullptr;
    cudaStream_t stream = nullptr;
    bool ok = succeeded(cudaSetDevice(device), device, "cudaSetDevice", errors[rank])
              && succeeded(cudaMalloc(&memory, sizeof(bf16) * num_rows * num_cols), device,
                           "memory for a rehearsal", errors[rank])
              && succeeded(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), device,
                           "cudaStreamCreate", errors[rank]);
    if (ok) {
      for (const auto count : {1, num_rows}) {
        add_up(stream, rank, rows_of_bf16{static_cast<bf16*>(memory), count, num_cols, num_cols});
      }
      auto status = cudaStreamQuery(stream);
      while (status == cudaErrorNotReady && !has_failed(rank) && steady_clock::now() < until) {
        std::this_thread::sleep_for(std::chrono::microseconds(100));
        status = cudaStreamQuery(stream);
      }
      ok = succeeded(status, device, "a sum over GPUs", errors[rank]);
    }
    if (!ok) {
      communicators_->give_up("rank " + std::to_string(rank) + ": " + errors[rank]);
    }
    if (stream != nullptr) {
      cudaStreamDestroy(stream);
    }
    if (ok) { // otherwise kernels may still use it
      cudaFree(memory);
    }
  };
  std::vector<std::thread> threads;
  for (std::int32_t rank = 0; rank < size(); ++rank) {
    threads.emplace_back(rehearse_rank, rank);
  }
  for (auto& thread : threads) {
    thread.join();
  }
  error = communicators_->failure(-1);
  return error.empty();
}

bool nccl_group::add_up(cudaStream_t stream, std::int32_t rank, const rows_of<bf16>& x) {
  return add_up_rows(stream, rank, x);
}

bool nccl_group::add_up(cudaStream_t stream, std::int32_t rank, const rows_of<float>& x) {
  return add_up_rows(stream, rank, x);
}

template <class T>
bool nccl_group::add_up_rows(cudaStream_t stream, std::int32_t rank, const rows_of<T>& x) {
  if (x.num_rows == 0 || x.num_cols == 0) {
    return true;
  }
  const auto row = pieces_per_row<T>(x.num_cols);
  const auto rows_at_once =
    static_cast<std::int32_t>(std::min<std::int64_t>(most_ / row, x.num_rows));
  if (rows_at_once == 0) {
    return false;
  }
  for (std::int32_t first = 0; first < x.num_rows && !has_failed(rank); first += rows_at_once) {
    const auto part = pieces_of(x, first, std::min(rows_at_once, x.num_rows - first));
    if (size() == 2 || part.count <= kMostGathered) {
      gather(stream, rank, part);
    } else {
      share_out(stream, rank, part);
    }
  }
  return true;
}

template <class T>
void nccl_group::gather(cudaStream_t stream, std::int32_t rank, const pieces_of_rows<T>& x) {
  const auto& memory = memory_[rank];
  launch_collect(stream, x, memory.pieces + std::size_t{x.count} * rank, memory);
  if (communicators_->all_gather(rank, memory.pieces, x.count * sizeof(uint4), stream)) {
    launch_add_all(stream, memory.pieces, size(), x, memory);
  }
}

template <class T>
void nccl_group::share_out(cudaStream_t stream, std::int32_t rank, const pieces_of_rows<T>& x) {
  const auto& memory = memory_[rank];
  const auto share = share_of(x.count, size());
  const auto bytes = share * sizeof(uint4);
  uint4* const mine = memory.pieces;
  uint4* const others = memory.pieces + std::size_t{share} * size();
  launch_collect(stream, x, mine, memory);
  if (!communicators_->all_to_all(rank, mine, others, bytes, stream)) {
    return;
  }
  launch_add_share<T>(stream, mine + std::size_t{share} * rank, others, size(), rank, share);
  if (communicators_->all_gather(rank, mine, bytes, stream)) {
    launch_hand_back(stream, mine, x, memory);
  }
}

void nccl_group::give_up(std::int32_t rank, const std::string& why) {
  if (!communicators_->has_failed()) {
    communicators_->give_up("rank " + std::to_string(rank) + " has failed: " + why);
  }
}

} // namespace troupe::kernels::cuda
