#pragma once

#include "troupe/actors/boundary.hpp"
#include "troupe/actors/data_plane.hpp"
#include "troupe/actors/device_watch.hpp"
#include "troupe/actors/gpu_device.hpp"
#include "troupe/kernels/ops.hpp"
#include "troupe/memory/page_seals.hpp"
#include "troupe/memory/pulse_page.hpp"
#include "troupe/memory/segment.hpp"
#include "troupe/model/expert_group_model.hpp"
#include "troupe/model/model_config.hpp"
#include "troupe/model/stage_group.hpp"
#include "troupe/model/tensor_source.hpp"
#include "troupe/actors/remote_experts.hpp"
#include "cluster.pb.h"

#include <atomic>
#include <memory>
#include <vector>

namespace troupe::actors {

/// What a stage computes with. Members are destroyed in reverse: `ops` last.
struct loaded_stage {
  proto::ActorPlan plan;
  std::vector<std::shared_ptr<kernels::ops>> ops; ///< by rank, one a device
  std::shared_ptr<memory::segment> kv;            ///< on CPUs: the pages of rank 0, then of rank 1
  std::vector<std::shared_ptr<void>> device_kv;   ///< on GPUs, by rank
  std::shared_ptr<model::stage_group> model;
  std::shared_ptr<remote_experts> experts;   ///< null where the stage has its own
  memory::activity pulse;                    ///< of its computing thread
  std::shared_ptr<memory::page_seals> seals; ///< null where the KV memory has no room for them
  std::shared_ptr<boundary_device> boundary; ///< null: hidden rows come and go by the host
  std::shared_ptr<boundary_outbox> outbox;   ///< null: they go by the host
  std::shared_ptr<device_watch> watch;       ///< null where nobody can say what is too long
};

/// What an expert group computes with.
struct loaded_expert_group {
  proto::ActorPlan plan;
  std::shared_ptr<kernels::ops> ops;
  std::shared_ptr<model::expert_group_model> experts;
  memory::activity pulse;              ///< of its thread
  std::shared_ptr<device_watch> watch; ///< null where nobody can say what is too long
};

/// Everything that a worker's actors stand on.
struct worker_parts {
  std::shared_ptr<data_plane> plane;
  std::vector<loaded_stage> stages;
  std::vector<loaded_expert_group> expert_groups;
  std::vector<std::shared_ptr<gpu_device>> gpus; ///< by rank; none on CPUs
};

/// What a worker needs whatever its part is to be: a standby has it ready.
struct prepared_parts {
  model::model_config config;
  std::shared_ptr<model::tensor_source> weights;
  std::shared_ptr<data_plane> plane;             ///< open, not yet named
  std::vector<std::shared_ptr<gpu_device>> gpus; ///< none on CPUs
};

/// What a standby has loaded of the worker whose place it may take.
struct parts_ahead {
  proto::WorkerAssignment assignment; ///< that worker's, without a name
  std::vector<std::shared_ptr<gpu_device>> gpus;
  std::shared_ptr<worker_parts> parts; ///< without a transport; what knows peers is missing
};

/// Reads the model's configuration, maps its files, opens the transport and, where the assignment
/// names one, the GPU. Blocks on files; call it on a thread of its own.
expected<prepared_parts> prepare_parts(const proto::WorkerAssignment& assignment);

/// For a standby, on GPUs: everything that the running worker of `assignment`, which has no name,
/// has, but what its peers know of. Weights and KV pages are those of the keeper, and used by that
/// worker; nothing is written there. Steps are recorded. Ends early, with less, when `hurry`
/// becomes true. Errors: unavailable, also where there is too little memory for two. Takes up to
/// seconds; call it on a thread of its own.
expected<std::shared_ptr<parts_ahead>> load_ahead(const prepared_parts& prepared,
                                                  const proto::WorkerAssignment& assignment,
                                                  memory::pulse& pulse,
                                                  const std::atomic<bool>& hurry);

/// Reads what the assignment asks for: its actors with their weights, and the KV memory of its
/// stages from the process that owns it. Each actor gets an activity of `pulse`. What `ahead` has
/// of that is used; null: nothing. Blocks on files; call it on a thread of its own.
expected<std::shared_ptr<worker_parts>> load_parts(prepared_parts prepared,
                                                   std::shared_ptr<parts_ahead> ahead,
                                                   const proto::WorkerAssignment& assignment,
                                                   std::uint64_t incarnation, memory::pulse& pulse);

/// Both at once.
expected<std::shared_ptr<worker_parts>> load_parts(const proto::WorkerAssignment& assignment,
                                                   std::uint64_t incarnation, memory::pulse& pulse);

} // namespace troupe::actors
