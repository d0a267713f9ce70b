#pragma once

#include "troupe/messages/cluster_protocol.hpp"
#include "serving.pb.h"

/// The way of a micro-batch.
///
///   scheduler --run_micro_batch--> every stage of the replica
///   stage i   ==BOUNDARY frame===> stage i + 1                (transport)
///   stage i   ==DISPATCH frame===> expert groups ==COMBINE==> stage i
///   last stage --micro_batch_done--> scheduler
///
/// Everything here is idempotent: a message may be sent again in a newer epoch and has the
/// same effect as the first. Whoever has seen an epoch drops what carries an older one.
/// A stage whose scheduler is gone finishes what it has and waits; a scheduler whose stage is gone
/// pauses until a view says that the stage runs again, and then sends every micro-batch
/// in flight once more.
namespace troupe::messages {

using run_micro_batch = wire<proto::RunMicroBatch>;
using micro_batch_done = wire<proto::MicroBatchDone>;
using micro_batch_failed = wire<proto::MicroBatchFailed>;

/// Asks a worker for the handle of its stage (replica, index).
using stage_atom = caf::atom_constant<caf::atom("stage")>;

/// Answered with the same number: times the control plane (`troupe bench`).
using ping_atom = caf::atom_constant<caf::atom("ping")>;

using scheduler_actor =
  caf::typed_actor<caf::reacts_to<micro_batch_done>, caf::reacts_to<micro_batch_failed>>;

/// Answers go to the sender of run_micro_batch, which must be a scheduler_actor.
using stage_actor = caf::typed_actor<caf::reacts_to<run_micro_batch>>;

using worker_actor =
  caf::typed_actor<caf::reacts_to<worker_assignment>, caf::reacts_to<cluster_view>,
                   caf::replies_to<stage_atom, std::uint32_t, std::uint32_t>::with<stage_actor>,
                   caf::replies_to<ping_atom, std::uint64_t>::with<std::uint64_t>>;

} // namespace troupe::messages
