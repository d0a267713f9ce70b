#include "troupe/actors/boundary.hpp"

#include <algorithm>
#include <utility>

namespace troupe::actors {

namespace {

/// Largest room that is set aside for more than two of the largest micro-batches.
constexpr std::size_t usual_outbox_bytes = std::size_t{64} << 20;

/// Tickets of one process. Incarnations of a block's processes differ in their lower bits.
constexpr int ticket_bits = 40;

bool is_gpu(const std::string& device) {
  return device.starts_with("cuda:");
}

std::size_t aligned(std::size_t bytes) {
  constexpr auto unit = boundary_outbox::alignment;
  return (bytes + unit - 1) / unit * unit;
}

} // namespace

bool meet_on_devices(const proto::WorkerPlan& sender, const proto::WorkerPlan& successor) {
  return sender.node() == successor.node() && is_gpu(sender.device()) && is_gpu(successor.device())
         && successor.device().find(',') == std::string::npos;
}

std::size_t outbox_bytes(std::uint32_t num_stages, std::size_t most_rows, std::size_t row_bytes) {
  auto largest = aligned(most_rows * row_bytes);
  // stages + 1 micro-batches are in flight, one that is complete may not be dropped yet, and the
  // end of the block may be too short for the next.
  return boundary_outbox::alignment
         + std::min((num_stages + 3) * largest, std::max(2 * largest, usual_outbox_bytes));
}

boundary_outbox::boundary_outbox(std::shared_ptr<boundary_device> device, proto::DevicePlace block,
                                 std::uint64_t incarnation, std::size_t element_bytes)
  : device_(std::move(device)),
    block_(std::move(block)),
    element_bytes_(element_bytes),
    ring_(block_.block_bytes() - alignment, alignment, (incarnation << ticket_bits) + 1) {}

std::shared_ptr<const left_rows> boundary_outbox::leave(const kernels::rows_view& rows) {
  auto bytes = static_cast<std::size_t>(rows.num_rows) * static_cast<std::size_t>(rows.num_cols)
               * element_bytes_;
  std::unique_lock lock(mutex_);
  auto piece = ring_.take(bytes);
  auto oldest = ring_.oldest();
  lock.unlock();
  if (!piece)
    return nullptr;
  auto give_back = [self = shared_from_this(), number = piece->number](left_rows* owned) {
    delete owned;
    std::lock_guard guard(self->mutex_);
    self->ring_.give_back(number);
  };
  std::shared_ptr<left_rows> left(new left_rows{block_, rows.num_rows, rows.num_cols},
                                  std::move(give_back));
  left->place.set_offset(alignment + piece->begin);
  left->place.set_ticket(piece->number);
  device_->leave(left->place.offset(), oldest, rows);
  return left;
}

void boundary_outbox::read_back(const left_rows& rows, void* to) {
  device_->read_back(rows.place.offset(), rows.num_rows, rows.num_cols, to);
}

std::size_t boundary_outbox::num_left() const {
  std::lock_guard lock(mutex_);
  return ring_.num_taken();
}

} // namespace troupe::actors
