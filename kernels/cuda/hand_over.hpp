#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime_api.h>

#include "troupe/kernels/cuda/kernels.hpp"

/// Rows that one GPU leaves in a block of its memory, and another, or another process on the same,
/// takes from there.
///
/// The taker cannot tell the owner to wait, so the owner may put other rows there while these are
/// being read. Rows have ascending tickets, and the block begins with a number: rows with lower
/// tickets may be gone (0: all). The owner raises the number and, in a later kernel, overwrites;
/// the taker reads rows first and the number afterwards. If anything that it read was of a later
/// use, the number for that use was there before, and the taker sees it (Lamport, "Concurrent
/// reading and writing", CACM 1977).
namespace troupe::kernels::cuda {

/// Raises the number of `block` and copies rows to `offset` of it, dense.
template <class T>
void launch_leave_rows(cudaStream_t stream, const rows_of<T>& from, std::uint64_t oldest,
                       void* block, std::size_t offset);

/// What fetching found out, in memory of any kind; both 0 before.
struct fetch_notes {
  std::int32_t are_gone;   ///< 1: they may have been others
  std::int32_t not_finite; ///< 1: not all values are
};

/// The same back.
template <class T>
void launch_fetch_rows(cudaStream_t stream, const void* block, std::size_t offset,
                       std::uint64_t ticket, const rows_of<T>& to, fetch_notes* notes);

} // namespace troupe::kernels::cuda
