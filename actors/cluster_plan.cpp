#include "troupe/actors/cluster_plan.hpp"

#include "troupe/actors/device_needs.hpp"
#include "troupe/memory/page_seals.hpp"
#include "troupe/model/chat_template.hpp"
#include "troupe/model/model_tokenizer.hpp"
#include "troupe/model/tensor_shard.hpp"
#include "troupe/model/tensor_source.hpp"
#include "troupe/model/weights.hpp"
#include "troupe/placement/core_shares.hpp"
#include "troupe/telemetry/gpu_totals.hpp"

#include <algorithm>
#include <chrono>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include <fmt/format.h>

namespace troupe::actors {

namespace {

/// What the driver gets to tell of its GPUs, which may take it seconds when it is asked first.
constexpr auto driver_patience = std::chrono::milliseconds(5000);

bool computes_on_gpus(const config::cluster_config& cluster) {
  return cluster.nodes.front().devices.front().kind == config::device_kind::cuda;
}

/// KV pages hold what kernels::ops::kv_type says of the devices, which are all of one kind.
std::uint64_t kv_element_bytes(const model::model_config& model,
                               const config::cluster_config& cluster) {
  bool is_short =
    cluster.model.arithmetic == config::numerics::fast
    && (computes_on_gpus(cluster) || model.attention == model::attention_kind::latent);
  return is_short ? 2 : 4;
}

/// What an actor's weights take, about.
std::uint64_t weight_bytes(const placement::actor& actor, const placement::model_shape& shape,
                           bool experts_inside, std::uint32_t num_layers, bool with_mtp,
                           std::int32_t weight_bits) {
  std::uint64_t weights = 0;
  // The MTP layer lies behind the last.
  auto num_loaded = num_layers + (with_mtp ? 1 : 0);
  if (actor.kind == placement::actor_kind::stage) {
    auto end_layer = actor.end_layer == num_layers ? num_loaded : actor.end_layer;
    for (auto layer = actor.first_layer; layer < end_layer; ++layer) {
      weights += shape.is_moe(layer) ? shape.moe_layer_cost : shape.dense_layer_cost;
      if (shape.is_moe(layer) && experts_inside)
        weights += shape.routed_experts_cost;
    }
    if (actor.first_layer == 0 || actor.end_layer == num_layers)
      weights += shape.head_cost; // the embedding is as large as the head
    if (with_mtp && actor.end_layer == num_layers && actor.first_layer > 0)
      weights += shape.head_cost;
  } else {
    for (std::uint32_t layer = 0; layer < num_loaded; ++layer)
      if (shape.is_moe(layer))
        weights +=
          shape.routed_experts_cost / shape.num_experts * (actor.end_expert - actor.first_expert);
  }
  return weights * static_cast<std::uint64_t>(weight_bits) / 8;
}

/// Whether the GPUs of this host have room for what they are to hold, as far as the driver tells.
expected<void> check_local_devices(const config::cluster_config& cluster,
                                   const proto::ClusterPlan& plan,
                                   const model::model_config& model) {
  const auto known = local_gpu_bytes(cluster, plan);
  return check_devices(plan, model, [&](const planned_device& one) -> std::optional<std::uint64_t> {
    const auto node = known.find(one.node);
    if (node == known.end() || node->second.count(one.device) == 0)
      return std::nullopt; // its worker will see
    return node->second.at(one.device);
  });
}

std::uint64_t mlp_size(std::int32_t hidden, std::int32_t intermediate) {
  return 3 * static_cast<std::uint64_t>(hidden) * static_cast<std::uint64_t>(intermediate);
}

proto::AllReduce all_reduce_of(config::all_reduce wanted) {
  switch (wanted) {
  case config::all_reduce::automatic: break;
  case config::all_reduce::peer: return proto::ALL_REDUCE_PEER;
  case config::all_reduce::nccl: return proto::ALL_REDUCE_NCCL;
  }
  return proto::ALL_REDUCE_AUTO;
}

} // namespace

placement::model_shape shape_of(const model::model_config& m) {
  placement::model_shape shape;
  auto hidden = static_cast<std::uint64_t>(m.hidden_size);
  auto attention = m.attention_size();
  auto experts = static_cast<std::uint64_t>(m.num_experts);
  shape.num_layers = static_cast<std::uint32_t>(m.num_layers);
  shape.first_dense_layers = static_cast<std::uint32_t>(m.first_k_dense_replace);
  shape.moe_layer_frequency = static_cast<std::uint32_t>(m.moe_layer_freq);
  shape.num_experts = static_cast<std::uint32_t>(m.num_experts);
  shape.num_expert_groups_in_router = static_cast<std::uint32_t>(m.num_groups);
  shape.dense_layer_cost = attention + mlp_size(m.hidden_size, m.intermediate_size);
  shape.moe_layer_cost =
    attention + hidden * experts + mlp_size(m.hidden_size, m.shared_intermediate_size());
  shape.routed_experts_cost = experts * mlp_size(m.hidden_size, m.moe_intermediate_size);
  shape.head_cost = hidden * static_cast<std::uint64_t>(m.vocab_size);
  return shape;
}

/// The part of one of the devices of a stage.
expected<model::model_config> check_ranks(const config::cluster_config& cluster,
                                          const model::model_config& model) {
  auto ranks = cluster.parallel.tensor;
  if (ranks == 1)
    return model;
  auto refuse = [&](const std::string& cause, const std::string& cure) {
    return fail(
      error_code::invalid_config,
      fmt::format("{}: parallel.tensor: {}: {}", cluster.where("parallel.tensor"), ranks, cause),
      cure);
  };
  if (cluster.serving.draft_tokens > 0)
    return refuse("stages on several devices do not draft", "write serving.draft_tokens: 0");
  auto part = model::rank_config(model, 0, static_cast<std::int32_t>(ranks));
  if (!part)
    return refuse(part.error().cause, part.error().cure);
  return part;
}

std::map<std::string, std::map<std::string, std::uint64_t>>
local_gpu_bytes(const config::cluster_config& cluster, const proto::ClusterPlan& plan) {
  std::map<std::string, std::map<std::string, std::uint64_t>> result;
  if (!computes_on_gpus(cluster))
    return result;
  const auto totals = telemetry::gpu_totals(driver_patience);
  std::set<std::string> local;
  for (const auto& node : cluster.nodes)
    if (node.launch == config::launch_mode::local)
      local.insert(node.name);
  for (const auto& worker : plan.workers())
    for (const auto& device : placement::devices_of(worker.device()))
      if (const auto index = telemetry::cuda_index(device);
          index && *index < totals.size() && totals[*index] && local.count(worker.node()) != 0)
        result[worker.node()][device] = *totals[*index];
  return result;
}

expected<proto::ClusterPlan> make_cluster_plan(const config::cluster_config& cluster,
                                               const model::model_config& model) {
  auto shape = shape_of(model);
  const bool with_mtp = cluster.serving.draft_tokens > 0;
  if (with_mtp && model.num_mtp_layers == 0)
    return fail(error_code::invalid_config,
                fmt::format("{}: serving.draft_tokens: {} asks for drafts, but {} has no MTP layer "
                            "to make them (num_nextn_predict_layers is 0)",
                            cluster.where("serving.draft_tokens"), cluster.serving.draft_tokens,
                            cluster.model.path.string()),
                "write serving.draft_tokens: 0");
  auto placed = placement::place(cluster, shape);
  if (!placed)
    return tl::unexpected(placed.error());
  auto part = check_ranks(cluster, model);
  if (!part)
    return tl::unexpected(part.error());
  const auto& serving = cluster.serving;
  proto::ClusterPlan plan;
  plan.set_tensor_ranks(cluster.parallel.tensor);
  plan.set_all_reduce(all_reduce_of(cluster.parallel.sums));
  plan.set_cluster(cluster.cluster);
  plan.set_model_path(cluster.model.path.string());
  plan.set_model_name(cluster.model.name);
  plan.set_num_replicas(placed->num_replicas);
  plan.set_num_stages(placed->num_stages);
  plan.set_num_expert_groups(placed->num_expert_groups);
  plan.set_num_expert_copies(placed->num_expert_copies);
  plan.set_page_tokens(serving.page_tokens);
  plan.set_kv_pages(std::max(1U, serving.kv_tokens / serving.page_tokens));
  plan.set_max_batch_tokens(serving.max_batch_tokens);
  plan.set_max_batch_sequences(serving.max_batch_sequences);
  plan.set_prefill_chunk_tokens(serving.prefill_chunk_tokens);
  plan.set_max_queue(serving.max_queue);
  auto model_context = static_cast<std::uint32_t>(model.max_positions);
  plan.set_max_context(serving.max_context == 0 ? model_context
                                                : std::min(serving.max_context, model_context));
  plan.set_request_timeout_s(serving.request_timeout_s);
  plan.set_heartbeat_ms(cluster.recovery.heartbeat_ms);
  plan.set_hang_ms(cluster.recovery.hang_ms);
  plan.set_recovery_deadline_ms(cluster.recovery.deadline_ms);
  plan.set_max_restarts(cluster.recovery.max_restarts);
  plan.set_within_s(cluster.recovery.within_s);
  plan.set_standbys(cluster.recovery.standbys);
  plan.set_node_grace_ms(cluster.recovery.node_grace_ms);
  plan.set_suspicion(cluster.recovery.suspicion);
  plan.set_resend_ms(cluster.recovery.resend_ms);
  plan.set_dispatch_timeout_ms(cluster.recovery.dispatch_timeout_ms);
  plan.set_unprotected(cluster.recovery.level == config::protection::off);
  plan.set_retain_s(serving.retain_s);
  plan.set_fast_numerics(cluster.model.arithmetic == config::numerics::fast);
  plan.set_int8_head(cluster.model.head == config::head_format::int8);
  plan.set_draft_tokens(serving.draft_tokens);
  bool is_local = cluster.network.bind.starts_with("127.") || cluster.network.bind == "::1";
  plan.set_transport_interface(is_local ? "lo" : "");
  auto shares = placement::share_cores(cluster, *placed, std::thread::hardware_concurrency());
  plan.set_compute_threads(shares.stage_threads);
  plan.set_expert_threads(shares.expert_threads);
  plan.set_decode_micro_batches(shares.decode_micro_batches);
  // Every device has a worker in the plan; those without actors are spares.
  std::map<std::string, const placement::worker*> by_name;
  for (const auto& worker : placed->workers)
    by_name.emplace(worker.name, &worker);
  auto all = placement::possible_workers(cluster);
  for (auto& worker : all)
    if (auto found = by_name.find(worker.name); found != by_name.end())
      worker = *found->second;
  for (const auto& worker : all) {
    auto* w = plan.add_workers();
    w->set_name(worker.name);
    w->set_node(worker.node);
    w->set_device(worker.device);
    for (const auto& actor : worker.actors) {
      auto* a = w->add_actors();
      bool is_stage = actor.kind == placement::actor_kind::stage;
      a->set_id(actor.id);
      a->set_kind(is_stage ? proto::STAGE : proto::EXPERT_GROUP);
      a->set_replica(actor.replica);
      a->set_index(actor.index);
      a->set_copy(actor.copy);
      a->set_first_layer(actor.first_layer);
      a->set_end_layer(actor.end_layer);
      a->set_first_expert(actor.first_expert);
      a->set_end_expert(actor.end_expert);
      a->set_weight_bytes(weight_bytes(actor, shape, plan.num_expert_groups() == 0,
                                       shape.num_layers, with_mtp, model.weight_bits));
      if (!is_stage)
        continue;
      bool drafts = with_mtp && actor.end_layer == shape.num_layers;
      auto kv_layers = actor.end_layer - actor.first_layer + (drafts ? 1 : 0);
      a->set_kv_bytes(std::uint64_t{kv_layers} * plan.kv_pages() * plan.page_tokens()
                        * cluster.parallel.tensor * static_cast<std::uint64_t>(part->kv_dim())
                        * kv_element_bytes(model, cluster)
                      + memory::page_seals::bytes(plan.kv_pages()));
    }
  }
  note_device_bytes(plan, model);
  return plan;
}

expected<proto::ClusterPlan> check_before_launch(const config::cluster_config& cluster) {
  const auto& path = cluster.model.path;
  auto model = model::load_model_config(path);
  if (!model)
    return tl::unexpected(model.error());
  auto plan = make_cluster_plan(cluster, *model);
  if (!plan)
    return plan;
  if (auto enough = check_local_devices(cluster, *plan, *model); !enough)
    return tl::unexpected(enough.error());
  if (auto tokenizer = model::load_tokenizer(path, *model); !tokenizer)
    return tl::unexpected(tokenizer.error());
  auto chat = model::chat_renderer::load(path);
  if (!chat && chat.error().code != error_code::not_found)
    return tl::unexpected(chat.error());
  if (model::random_config_of(path))
    return plan; // made-up weights are whole by definition
  auto weights = model::open_weights(path);
  if (!weights)
    return tl::unexpected(weights.error());
  auto whole = model::whole_model(*model, cluster.serving.draft_tokens > 0);
  if (auto checked = model::check_weights(**weights, *model, whole); !checked)
    return tl::unexpected(checked.error());
  return plan;
}

} // namespace troupe::actors
