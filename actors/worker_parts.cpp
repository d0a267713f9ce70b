#include "troupe/actors/worker_parts.hpp"

#include "troupe/actors/device_needs.hpp"
#include "troupe/actors/gpu.hpp"
#include "troupe/model/tensor_shard.hpp"
#include "troupe/placement/plan.hpp"

#include <algorithm>
#include <chrono>
#include <future>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

namespace troupe::actors {

namespace {

/// Longer than it takes from one step of decoding to the next. Ranks of CPUs compute on all cores.
constexpr std::chrono::nanoseconds rank_alertness = std::chrono::milliseconds(2);

/// Everything that loading one actor needs to know.
struct loader {
  const proto::WorkerAssignment& assignment;
  std::uint64_t incarnation;
  memory::pulse& pulse;
  model::model_config config;
  std::shared_ptr<model::tensor_source> weights;
  std::shared_ptr<worker_parts> parts;
  std::vector<std::shared_ptr<gpu_device>> gpus; ///< none on CPUs
  const std::atomic<bool>* hurry = nullptr;      ///< of a standby that loads ahead

  const proto::ClusterPlan& plan() const { return assignment.plan(); }

  /// Calls `load` with the operations of an actor that computes alone.
  expected<void> load_alone(const proto::ActorPlan& actor, const memory::activity& pulse,
                            const gpu_device::loading& load) const {
    if (gpus.empty())
      return load(make_ops(pulse, plan().expert_threads(), nullptr, 0));
    return gpus.front()->load(actor.id(), content_of(actor, 0), numerics_of(plan()), {},
                              weights_wanted(), pulse, load);
  }

  bool is_ahead() const { return hurry != nullptr; }
  bool is_in_a_hurry() const { return hurry != nullptr && hurry->load(std::memory_order_relaxed); }

  weights_taken weights_wanted() const {
    return is_ahead() ? weights_taken::kept_only : weights_taken::any;
  }

  /// Which weights an actor has, of a rank.
  std::string content_of(const proto::ActorPlan& actor, std::int32_t rank) const {
    return fmt::format("{} layers {}-{} experts {}-{} of {} drafts {} head {} numerics {} rank {} "
                       "of {}",
                       plan().model_path(), actor.first_layer(), actor.end_layer(),
                       actor.first_expert(), actor.end_expert(), plan().num_expert_groups(),
                       plan().draft_tokens(), plan().int8_head() ? "int8" : "stored",
                       plan().fast_numerics() ? "fast" : "exact", rank, num_ranks());
  }

  std::int32_t num_ranks() const {
    return std::max<std::int32_t>(1, static_cast<std::int32_t>(plan().tensor_ranks()));
  }

  /// The kernels count their progress in the activity, so it lives as long as they do.
  std::shared_ptr<kernels::ops> make_ops(const memory::activity& pulse, std::uint32_t threads,
                                         std::shared_ptr<kernels::cpu_rank_group> group,
                                         std::int32_t rank) const {
    threads = std::max<std::uint32_t>(1, threads);
    auto made = kernels::make_cpu_ops(static_cast<std::int32_t>(threads), pulse.counter(),
                                      numerics_of(plan()), std::move(group), rank);
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
      parts->plane, *s.ops.front(), std::move(*dispatch),
      std::pair{s.plan.replica(), s.plan.index()}, incarnation,
      call_limits{std::chrono::milliseconds(plan().recovery_deadline_ms()),
                  std::chrono::milliseconds(plan().dispatch_timeout_ms())},
      s.pulse);
  }

  /// The first worker that has these weights on a GPU finds out whether there is memory for all it
  /// will do. Its successors have as much, and no time; but who loads ahead has time.
  bool wants_rehearsal(const kernels::ops& ops) const {
    return !gpus.empty()
           && (is_ahead() ? !is_in_a_hurry()
                          : ops.reads_of_weights() != kernels::weight_reading::shapes);
  }

  /// Before anything is read: whether the GPUs are large enough and, where nothing is kept yet that
  /// would be used again, whether enough of them is free.
  expected<void> check_memory() const {
    for (const auto& device : gpus)
      if (auto enough = check_memory(*device); !enough)
        return enough;
    return {};
  }

  expected<void> check_memory(gpu_device& device) const {
    const auto memory = device.memory();
    if (!memory)
      return tl::unexpected(memory.error());
    const auto kv_tokens = plan().kv_pages() * plan().page_tokens();
    auto need = device_need_of(assignment.actors(), plan(), config);
    const auto others = memory->total - memory->free;
    const bool is_free = memory->kept > 0 || need.total() <= memory->free;
    need.contexts = 2 * placement::context_bytes; // the keeper's and this process's
    if (auto ok = placement::check_device(device.name(), need, memory->total, kv_tokens); !ok)
      return ok;
    if (is_free)
      return {};
    return fail(error_code::resource_exhausted,
                fmt::format("{} needs {}, and of its {:.1f} GB {:.1f} GB are in use", device.name(),
                            placement::describe(need), static_cast<double>(memory->total) / 1e9,
                            static_cast<double>(others) / 1e9),
                "nvidia-smi shows who uses it");
  }

  /// Beside the worker that a standby may replace: whether there is memory for both. What is kept
  /// they share.
  expected<void> check_memory_ahead() const {
    const auto need = device_need_of(assignment.actors(), plan(), config);
    for (const auto& device : gpus) {
      const auto memory = device->memory();
      if (!memory)
        return tl::unexpected(memory.error());
      if (memory->free < need.scratch + 2 * need.graphs) // the other one may still have to record
        return fail(error_code::unavailable,
                    fmt::format("{:.1f} GB are free on {}, too few for a standby beside its worker",
                                static_cast<double>(memory->free) / 1e9, device->name()));
    }
    return {};
  }

  /// All actors of the assignment, as far as they need no peers.
  expected<void> load_actors() {
    for (const auto& actor : assignment.actors()) {
      auto loaded = actor.kind() == proto::STAGE ? load_stage(actor) : load_expert_group(actor);
      if (!loaded)
        return loaded;
    }
    return {};
  }

  expected<void> load_stage(const proto::ActorPlan& actor) {
    loaded_stage s;
    s.plan = actor;
    auto pulsing = pulse.add(actor.id());
    if (!pulsing)
      return tl::unexpected(pulsing.error());
    s.pulse = std::move(*pulsing);
    if (auto loaded = load_ranks(s, stage_options_of(actor, plan(), config)); !loaded)
      return loaded;
    if (auto attached = gpus.empty() ? attach_kv(s) : map_kv(s); !attached)
      return attached;
    if (is_ahead())
      if (auto recorded = record_steps(*s.model); !recorded)
        return recorded;
    parts->stages.push_back(std::move(s));
    return {};
  }

  expected<void> record_steps(model::stage_group& stage) const {
    for (std::int32_t rows = 1; rows <= model::stage_model::max_recorded_rows; ++rows) {
      if (is_in_a_hurry())
        break;
      if (auto recorded = stage.record_step(rows); !recorded)
        return recorded;
    }
    return {};
  }

  /// What tells a stage from one that was loaded ahead.
  expected<void> complete(loaded_stage& s) const {
    if (!gpus.empty() && plan().num_stages() > 1)
      open_boundary(s);
    s.watch = make_watch(s.plan.id(), s.ops.front(), s.pulse);
    if (s.model->leader().options().with_local_experts)
      return {};
    auto experts = connect_experts(s);
    if (!experts)
      return tl::unexpected(experts.error());
    s.experts = std::move(*experts);
    return {};
  }

  void complete(loaded_expert_group& g) const { g.watch = make_watch(g.plan.id(), g.ops, g.pulse); }

  std::shared_ptr<device_watch> make_watch(const std::string& actor,
                                           const std::shared_ptr<kernels::ops>& ops,
                                           const memory::activity& pulsing) const {
    if (gpus.empty() || plan().unprotected())
      return nullptr;
    return std::make_shared<device_watch>(actor, pulsing, gpus.front()->waits_of(ops),
                                          gpu::look_interval, has_device_for_itself());
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
    return num_workers == 1 && assignment.actors_size() == 1;
  }

  /// Loads the part of each rank, on its device.
  expected<void> load_ranks(loaded_stage& s, const model::stage_options& options) const {
    std::shared_ptr<kernels::cpu_rank_group> cpus;
    std::shared_ptr<kernels::cuda::gpu_rank_group> group;
    if (num_ranks() > 1 && gpus.empty())
      cpus = kernels::make_cpu_rank_group(num_ranks());
    if (num_ranks() > 1 && !gpus.empty()) {
      auto joined = gpu_device::join(gpus, options.max_rows, config.hidden_size,
                                     numerics_of(plan()), plan().all_reduce());
      if (!joined)
        return tl::unexpected(joined.error());
      group = std::move(*joined);
    }
    if (!gpus.empty() && gpus.size() != static_cast<std::size_t>(num_ranks()))
      return fail(error_code::internal,
                  fmt::format("{} is to run on {} devices, but this worker has {}", s.plan.id(),
                              num_ranks(), gpus.size()));
    std::vector<std::unique_ptr<model::stage_model>> models;
    for (std::int32_t rank = 0; rank < num_ranks(); ++rank) {
      auto part = num_ranks() == 1 ? expected<model::model_config>(config)
                                   : model::rank_config(config, rank, num_ranks());
      if (!part)
        return tl::unexpected(part.error());
      std::shared_ptr<kernels::ops> used;
      std::unique_ptr<model::stage_model> made;
      gpu_device::loading load = [&](std::shared_ptr<kernels::ops> ops) {
        made = nullptr;
        used = std::move(ops);
        auto model = model::stage_model::load(weights, *part, options, *used);
        if (!model)
          return expected<void>(tl::unexpected(model.error()));
        made = std::move(*model);
        if (!wants_rehearsal(*used))
          return expected<void>();
        return made->rehearse(static_cast<std::int32_t>(plan().kv_pages()),
                              static_cast<std::int32_t>(plan().page_tokens()));
      };
      auto threads = plan().compute_threads() / static_cast<std::uint32_t>(num_ranks());
      auto loaded = gpus.empty() ? load(make_ops(s.pulse, threads, cpus, rank))
                                 : gpus[static_cast<std::size_t>(rank)]->load(
                                   s.plan.id(), content_of(s.plan, rank), numerics_of(plan()),
                                   {group, rank}, weights_wanted(), s.pulse, load);
      if (!loaded)
        return loaded;
      s.ops.push_back(std::move(used));
      models.push_back(std::move(made));
    }
    s.model = std::make_shared<model::stage_group>(
      std::move(models), gpus.empty() ? std::chrono::nanoseconds(0) : rank_alertness);
    return {};
  }

  /// Of one rank.
  std::size_t bytes_of_pages(const loaded_stage& s) const {
    return s.model->kv_bytes(static_cast<std::int32_t>(plan().kv_pages()),
                             static_cast<std::int32_t>(plan().page_tokens()));
  }

  void give_kv(loaded_stage& s, std::span<void* const> pages) const {
    s.model->attach_kv(pages, static_cast<std::int32_t>(plan().kv_pages()),
                       static_cast<std::int32_t>(plan().page_tokens()));
  }

  /// Pages in the keepers' memory. They have no sums: a GPU's memory has its own (ECC).
  expected<void> map_kv(loaded_stage& s) const {
    std::vector<void*> pages;
    for (const auto& device : gpus) {
      auto mapped = device->map_kv(s.plan.id(), bytes_of_pages(s));
      if (!mapped)
        return tl::unexpected(mapped.error());
      pages.push_back(mapped->get());
      s.device_kv.push_back(std::move(*mapped));
    }
    give_kv(s, pages);
    return {};
  }

  /// A predecessor that is not gone yet may write to the other one.
  proto::DevicePlace outbox_block(const loaded_stage& s) const {
    proto::DevicePlace block;
    block.set_keeper(assignment.keepers(0));
    block.set_block(fmt::format("{}/boundary-{}", s.plan.id(), incarnation % 2));
    block.set_block_bytes(outbox_bytes(plan().num_stages(), plan().max_batch_tokens(),
                                       static_cast<std::size_t>(config.hidden_size)
                                         * kernels::size_of(s.ops.front()->activation_type())));
    return block;
  }

  /// What fails here costs time and nothing else: rows go by the host.
  void open_boundary(loaded_stage& s) const {
    const bool is_last = s.model->leader().is_last();
    const auto block = is_last ? proto::DevicePlace() : outbox_block(s);
    auto opened =
      open_gpu_boundary(s.ops.front(), gpus.front()->name(), is_last ? nullptr : &block);
    if (!opened) {
      spdlog::warn("{}: hidden rows go by the host: {}", s.plan.id(), opened.error().text());
      return;
    }
    s.boundary = std::move(*opened);
    if (!is_last)
      s.outbox = std::make_shared<boundary_outbox>(
        s.boundary, block, incarnation, kernels::size_of(s.ops.front()->activation_type()));
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
    auto of_rank = bytes_of_pages(s);
    auto needed = of_rank * s.model->num_ranks();
    if (!s.kv || s.kv->size() < needed)
      return fail(error_code::internal,
                  fmt::format("{} has {} bytes of KV memory where it needs {}", s.plan.id(),
                              s.kv ? s.kv->size() : 0, needed));
    std::vector<void*> pages;
    for (std::size_t rank = 0; rank < s.model->num_ranks(); ++rank)
      pages.push_back(s.kv->bytes().data() + rank * of_rank);
    give_kv(s, pages);
    make_seals(s, needed);
    return {};
  }

  /// The sums lie behind the pages.
  void make_seals(loaded_stage& s, std::size_t bytes_of_pages) const {
    memory::page_seals::layout shape;
    shape.num_layers =
      static_cast<std::size_t>(s.model->leader().num_kv_layers()) * s.model->num_ranks();
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
    auto loaded = load_alone(actor, g.pulse, [&](auto ops) {
      g.experts = nullptr;
      g.ops = std::move(ops);
      auto experts =
        model::expert_group_model::load(weights, config, range, *g.ops, plan().draft_tokens() > 0);
      if (!experts)
        return expected<void>(tl::unexpected(experts.error()));
      g.experts = std::move(*experts);
      if (!wants_rehearsal(*g.ops))
        return expected<void>();
      return g.experts->rehearse(static_cast<std::int32_t>(plan().max_batch_tokens()),
                                 config.num_experts_per_token);
    });
    if (!loaded)
      return loaded;
    parts->expert_groups.push_back(std::move(g));
    return {};
  }
};

/// None for CPUs. Several are opened at the same time: each takes a tenth of a second and more.
expected<std::vector<std::shared_ptr<gpu_device>>>
open_gpus(const proto::WorkerAssignment& assignment) {
  std::vector<std::shared_ptr<gpu_device>> result;
  if (!assignment.device().starts_with("cuda:"))
    return result;
  std::vector<std::future<expected<std::shared_ptr<gpu_device>>>> opening;
  for (const auto& device : placement::devices_of(assignment.device())) {
    auto index = static_cast<int>(opening.size());
    auto keeper = index < assignment.keepers_size() ? assignment.keepers(index) : std::string();
    // Where there is no thread to be had, one behind the other.
    opening.push_back(std::async(std::launch::async | std::launch::deferred,
                                 [device, keeper] { return gpu_device::open(device, keeper); }));
  }
  for (auto& one : opening) {
    auto opened = one.get();
    if (!opened)
      return tl::unexpected(opened.error());
    result.push_back(std::move(*opened));
  }
  return result;
}

/// Those of the assignment: a standby has prepared for all GPUs of its node.
expected<std::vector<std::shared_ptr<gpu_device>>>
choose_gpus(const std::vector<std::shared_ptr<gpu_device>>& prepared,
            const proto::WorkerAssignment& assignment) {
  std::vector<std::shared_ptr<gpu_device>> result;
  for (const auto& device : placement::devices_of(assignment.device())) {
    auto found =
      std::ranges::find_if(prepared, [&](const auto& one) { return one->name() == device; });
    if (found == prepared.end())
      return open_gpus(assignment);
    result.push_back(*found);
  }
  return result;
}

} // namespace

expected<prepared_parts> prepare_parts(const proto::WorkerAssignment& assignment) {
  const auto& plan = assignment.plan();
  auto config = model::load_model_config(plan.model_path());
  if (!config)
    return tl::unexpected(config.error());
  config->head = head_of(plan);
  auto weights = model::open_weights(plan.model_path());
  if (!weights)
    return tl::unexpected(weights.error());
  auto plane = data_plane::prepare(plan.transport_interface(), !plan.unprotected());
  if (!plane)
    return tl::unexpected(plane.error());
  auto gpus = open_gpus(assignment);
  if (!gpus)
    return tl::unexpected(gpus.error());
  return prepared_parts{std::move(*config), std::move(*weights), std::move(*plane),
                        std::move(*gpus)};
}

expected<std::shared_ptr<parts_ahead>> load_ahead(const prepared_parts& prepared,
                                                  const proto::WorkerAssignment& assignment,
                                                  memory::pulse& pulse,
                                                  const std::atomic<bool>& hurry) {
  auto ahead = std::make_shared<parts_ahead>();
  ahead->assignment = assignment;
  auto gpus = choose_gpus(prepared.gpus, assignment);
  if (!gpus)
    return tl::unexpected(gpus.error());
  ahead->gpus = std::move(*gpus);
  ahead->parts = std::make_shared<worker_parts>();
  loader l{assignment,   0,           pulse, prepared.config, prepared.weights,
           ahead->parts, ahead->gpus, &hurry};
  if (auto enough = l.check_memory_ahead(); !enough)
    return tl::unexpected(enough.error());
  if (auto loaded = l.load_actors(); !loaded)
    return tl::unexpected(loaded.error());
  return ahead;
}

namespace {

/// Whether what was loaded ahead is what the assignment asks for.
bool serves(const parts_ahead& ahead, const proto::WorkerAssignment& assignment) {
  auto essence = [](proto::WorkerAssignment of) {
    of.clear_name();
    of.clear_incarnation();
    of.mutable_plan()->clear_workers(); // of which others may have changed
    return of.SerializeAsString();
  };
  return essence(ahead.assignment) == essence(assignment);
}

} // namespace

expected<std::shared_ptr<worker_parts>> load_parts(prepared_parts prepared,
                                                   std::shared_ptr<parts_ahead> ahead,
                                                   const proto::WorkerAssignment& assignment,
                                                   std::uint64_t incarnation,
                                                   memory::pulse& pulse) {
  if (ahead && !serves(*ahead, assignment)) {
    spdlog::info("what was loaded ahead is not what is asked for");
    ahead = nullptr;
  }
  prepared.plane->identify(assignment.name(), incarnation);
  loader l{assignment,
           incarnation,
           pulse,
           std::move(prepared.config),
           std::move(prepared.weights),
           ahead ? ahead->parts : std::make_shared<worker_parts>(),
           {}};
  l.parts->plane = std::move(prepared.plane);
  if (ahead) {
    l.gpus = ahead->gpus;
  } else {
    auto gpus = choose_gpus(prepared.gpus, assignment);
    if (!gpus)
      return tl::unexpected(gpus.error());
    l.gpus = std::move(*gpus);
    if (auto enough = l.check_memory(); !enough)
      return tl::unexpected(enough.error());
    if (auto loaded = l.load_actors(); !loaded)
      return tl::unexpected(loaded.error());
  }
  for (auto& s : l.parts->stages)
    if (auto completed = l.complete(s); !completed)
      return tl::unexpected(completed.error());
  for (auto& g : l.parts->expert_groups)
    l.complete(g);
  l.parts->gpus = l.gpus;
  return l.parts;
}

expected<std::shared_ptr<worker_parts>> load_parts(const proto::WorkerAssignment& assignment,
                                                   std::uint64_t incarnation,
                                                   memory::pulse& pulse) {
  auto prepared = prepare_parts(assignment);
  if (!prepared)
    return tl::unexpected(prepared.error());
  return load_parts(std::move(*prepared), nullptr, assignment, incarnation, pulse);
}

} // namespace troupe::actors
