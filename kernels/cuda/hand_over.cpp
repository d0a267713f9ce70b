#include "troupe/kernels/cuda/hand_over.hpp"

#include "troupe/kernels/cuda/backend.hpp"

namespace troupe::kernels::cuda {

void cuda_ops::leave_rows(const rows_view& from, std::uint64_t oldest, void* block,
                          std::size_t offset) {
  if (!begin_waiting(from.num_rows)) {
    return;
  }
  with_elements(
    [&]<class T>() { launch_leave_rows(stream_, as_rows<T>(from), oldest, block, offset); });
  launched("leave_rows");
  synchronise();
}

fetched_rows cuda_ops::fetch_rows(const void* block, std::size_t offset, std::uint64_t ticket,
                                  const rows_view& to) {
  if (!begin_waiting(to.num_rows)) {
    return gpu_.ok() ? fetched_rows::whole : fetched_rows::gone;
  }
  // Pinned memory, to which the kernel writes itself: a copy of its own would take as long as that
  // of the rows.
  auto* notes = static_cast<fetch_notes*>(download_.take(sizeof(fetch_notes)));
  if (!gpu_.ok()) {
    return fetched_rows::gone;
  }
  *notes = {};
  with_elements(
    [&]<class T>() { launch_fetch_rows(stream_, block, offset, ticket, as_rows<T>(to), notes); });
  launched("fetch_rows");
  synchronise();
  if (!gpu_.ok() || notes->are_gone != 0) {
    return fetched_rows::gone;
  }
  return notes->not_finite != 0 ? fetched_rows::not_finite : fetched_rows::whole;
}

} // namespace troupe::kernels::cuda
