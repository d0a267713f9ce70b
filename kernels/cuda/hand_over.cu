#include "troupe/kernels/cuda/hand_over.hpp"

#include <algorithm>
#include <type_traits>

namespace troupe::kernels::cuda {

namespace {

constexpr unsigned kThreads = 256;

/// Enough to have the latency of another GPU's memory hidden by the number of reads under way.
constexpr std::uint32_t kMostBlocks = 512;

/// Up to so many units, rows are left by a single block, in one launch together with the number.
constexpr std::uint32_t kFewUnits = 4096;
constexpr unsigned kThreadsForFew = 1024;

/// Rows of T in units that are one of them, or 16 bytes of them.
template <class T, class Unit>
struct copying {
  const Unit* from;
  std::int64_t from_stride;
  Unit* to;
  std::int64_t to_stride;
  std::uint32_t width;
  std::uint32_t count;
};

/// A single element of 2 or 4 bytes.
template <class T>
using element_bits = std::conditional_t<sizeof(T) == 2, unsigned short, unsigned>;

template <class T>
__device__ bool has_other_values(element_bits<T> bits) {
  constexpr unsigned kExponent = sizeof(T) == 2 ? 0x7F80U : 0x7F800000U;
  return (bits & kExponent) == kExponent;
}

template <class T>
__device__ bool has_other_values(const uint4& bits) {
  bool found = false;
  for (const unsigned word : {bits.x, bits.y, bits.z, bits.w}) {
    found |= sizeof(T) == 2 && (word & 0x7F80U) == 0x7F80U;
    found |= (word & 0x7F800000U) == 0x7F800000U;
  }
  return found;
}

/// Copies this thread's share and says whether a value of it is not finite. Reads are volatile: the
/// memory may be another GPU's, and the rows must not come from a cache here.
template <class T, class Unit>
__device__ bool copy_share(const copying<T, Unit>& rows) {
  bool found = false;
  for (auto i = blockIdx.x * blockDim.x + threadIdx.x; i < rows.count;
       i += gridDim.x * blockDim.x) {
    const std::int64_t row = i / rows.width;
    const std::int64_t col = i % rows.width;
    const Unit value = __ldcv(rows.from + row * rows.from_stride + col);
    rows.to[row * rows.to_stride + col] = value;
    found |= has_other_values<T>(value);
  }
  return found;
}

__device__ void write_everywhere(std::uint64_t value, volatile std::uint64_t* at) {
  *at = value;
  __threadfence_system();
}

__global__ void write_oldest(std::uint64_t oldest, std::uint64_t* at) {
  write_everywhere(oldest, at);
}

template <class T, class Unit>
__global__ void __launch_bounds__(kThreads) leave_rows(copying<T, Unit> rows) {
  copy_share(rows);
}

/// One block.
template <class T, class Unit>
__global__ void __launch_bounds__(kThreadsForFew)
  leave_few_rows(copying<T, Unit> rows, std::uint64_t oldest, std::uint64_t* at) {
  if (threadIdx.x == 0) {
    write_everywhere(oldest, at);
  }
  __syncthreads();
  copy_share(rows);
}

template <class T, class Unit>
__global__ void __launch_bounds__(kThreads)
  fetch_rows(copying<T, Unit> rows, const std::uint64_t* oldest_at, std::uint64_t ticket,
             fetch_notes* notes) {
  // What the block has read it has also stored, so it was read before the barrier.
  const bool not_finite = __syncthreads_or(copy_share(rows) ? 1 : 0) != 0;
  if (threadIdx.x == 0) {
    __threadfence_system();
    const std::uint64_t oldest = *static_cast<const volatile std::uint64_t*>(oldest_at);
    if (oldest == 0 || oldest > ticket) {
      *static_cast<volatile std::int32_t*>(&notes->are_gone) = 1;
    }
    if (not_finite) {
      *static_cast<volatile std::int32_t*>(&notes->not_finite) = 1;
    }
    __threadfence_system();
  }
}

template <class Unit, class T>
copying<T, Unit> in_units(const rows_of<T>& from, const rows_of<T>& to) {
  constexpr std::int64_t kUnit = sizeof(Unit) / sizeof(T);
  const auto width = static_cast<std::uint32_t>(to.num_cols / kUnit);
  return {reinterpret_cast<const Unit*>(from.data),
          from.stride / kUnit,
          reinterpret_cast<Unit*>(to.data),
          to.stride / kUnit,
          width,
          static_cast<std::uint32_t>(to.num_rows) * width};
}

std::uint32_t num_blocks(std::uint32_t count) {
  return std::clamp<std::uint32_t>((count + kThreads - 1) / kThreads, 1, kMostBlocks);
}

template <class T, class Unit>
void launch_leave(cudaStream_t stream, const copying<T, Unit>& rows, std::uint64_t oldest,
                  std::uint64_t* at) {
  if (rows.count <= kFewUnits) {
    leave_few_rows<<<1, kThreadsForFew, 0, stream>>>(rows, oldest, at);
    return;
  }
  write_oldest<<<1, 1, 0, stream>>>(oldest, at);
  leave_rows<<<num_blocks(rows.count), kThreads, 0, stream>>>(rows);
}

template <class T, class Unit>
void launch_fetch(cudaStream_t stream, const copying<T, Unit>& rows, const std::uint64_t* oldest_at,
                  std::uint64_t ticket, fetch_notes* notes) {
  fetch_rows<<<num_blocks(rows.count), kThreads, 0, stream>>>(rows, oldest_at, ticket, notes);
}

/// Whether rows consist of whole units of 16 bytes.
template <class T>
bool is_even(const rows_of<T>& x) {
  constexpr std::int64_t kUnit = sizeof(uint4) / sizeof(T);
  return x.num_cols % kUnit == 0 && x.stride % kUnit == 0
         && reinterpret_cast<std::uintptr_t>(x.data) % sizeof(uint4) == 0;
}

/// Rows in a block, as many as `like`.
template <class T>
rows_of<T> rows_in(const void* block, std::size_t offset, const rows_of<T>& like) {
  auto* bytes = const_cast<unsigned char*>(static_cast<const unsigned char*>(block)) + offset;
  return {reinterpret_cast<T*>(bytes), like.num_rows, like.num_cols, like.num_cols};
}

} // namespace

template <class T>
void launch_leave_rows(cudaStream_t stream, const rows_of<T>& from, std::uint64_t oldest,
                       void* block, std::size_t offset) {
  const auto to = rows_in(block, offset, from);
  auto* at = static_cast<std::uint64_t*>(block);
  if (is_even(from) && is_even(to)) {
    launch_leave(stream, in_units<uint4>(from, to), oldest, at);
  } else {
    launch_leave(stream, in_units<element_bits<T>>(from, to), oldest, at);
  }
}

template <class T>
void launch_fetch_rows(cudaStream_t stream, const void* block, std::size_t offset,
                       std::uint64_t ticket, const rows_of<T>& to, fetch_notes* notes) {
  const auto from = rows_in(block, offset, to);
  const auto* at = static_cast<const std::uint64_t*>(block);
  if (is_even(from) && is_even(to)) {
    launch_fetch(stream, in_units<uint4>(from, to), at, ticket, notes);
  } else {
    launch_fetch(stream, in_units<element_bits<T>>(from, to), at, ticket, notes);
  }
}

template void launch_leave_rows(cudaStream_t, const rows_of<bf16>&, std::uint64_t, void*,
                                std::size_t);
template void launch_fetch_rows(cudaStream_t, const void*, std::size_t, std::uint64_t,
                                const rows_of<bf16>&, fetch_notes*);
template void launch_leave_rows(cudaStream_t, const rows_of<float>&, std::uint64_t, void*,
                                std::size_t);
template void launch_fetch_rows(cudaStream_t, const void*, std::size_t, std::uint64_t,
                                const rows_of<float>&, fetch_notes*);

} // namespace troupe::kernels::cuda
