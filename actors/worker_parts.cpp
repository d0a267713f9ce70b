#include "troupe/actors/worker_parts.hpp"

#include "troupe/model/checkpoint.hpp"
#include "troupe/model/model_config.hpp"

#include <algorithm>
#include <chrono>

#include <fmt/format.h>

namespace troupe::actors {

namespace {

/// Everything that loading one actor needs to know.
struct loader {
  const proto::WorkerAssignment& assignment;
  std::uint64_t incarnation;
  model::model_config config;
  std::shared_ptr<model::checkpoint> weights;
  std::shared_ptr<worker_parts> parts;

  const proto::ClusterPlan& plan() const { return assignment.plan(); }

  std::shared_ptr<kernels::ops> make_ops() const {
    auto threads = std::max<std::uint32_t>(1, plan().compute_threads());
    return kernels::make_cpu_ops(static_cast<std::int32_t>(threads));
  }

  expected<std::shared_ptr<remote_experts>> connect_experts(const loaded_stage& s) const {
    auto groups = static_cast<std::int32_t>(plan().num_expert_groups());
    std::vector<model::expert_range> ranges;
    for (std::int32_t g = 0; g < groups; ++g)
      ranges.push_back({config.num_experts / groups * g, config.num_experts / groups * (g + 1)});
    auto dispatch = model::dispatch_plan::make(ranges, config.num_experts,
                                               static_cast<std::int32_t>(plan().max_batch_tokens()),
                                               config.num_experts_per_token);
    if (!dispatch)
      return tl::unexpected(dispatch.error());
    return std::make_shared<remote_experts>(
      parts->plane, *s.ops, std::move(*dispatch), std::pair{s.plan.replica(), s.plan.index()},
      incarnation, std::chrono::milliseconds(plan().recovery_deadline_ms()));
  }

  expected<void> load_stage(const proto::ActorPlan& actor) {
    loaded_stage s;
    s.plan = actor;
    s.ops = make_ops();
    model::stage_options options;
    options.first_layer = static_cast<std::int32_t>(actor.first_layer());
    options.end_layer = static_cast<std::int32_t>(actor.end_layer());
    options.max_rows = static_cast<std::int32_t>(plan().max_batch_tokens());
    options.with_local_experts = plan().num_expert_groups() == 0;
    auto model = model::stage_model::load(weights, config, options, *s.ops);
    if (!model)
      return tl::unexpected(model.error());
    s.model = std::move(*model);
    for (const auto& kv : assignment.kv()) {
      if (kv.actor() != actor.id())
        continue;
      auto segment = memory::segment::attach(kv.inherited_fd(), kv.bytes());
      if (!segment)
        return tl::unexpected(segment.error());
      s.kv = std::make_shared<memory::segment>(std::move(*segment));
    }
    auto pages = static_cast<std::int32_t>(plan().kv_pages());
    auto page_tokens = static_cast<std::int32_t>(plan().page_tokens());
    auto needed = s.model->kv_bytes(pages, page_tokens);
    if (!s.kv || s.kv->size() < needed)
      return fail(error_code::internal,
                  fmt::format("{} has {} bytes of KV memory where it needs {}", actor.id(),
                              s.kv ? s.kv->size() : 0, needed));
    s.model->attach_kv(s.kv->bytes().data(), pages, page_tokens);
    if (!options.with_local_experts) {
      auto experts = connect_experts(s);
      if (!experts)
        return tl::unexpected(experts.error());
      s.experts = std::move(*experts);
    }
    parts->stages.push_back(std::move(s));
    return {};
  }

  expected<void> load_expert_group(const proto::ActorPlan& actor) {
    loaded_expert_group g;
    g.plan = actor;
    g.ops = make_ops();
    model::expert_range range{static_cast<std::int32_t>(actor.first_expert()),
                              static_cast<std::int32_t>(actor.end_expert())};
    auto experts = model::expert_group_model::load(weights, config, range, *g.ops);
    if (!experts)
      return tl::unexpected(experts.error());
    g.experts = std::move(*experts);
    parts->expert_groups.push_back(std::move(g));
    return {};
  }
};

} // namespace

expected<std::shared_ptr<worker_parts>> load_parts(const proto::WorkerAssignment& assignment,
                                                   std::uint64_t incarnation) {
  const auto& plan = assignment.plan();
  auto config = model::load_model_config(plan.model_path());
  if (!config)
    return tl::unexpected(config.error());
  auto weights = model::checkpoint::open(plan.model_path());
  if (!weights)
    return tl::unexpected(weights.error());
  auto plane = data_plane::start(assignment.name(), incarnation, plan.transport_interface());
  if (!plane)
    return tl::unexpected(plane.error());
  loader l{assignment, incarnation, std::move(*config), std::move(*weights),
           std::make_shared<worker_parts>()};
  l.parts->plane = std::move(*plane);
  for (const auto& worker : plan.workers()) {
    if (worker.name() != assignment.name())
      continue;
    for (const auto& actor : worker.actors()) {
      auto loaded = actor.kind() == proto::STAGE ? l.load_stage(actor) : l.load_expert_group(actor);
      if (!loaded)
        return tl::unexpected(loaded.error());
    }
  }
  return l.parts;
}

} // namespace troupe::actors
