#include "troupe/kernels/cuda/rank_group.hpp"

#include <algorithm>
#include <atomic>

#include <cuda_runtime_api.h>

#include "troupe/kernels/cuda/peer_memory.hpp"

namespace troupe::kernels::cuda {

namespace {

/// Larger rows are added up in parts of so many pieces: 128 MiB, which takes 0.4 ms and more.
constexpr std::int64_t kMostPieces = std::int64_t{8} << 20;

/// What the `few` way takes at most, and where it is the faster one: pieces of 16 bytes that a rank
/// writes to all others together.
constexpr std::uint32_t kMostFew = std::uint32_t{64} << 10;
constexpr std::uint32_t kBestFew = std::uint32_t{24} << 10;

bool check(cudaError_t status, const char* what, std::string& error) {
  if (status != cudaSuccess) {
    cudaGetLastError();
    error = std::string(what) + ": " + cudaGetErrorName(status) + ": " + cudaGetErrorString(status);
  }
  return status == cudaSuccess;
}

} // namespace

std::shared_ptr<rank_group> rank_group::make(std::span<const std::int32_t> devices,
                                             std::int32_t max_rows, std::int32_t num_cols,
                                             std::chrono::milliseconds deadline,
                                             std::string& error) {
  const std::shared_ptr<rank_group> result(new rank_group);
  result->devices_.assign(devices.begin(), devices.end());
  result->deadline_ = deadline;
  const auto num_ranks = result->size();
  void* notes = nullptr;
  if (!check(cudaSetDevice(devices.front()), "cudaSetDevice", error)
      || !check(cudaHostAlloc(&notes, kMostRanks * sizeof(std::uint32_t),
                              cudaHostAllocPortable | cudaHostAllocMapped),
                "memory for notes", error)) {
    return nullptr;
  }
  result->notes_ = {static_cast<std::uint32_t*>(notes), [](void* at) { cudaFreeHost(at); }};
  std::fill_n(result->notes_.get(), kMostRanks, 0U);
  if (num_ranks == 1) {
    return result;
  }

  result->most_few_blocks_ = result->most_many_blocks_ = std::int32_t{1} << 20;
  for (const std::int32_t device : devices) {
    std::int32_t few = 0;
    std::int32_t many = 0;
    int processors = 0;
    if (!check(cudaSetDevice(device), "cudaSetDevice", error)
        || !check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
                  "cudaDeviceGetAttribute", error)
        || !check(load_exchange(num_ranks, few, many), "loading kernels", error)) {
      return nullptr;
    }
    const auto sharing =
      static_cast<std::int32_t>(std::count(devices.begin(), devices.end(), device));
    // Two blocks of the second way keep a multiprocessor busy: one waits while the other copies.
    result->most_few_blocks_ = std::min(result->most_few_blocks_, few * processors / sharing);
    result->most_many_blocks_ =
      std::min(result->most_many_blocks_, std::max(std::min(many, 2) * processors / sharing, 1));
  }

  auto& layout = result->layout_;
  layout.num_ranks = num_ranks;
  const std::int64_t row = pieces_per_row<bf16>(num_cols);
  const std::int64_t most = std::max(std::min(row * max_rows, kMostPieces), row);
  layout.most_many = static_cast<std::uint32_t>(most);
  layout.most_few =
    static_cast<std::uint32_t>(std::min<std::int64_t>(most, kMostFew / (num_ranks - 1)));
  for (const std::int32_t device : devices) {
    auto memory = make_peer_memory(device, devices, layout.num_bytes(), error);
    if (memory == nullptr) {
      return nullptr;
    }
    result->memory_.push_back(std::move(memory));
  }
  return result;
}

template <class T>
bool rank_group::add_up(cudaStream_t stream, std::int32_t rank, const rows_of<T>& x,
                        exchange_way way) const {
  if (size() == 1 || x.num_rows == 0 || x.num_cols == 0) {
    return true;
  }
  const auto row = pieces_per_row<T>(x.num_cols);
  const auto rows_at_once =
    static_cast<std::int32_t>(std::min<std::int64_t>(layout_.most_many / row, x.num_rows));
  if (rows_at_once == 0) {
    return false;
  }
  rank_view view;
  view.layout = layout_;
  view.rank = rank;
  for (std::int32_t r = 0; r < size(); ++r) {
    view.memory[r] = memory_[r].get();
  }
  view.note = notes_.get() + rank;
  view.deadline_ns = static_cast<std::uint64_t>(std::chrono::nanoseconds(deadline_).count());
  for (std::int32_t first = 0; first < x.num_rows; first += rows_at_once) {
    const auto count = std::min(rows_at_once, x.num_rows - first);
    const auto part = pieces_of(x, first, count);
    const bool fits = part.count <= layout_.most_few
                      && (part.count + kFewThreads - 1) / kFewThreads
                           <= static_cast<std::uint32_t>(most_few_blocks_);
    const auto best = part.count * (size() - 1U) <= kBestFew;
    if (fits && (way == exchange_way::few || (way == exchange_way::best && best))) {
      launch_few(stream, view, part);
    } else {
      launch_many(stream, view, part, most_many_blocks_);
    }
  }
  return true;
}

template bool rank_group::add_up(cudaStream_t, std::int32_t, const rows_of<bf16>&,
                                 exchange_way) const;
template bool rank_group::add_up(cudaStream_t, std::int32_t, const rows_of<float>&,
                                 exchange_way) const;

std::uint32_t rank_group::read_note(std::int32_t rank) const {
  return std::atomic_ref(notes_.get()[rank]).load(std::memory_order_acquire);
}

std::string rank_group::failure(std::int32_t rank) const {
  const std::uint32_t note = read_note(rank);
  if (note == 0) {
    return {};
  }
  const auto who = static_cast<std::int32_t>(note >> 8) - 1;
  const auto whom = static_cast<std::int32_t>(note & 0xFFU) - 1;
  return waited_in_vain(rank, who, whom, deadline_.count());
}

} // namespace troupe::kernels::cuda
