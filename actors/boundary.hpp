#pragma once

#include "troupe/base/error.hpp"
#include "troupe/kernels/ops.hpp"
#include "troupe/memory/piece_ring.hpp"
#include "cluster.pb.h"
#include "serving.pb.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

/// How hidden rows get from a stage to the next where both are on GPUs of one node: they stay on
/// the device. The sender leaves them in its outbox, a block that its GPU's keeper owns, so that it
/// outlives the sender; the frame says where they lie, and the receiver copies them from there.
///
///   computed ──▶ left ──ledger drops the step──▶ its room is used again
///
/// A receiver may come too late: a stage that computes a step once more, after a recovery, may read
/// its input when the step is complete everywhere and the room is in use for another. So rows have
/// tickets, which ascend from one to the next and from one process of a stage to its successor, and
/// the block begins with the lowest one that is still valid: written before anything is
/// overwritten, compared after the rows were read. It is the successor's from the first rows that
/// it leaves; until then it may still be given those of its predecessor. A receiver that finds its
/// rows gone, or cannot map the block, asks for them by the host's way (BOUNDARY_WANTED).
namespace troupe::actors {

/// Whether the next stage can take rows from the device of this one. A stage of several devices
/// cannot: each of them copies the rows from the host.
bool meet_on_devices(const proto::WorkerPlan& sender, const proto::WorkerPlan& successor);

/// Room for all steps that a stage can owe, within reason: at least for two of the largest.
std::size_t outbox_bytes(std::uint32_t num_stages, std::size_t most_rows, std::size_t row_bytes);

/// What copies between a stage's device and outboxes. Used by the stage's computing thread.
class boundary_device {
public:
  virtual ~boundary_device() = default;

  /// Copies rows to `offset` of the own outbox, which begins with `oldest` before that. They are
  /// there when it returns.
  virtual void leave(std::size_t offset, std::uint64_t oldest, const kernels::rows_view& rows) = 0;

  /// Copies rows at `offset` of the own outbox to dense host memory.
  virtual void read_back(std::size_t offset, std::int32_t num_rows, std::int32_t num_cols,
                         void* to) = 0;

  /// Copies rows from another stage's outbox. Errors: stale_epoch when they are gone; internal when
  /// they have come and are not all finite; any other when this process cannot get at the block at
  /// all.
  virtual expected<void> fetch(const proto::DevicePlace& from, const kernels::rows_view& to) = 0;
};

/// Rows in an outbox. Their room is used again when the last copy of the pointer is gone.
struct left_rows {
  proto::DevicePlace place;
  std::int32_t num_rows = 0;
  std::int32_t num_cols = 0;
};

/// The outbox of a stage. `leave` and `read_back` are the computing thread's; rows may be given
/// back on any thread.
class boundary_outbox : public std::enable_shared_from_this<boundary_outbox> {
public:
  /// Rows begin at multiples of it; the lowest valid ticket has as much room.
  static constexpr std::size_t alignment = 256;

  /// `block`: keeper, block and block_bytes of every place. `incarnation`: of the process, higher
  /// than of any other that has used the block.
  boundary_outbox(std::shared_ptr<boundary_device> device, proto::DevicePlace block,
                  std::uint64_t incarnation, std::size_t element_bytes);

  /// Null where there is no room at present.
  std::shared_ptr<const left_rows> leave(const kernels::rows_view& rows);

  /// Copies rows that were left to dense host memory.
  void read_back(const left_rows& rows, void* to);

  std::size_t num_left() const;

private:
  std::shared_ptr<boundary_device> device_;
  proto::DevicePlace block_;
  std::size_t element_bytes_;
  mutable std::mutex mutex_; ///< guards the ring
  memory::piece_ring ring_;
};

/// A GPU's, for the stage that computes with `ops`, which are that GPU's (null: not so). With
/// `outbox`, the block that it names is asked of its keeper.
expected<std::shared_ptr<boundary_device>> open_gpu_boundary(std::shared_ptr<kernels::ops> ops,
                                                             const std::string& device,
                                                             const proto::DevicePlace* outbox);

} // namespace troupe::actors
