#include "troupe/actors/device_needs.hpp"

#include "troupe/actors/boundary.hpp"
#include "troupe/model/device_size.hpp"
#include "troupe/model/tensor_shard.hpp"
#include "troupe/placement/plan.hpp"

#include <algorithm>

#include <fmt/format.h>

namespace troupe::actors {

namespace {

std::int32_t number(std::uint32_t value) {
  return static_cast<std::int32_t>(value);
}

/// Of activations on a GPU.
std::size_t element_bytes(const proto::ClusterPlan& plan) {
  return numerics_of(plan) == kernels::numerics::exact ? sizeof(float) : sizeof(std::uint16_t);
}

placement::device_need need_of_stage(const proto::ActorPlan& stage, const proto::ClusterPlan& plan,
                                     const model::model_config& model) {
  const auto options = stage_options_of(stage, plan, model);
  model::model_part part;
  part.first_layer = options.first_layer;
  part.end_layer = options.end_layer;
  part.end_expert = options.with_local_experts ? model.num_experts : 0;
  part.mtp = options.max_drafts > 0;
  placement::device_need need;
  need.weights = model::device_weight_bytes(model, part, numerics_of(plan));
  const auto ranks = static_cast<std::uint64_t>(model.part.num_ranks);
  need.kv_pages = stage.kv_bytes() / ranks;
  need.scratch = model::device_scratch_bytes(model, options, numerics_of(plan));
  if (ranks > 1) // where the ranks meet: rows of two calls, coming and added up
    need.scratch += 4 * element_bytes(plan) * plan.max_batch_tokens()
                    * static_cast<std::uint64_t>(model.hidden_size);
  need.graphs = placement::graph_bytes(stage.end_layer() - stage.first_layer());
  return need;
}

/// Where a stage leaves rows on its device for the next one: even and odd incarnations.
std::uint64_t outbox_need(const proto::ActorPlan& stage, const proto::ClusterPlan& plan,
                          const model::model_config& model) {
  if (stage.kind() != proto::STAGE || stage.index() + 1 >= plan.num_stages())
    return 0;
  return 2
         * outbox_bytes(plan.num_stages(), plan.max_batch_tokens(),
                        element_bytes(plan) * static_cast<std::size_t>(model.hidden_size));
}

/// What a process has of its own of what it computes with; weights and pages are the keeper's.
placement::device_need own_part(const placement::device_need& need) {
  placement::device_need own;
  own.scratch = need.scratch;
  own.graphs = need.graphs;
  return own;
}

std::uint32_t num_gpu_workers(const proto::ClusterPlan& plan, const std::string& node) {
  return static_cast<std::uint32_t>(
    std::count_if(plan.workers().begin(), plan.workers().end(), [&](const auto& worker) {
      return worker.node() == node && worker.device().starts_with("cuda:")
             && !worker.actors().empty();
    }));
}

placement::device_need need_of_experts(const proto::ActorPlan& group,
                                       const proto::ClusterPlan& plan,
                                       const model::model_config& model) {
  model::model_part part;
  part.trunk = false;
  part.end_layer = model.num_layers;
  part.first_expert = number(group.first_expert());
  part.end_expert = number(group.end_expert());
  part.mtp = plan.draft_tokens() > 0;
  placement::device_need need;
  need.weights = model::device_weight_bytes(model, part, numerics_of(plan));
  need.scratch = model::device_scratch_bytes(model, part.end_expert - part.first_expert,
                                             number(plan.max_batch_tokens()), numerics_of(plan));
  return need;
}

placement::device_need need_of_actor(const proto::ActorPlan& actor, const proto::ClusterPlan& plan,
                                     const model::model_config& model) {
  if (actor.kind() != proto::STAGE)
    return need_of_experts(actor, plan, model);
  // Rank 0 has the head besides.
  auto part =
    model::rank_config(model, 0, std::max(1, number(plan.tensor_ranks()))).value_or(model);
  part.head = head_of(plan);
  return need_of_stage(actor, plan, part);
}

} // namespace

model::head_format head_of(const proto::ClusterPlan& plan) {
  return plan.int8_head() ? model::head_format::int8 : model::head_format::stored;
}

kernels::numerics numerics_of(const proto::ClusterPlan& plan) {
  return plan.fast_numerics() ? kernels::numerics::fast : kernels::numerics::exact;
}

model::stage_options stage_options_of(const proto::ActorPlan& stage, const proto::ClusterPlan& plan,
                                      const model::model_config& model) {
  model::stage_options options;
  options.first_layer = number(stage.first_layer());
  options.end_layer = number(stage.end_layer());
  options.max_rows = number(plan.max_batch_tokens());
  options.with_local_experts = plan.num_expert_groups() == 0;
  options.checks_finite = !plan.unprotected();
  if (options.end_layer == model.num_layers)
    options.max_drafts = number(plan.draft_tokens());
  return options;
}

placement::device_need
device_need_of(const google::protobuf::RepeatedPtrField<proto::ActorPlan>& actors,
               const proto::ClusterPlan& plan, const model::model_config& model) {
  placement::device_need need;
  for (const auto& actor : actors)
    need += need_of_actor(actor, plan, model);
  return need;
}

void note_device_bytes(proto::ClusterPlan& plan, const model::model_config& model) {
  for (auto& worker : *plan.mutable_workers())
    if (worker.device().starts_with("cuda:"))
      for (auto& actor : *worker.mutable_actors())
        actor.set_device_bytes(need_of_actor(actor, plan, model).total()
                               + outbox_need(actor, plan, model));
}

std::vector<planned_device> device_needs(const proto::ClusterPlan& plan,
                                         const model::model_config& model) {
  std::vector<planned_device> result;
  for (const auto& worker : plan.workers()) {
    if (!worker.device().starts_with("cuda:"))
      continue;
    for (const auto& device : placement::devices_of(worker.device())) {
      if (worker.actors().empty())
        continue;
      auto found = std::find_if(result.begin(), result.end(), [&](const auto& one) {
        return one.node == worker.node() && one.device == device;
      });
      if (found == result.end()) {
        planned_device made{worker.node(), device, {}};
        made.need.contexts = placement::context_bytes; // of the keeper
        found = result.insert(result.end(), std::move(made));
      }
      const auto need = device_need_of(worker.actors(), plan, model);
      found->need += need;
      found->need.contexts += placement::context_bytes;
      // Standbys load ahead, each for the worker that has fewest of them.
      const auto num_workers = num_gpu_workers(plan, worker.node());
      for (auto s = plan.standbys(); s > 0; s -= std::min(s, num_workers))
        found->need += own_part(need);
      for (const auto& actor : worker.actors())
        if (device == placement::devices_of(worker.device()).front())
          found->need.scratch += outbox_need(actor, plan, model);
    }
  }
  // Standbys have contexts on all GPUs of their node.
  for (auto& one : result)
    one.need.contexts += placement::context_bytes * plan.standbys();
  return result;
}

expected<void>
check_devices(const proto::ClusterPlan& plan, const model::model_config& model,
              const std::function<std::optional<std::uint64_t>(const planned_device&)>& memory_of) {
  const auto kv_tokens = plan.kv_pages() * plan.page_tokens();
  for (const auto& one : device_needs(plan, model)) {
    const auto memory = memory_of(one);
    if (!memory)
      continue;
    const auto name = fmt::format("{} of {}", one.device, one.node);
    if (auto ok = placement::check_device(name, one.need, *memory, kv_tokens); !ok)
      return ok;
  }
  return {};
}

} // namespace troupe::actors
