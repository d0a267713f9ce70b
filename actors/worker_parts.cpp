#include "troupe/actors/worker_parts.hpp"

#include <algorithm>
#include <chrono>

#include <fmt/format.h>

namespace troupe::actors {

namespace {

/// Everything that loading one actor needs to know.
struct loader {
  const proto::WorkerAssignment& assignment;
  std::uint64_t incarnation;
  memory::pulse& pulse;
  model::model_config config;
  std::shared_ptr<model::tensor_source> weights;
  std::shared_ptr<worker_parts> parts;
  std::shared_ptr<gpu> device; ///< null on a CPU

  const proto::ClusterPlan& plan() const { return assignment.plan(); }

  /// Calls `load` with the operations of an actor. On a GPU that may be twice: see gpu::load.
  expected<void> load_with_ops(const proto::ActorPlan& actor, const memory::activity& pulse,
                               std::uint32_t threads, const gpu::loading& load) const {
    if (!device)
      return load(make_ops(pulse, threads));
    auto content =
      fmt::format("{} layers {}-{} experts {}-{} of {} drafts {}", plan().model_path(),
                  actor.first_layer(), actor.end_layer(), actor.first_expert(), actor.end_expert(),
                  plan().num_expert_groups(), plan().draft_tokens());
    return device->load(actor.id(), content, pulse, load);
  }

  /// The kernels count their progress in the activity, so it lives as long as they do.
  std::shared_ptr<kernels::ops> make_ops(const memory::activity& pulse,
                                         std::uint32_t threads) const {
    threads = std::max<std::uint32_t>(1, threads);
    auto mode = plan().fast_numerics() ? kernels::numerics::fast : kernels::numerics::exact;
    auto made = kernels::make_cpu_ops(static_cast<std::int32_t>(threads), pulse.counter(), mode);
    return {made.release(), [pulse](kernels::ops* owned) { delete owned; }};
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
      incarnation,
      call_limits{std::chrono::milliseconds(plan().recovery_deadline_ms()),
                  std::chrono::milliseconds(plan().dispatch_timeout_ms())},
      s.pulse);
  }

  expected<void> load_stage(const proto::ActorPlan& actor) {
    loaded_stage s;
    s.plan = actor;
    auto pulsing = pulse.add(actor.id());
    if (!pulsing)
      return tl::unexpected(pulsing.error());
    s.pulse = std::move(*pulsing);
    model::stage_options options;
    options.first_layer = static_cast<std::int32_t>(actor.first_layer());
    options.end_layer = static_cast<std::int32_t>(actor.end_layer());
    options.max_rows = static_cast<std::int32_t>(plan().max_batch_tokens());
    options.with_local_experts = plan().num_expert_groups() == 0;
    options.checks_finite = !plan().unprotected();
    if (options.end_layer == config.num_layers)
      options.max_drafts = static_cast<std::int32_t>(plan().draft_tokens());
    auto loaded = load_with_ops(actor, s.pulse, plan().compute_threads(), [&](auto ops) {
      s.model = nullptr;
      s.ops = std::move(ops);
      auto model = model::stage_model::load(weights, config, options, *s.ops);
      if (!model)
        return expected<void>(tl::unexpected(model.error()));
      s.model = std::move(*model);
      return expected<void>();
    });
    if (!loaded)
      return loaded;
    if (auto attached = device ? map_kv(s) : attach_kv(s); !attached)
      return attached;
    if (has_device_for_itself() && !plan().unprotected())
      s.watch = std::make_shared<device_watch>(device->waits_of(*s.ops),
                                               device_watch::end_process(actor.id()));
    if (!options.with_local_experts) {
      auto experts = connect_experts(s);
      if (!experts)
        return tl::unexpected(experts.error());
      s.experts = std::move(*experts);
    }
    parts->stages.push_back(std::move(s));
    return {};
  }

  /// Who shares a device with somebody cannot know how long it takes.
  bool has_device_for_itself() const {
    std::string node;
    for (const auto& worker : plan().workers())
      if (worker.name() == assignment.name())
        node = worker.node();
    auto num_workers =
      std::count_if(plan().workers().begin(), plan().workers().end(), [&](const auto& worker) {
        return worker.node() == node && worker.device() == assignment.device();
      });
    return device && num_workers == 1 && assignment.actors_size() == 1;
  }

  std::size_t bytes_of_pages(const loaded_stage& s) const {
    return s.model->kv_bytes(static_cast<std::int32_t>(plan().kv_pages()),
                             static_cast<std::int32_t>(plan().page_tokens()));
  }

  void give_kv(loaded_stage& s, void* pages) const {
    s.model->attach_kv(pages, static_cast<std::int32_t>(plan().kv_pages()),
                       static_cast<std::int32_t>(plan().page_tokens()));
  }

  /// Pages in the keeper's memory. They have no sums: a GPU's memory has its own (ECC).
  expected<void> map_kv(loaded_stage& s) const {
    auto mapped = device->map_kv(s.plan.id(), bytes_of_pages(s));
    if (!mapped)
      return tl::unexpected(mapped.error());
    s.device_kv = std::move(*mapped);
    give_kv(s, s.device_kv.get());
    return {};
  }

  /// Pages in the node's memory.
  expected<void> attach_kv(loaded_stage& s) const {
    for (const auto& kv : assignment.kv()) {
      if (kv.actor() != s.plan.id())
        continue;
      auto segment = memory::segment::attach_from(kv.owner_pid(), kv.owner_fd(), kv.bytes());
      if (!segment)
        return tl::unexpected(segment.error());
      s.kv = std::make_shared<memory::segment>(std::move(*segment));
    }
    auto needed = bytes_of_pages(s);
    if (!s.kv || s.kv->size() < needed)
      return fail(error_code::internal,
                  fmt::format("{} has {} bytes of KV memory where it needs {}", s.plan.id(),
                              s.kv ? s.kv->size() : 0, needed));
    give_kv(s, s.kv->bytes().data());
    make_seals(s, needed);
    return {};
  }

  /// The sums lie behind the pages.
  void make_seals(loaded_stage& s, std::size_t bytes_of_pages) const {
    memory::page_seals::layout shape;
    shape.num_layers = static_cast<std::size_t>(s.model->num_kv_layers());
    shape.num_pages = plan().kv_pages();
    shape.page_tokens = plan().page_tokens();
    shape.page_bytes = bytes_of_pages / (shape.num_layers * shape.num_pages);
    if (plan().unprotected() || shape.bytes() != bytes_of_pages || bytes_of_pages % 8 != 0
        || s.kv->size() < bytes_of_pages + memory::page_seals::bytes(shape.num_pages))
      return;
    s.seals = std::make_shared<memory::page_seals>(s.kv->bytes(), shape);
  }

  expected<void> load_expert_group(const proto::ActorPlan& actor) {
    loaded_expert_group g;
    g.plan = actor;
    auto pulsing = pulse.add(actor.id());
    if (!pulsing)
      return tl::unexpected(pulsing.error());
    g.pulse = std::move(*pulsing);
    model::expert_range range{static_cast<std::int32_t>(actor.first_expert()),
                              static_cast<std::int32_t>(actor.end_expert())};
    auto loaded = load_with_ops(actor, g.pulse, plan().expert_threads(), [&](auto ops) {
      g.experts = nullptr;
      g.ops = std::move(ops);
      auto experts =
        model::expert_group_model::load(weights, config, range, *g.ops, plan().draft_tokens() > 0);
      if (!experts)
        return expected<void>(tl::unexpected(experts.error()));
      g.experts = std::move(*experts);
      return expected<void>();
    });
    if (!loaded)
      return loaded;
    parts->expert_groups.push_back(std::move(g));
    return {};
  }
};

/// Null for a CPU.
expected<std::shared_ptr<gpu>> open_device(const proto::WorkerAssignment& assignment) {
  if (!assignment.device().starts_with("cuda:"))
    return nullptr;
  return gpu::open(assignment.device(), assignment.keeper());
}

} // namespace

expected<prepared_parts> prepare_parts(const proto::WorkerAssignment& assignment) {
  const auto& plan = assignment.plan();
  auto config = model::load_model_config(plan.model_path());
  if (!config)
    return tl::unexpected(config.error());
  auto weights = model::open_weights(plan.model_path());
  if (!weights)
    return tl::unexpected(weights.error());
  auto plane = data_plane::prepare(plan.transport_interface(), !plan.unprotected());
  if (!plane)
    return tl::unexpected(plane.error());
  auto device = open_device(assignment);
  if (!device)
    return tl::unexpected(device.error());
  return prepared_parts{std::move(*config), std::move(*weights), std::move(*plane),
                        std::move(*device)};
}

expected<std::shared_ptr<worker_parts>> load_parts(prepared_parts prepared,
                                                   const proto::WorkerAssignment& assignment,
                                                   std::uint64_t incarnation,
                                                   memory::pulse& pulse) {
  prepared.plane->identify(assignment.name(), incarnation);
  loader l{assignment,
           incarnation,
           pulse,
           std::move(prepared.config),
           std::move(prepared.weights),
           std::make_shared<worker_parts>(),
           nullptr};
  l.parts->plane = std::move(prepared.plane);
  l.device = std::move(prepared.device);
  if (l.device && l.device->name() != assignment.device()) {
    // A standby that had prepared for another GPU of its node.
    auto device = open_device(assignment);
    if (!device)
      return tl::unexpected(device.error());
    l.device = std::move(*device);
  }
  for (const auto& actor : assignment.actors()) {
    auto loaded = actor.kind() == proto::STAGE ? l.load_stage(actor) : l.load_expert_group(actor);
    if (!loaded)
      return tl::unexpected(loaded.error());
  }
  return l.parts;
}

expected<std::shared_ptr<worker_parts>> load_parts(const proto::WorkerAssignment& assignment,
                                                   std::uint64_t incarnation,
                                                   memory::pulse& pulse) {
  auto prepared = prepare_parts(assignment);
  if (!prepared)
    return tl::unexpected(prepared.error());
  return load_parts(std::move(*prepared), assignment, incarnation, pulse);
}

} // namespace troupe::actors
