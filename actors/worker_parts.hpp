#pragma once

#include "troupe/actors/data_plane.hpp"
#include "troupe/kernels/ops.hpp"
#include "troupe/memory/segment.hpp"
#include "troupe/model/deepseek.hpp"
#include "troupe/model/expert_group_model.hpp"
#include "troupe/actors/remote_experts.hpp"
#include "cluster.pb.h"

#include <memory>
#include <vector>

namespace troupe::actors {

/// What a stage computes with. Members are destroyed in reverse: `ops` last.
struct loaded_stage {
  proto::ActorPlan plan;
  std::shared_ptr<kernels::ops> ops;
  std::shared_ptr<memory::segment> kv;
  std::shared_ptr<model::stage_model> model;
  std::shared_ptr<remote_experts> experts; ///< null where the stage has its own
};

/// What an expert group computes with.
struct loaded_expert_group {
  proto::ActorPlan plan;
  std::shared_ptr<kernels::ops> ops;
  std::shared_ptr<model::expert_group_model> experts;
};

/// Everything that a worker's actors stand on.
struct worker_parts {
  std::shared_ptr<data_plane> plane;
  std::vector<loaded_stage> stages;
  std::vector<loaded_expert_group> expert_groups;
};

/// Reads what the assignment asks for: maps the weights, attaches the KV memory, opens the
/// transport. Blocks on files; call it on a thread of its own.
expected<std::shared_ptr<worker_parts>> load_parts(const proto::WorkerAssignment& assignment,
                                                   std::uint64_t incarnation);

} // namespace troupe::actors
