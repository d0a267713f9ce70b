#include "troupe/kernels/cuda/hand_over.hpp"

#include <algorithm>

namespace troupe::kernels::cuda {

namespace {

constexpr unsigned kThreads = 256;

/// Enough to have the latency of another GPU's memory hidden by the number of reads under way.
constexpr std::uint32_t kMostBlocks = 512;

/// What the taker looks at when it has read.
struct watch {
  const volatile std::uint64_t* oldest = nullptr; ///< null: it is the owner who copies
  std::uint64_t ticket = 0;
  volatile std::int32_t* gone = nullptr;
};

__global__ void write_oldest(std::uint64_t oldest, volatile std::uint64_t* at) {
  *at = oldest;
  __threadfence_system();
}

/// Rows in units of T. Reads are volatile: the memory may be another GPU's, and the rows must not
/// come from a cache here.
template <class T>
__global__ void __launch_bounds__(kThreads)
  copy_rows(const T* from, std::int64_t from_stride, T* to, std::int64_t to_stride,
            std::uint32_t width, std::uint32_t count, watch watched) {
  for (auto i = blockIdx.x * kThreads + threadIdx.x; i < count; i += gridDim.x * kThreads) {
    const std::int64_t row = i / width;
    const std::int64_t col = i % width;
    to[row * to_stride + col] = __ldcv(from + row * from_stride + col);
  }
  if (watched.oldest == nullptr) {
    return;
  }
  // What the block has read it has also stored, so it was read before the barrier.
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence_system();
    const std::uint64_t oldest = *watched.oldest;
    if (oldest == 0 || oldest > watched.ticket) {
      *watched.gone = 1;
      __threadfence_system();
    }
  }
}

template <class T>
void launch_copy_rows(cudaStream_t stream, const rows_of_bf16& from, const rows_of_bf16& to,
                      const watch& watched) {
  constexpr std::int64_t kUnit = sizeof(T) / sizeof(bf16);
  const auto width = static_cast<std::uint32_t>(to.num_cols / kUnit);
  const auto count = static_cast<std::uint32_t>(to.num_rows) * width;
  const auto blocks = std::clamp<std::uint32_t>((count + kThreads - 1) / kThreads, 1, kMostBlocks);
  copy_rows<T><<<blocks, kThreads, 0, stream>>>(reinterpret_cast<const T*>(from.data),
                                                from.stride / kUnit, reinterpret_cast<T*>(to.data),
                                                to.stride / kUnit, width, count, watched);
}

bool is_even(const rows_of_bf16& x) {
  constexpr std::int64_t kUnit = sizeof(uint4) / sizeof(bf16);
  return x.num_cols % kUnit == 0 && x.stride % kUnit == 0
         && reinterpret_cast<std::uintptr_t>(x.data) % sizeof(uint4) == 0;
}

void copy(cudaStream_t stream, const rows_of_bf16& from, const rows_of_bf16& to,
          const watch& watched) {
  if (is_even(from) && is_even(to)) {
    launch_copy_rows<uint4>(stream, from, to, watched);
  } else {
    launch_copy_rows<unsigned short>(stream, from, to, watched);
  }
}

/// Rows in a block, as many as `like`.
rows_of_bf16 rows_in(const void* block, std::size_t offset, const rows_of_bf16& like) {
  auto* bytes = const_cast<unsigned char*>(static_cast<const unsigned char*>(block)) + offset;
  return {reinterpret_cast<bf16*>(bytes), like.num_rows, like.num_cols, like.num_cols};
}

} // namespace

void launch_write_oldest(cudaStream_t stream, std::uint64_t oldest, void* block) {
  write_oldest<<<1, 1, 0, stream>>>(oldest, static_cast<std::uint64_t*>(block));
}

void launch_leave_rows(cudaStream_t stream, const rows_of_bf16& from, void* block,
                       std::size_t offset) {
  copy(stream, from, rows_in(block, offset, from), {});
}

void launch_fetch_rows(cudaStream_t stream, const void* block, std::size_t offset,
                       std::uint64_t ticket, const rows_of_bf16& to, std::int32_t* gone) {
  copy(stream, rows_in(block, offset, to), to,
       {static_cast<const std::uint64_t*>(block), ticket, gone});
}

} // namespace troupe::kernels::cuda
