#include "troupe/kernels/cuda/hand_over.hpp"

#include "troupe/kernels/cuda/backend.hpp"

namespace troupe::kernels::cuda {

void cuda_ops::leave_rows(const rows_view& from, std::uint64_t oldest, void* block,
                          std::size_t offset) {
  if (!begin_waiting(from.num_rows)) {
    return;
  }
  launch_write_oldest(stream_, oldest, block);
  launch_leave_rows(stream_, as_bf16(from), block, offset);
  launched("leave_rows");
  synchronise();
}

bool cuda_ops::fetch_rows(const void* block, std::size_t offset, std::uint64_t ticket,
                          const rows_view& to) {
  if (!begin_waiting(to.num_rows)) {
    return gpu_.ok();
  }
  // Pinned memory, to which the kernel writes itself: a copy of its own would take as long as that
  // of the rows.
  auto* gone = static_cast<std::int32_t*>(download_.take(sizeof(std::int32_t)));
  if (!gpu_.ok()) {
    return false;
  }
  *gone = 0;
  launch_fetch_rows(stream_, block, offset, ticket, as_bf16(to), gone);
  launched("fetch_rows");
  synchronise();
  return gpu_.ok() && *gone == 0;
}

} // namespace troupe::kernels::cuda
