#include "troupe/actors/device_needs.hpp"

#include "troupe/actors/boundary.hpp"

#include "troupe/actors/cluster_plan.hpp"
#include "troupe/memory/page_seals.hpp"

#include <catch2/catch.hpp>

using namespace troupe;
using actors::device_needs;
using actors::planned_device;

namespace {

model::model_config small_model() {
  auto config = model::parse_model_config(R"({"model_type": "deepseek_v3", "vocab_size": 4096,
    "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4,
    "num_attention_heads": 8, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
    "eos_token_id": 1, "bos_token_id": 0, "rope_theta": 10000, "first_k_dense_replace": 1,
    "moe_intermediate_size": 512, "n_group": 1,
    "topk_group": 1, "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4,
    "kv_lora_rank": 128, "q_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
    "v_head_dim": 64, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "routed_scaling_factor": 1.0, "norm_topk_prob": true})",
                                          "config.json");
  if (!config)
    FAIL(config.error().cause);
  return *config;
}

config::cluster_config two_gpus(std::uint32_t stages, std::uint32_t groups) {
  config::cluster_config result;
  result.nodes = {{.name = "node-0",
                   .devices = {{config::device_kind::cuda, 0}, {config::device_kind::cuda, 1}}}};
  result.model.arithmetic = config::numerics::fast;
  result.parallel.pipeline = stages;
  result.parallel.expert_groups = groups;
  return result;
}

proto::ClusterPlan plan_of(const config::cluster_config& cluster) {
  auto plan = actors::make_cluster_plan(cluster, small_model());
  if (!plan)
    FAIL(plan.error().cause);
  return *plan;
}

} // namespace

TEST_CASE("every GPU of a plan needs what its actors need, and contexts beside") {
  const auto model = small_model();
  auto cluster = two_gpus(2, 0);
  const auto plan = plan_of(cluster);
  const auto needs = device_needs(plan, model);
  REQUIRE(needs.size() == 2);
  for (std::size_t i = 0; i < 2; ++i) {
    CHECK(needs[i].node == "node-0");
    CHECK(needs[i].device == "cuda:" + std::to_string(i));
    auto expected = actors::device_need_of(plan.workers(static_cast<int>(i)).actors(), plan, model);
    CHECK(expected.weights > 0);
    CHECK(expected.scratch > 0);
    CHECK(expected.kv_pages == plan.workers(static_cast<int>(i)).actors(0).kv_bytes());
    expected.contexts = 2 * placement::context_bytes;
    if (i == 0) // rows for the next stage
      expected.scratch +=
        2 * actors::outbox_bytes(2, plan.max_batch_tokens(), 2 * model.hidden_size);
    CHECK(needs[i].need == expected);
  }
}

TEST_CASE("a standby has a context on every GPU of its node, and loads ahead for one worker") {
  const auto model = small_model();
  auto cluster = two_gpus(2, 0);
  const auto without = device_needs(plan_of(cluster), model);
  // How often each GPU may have what its worker has of its own.
  for (const auto& [standbys, times] : {std::pair{1, 2U}, {2, 2U}, {3, 3U}}) {
    cluster.recovery.standbys = standbys;
    const auto plan = plan_of(cluster);
    const auto needs = device_needs(plan, model);
    for (std::size_t i = 0; i < 2; ++i) {
      const auto worker =
        actors::device_need_of(plan.workers(static_cast<int>(i)).actors(), plan, model);
      auto expected = without[i].need;
      expected.contexts += standbys * placement::context_bytes;
      expected.scratch += (times - 1) * worker.scratch;
      expected.graphs += (times - 1) * worker.graphs;
      CHECK(needs[i].need == expected);
    }
  }
}

TEST_CASE("devices that are one GPU need what all of them need; spares and CPUs need nothing") {
  const auto model = small_model();
  auto cluster = two_gpus(2, 0);
  const auto apart = device_needs(plan_of(cluster), model);
  cluster.nodes[0].devices[1].index = 0;
  const auto together = device_needs(plan_of(cluster), model);
  REQUIRE(together.size() == 1);
  CHECK(together[0].need.weights == apart[0].need.weights + apart[1].need.weights);
  CHECK(together[0].need.contexts == 3 * placement::context_bytes);
  CHECK(device_needs(plan_of(two_gpus(1, 0)), model).size() == 1);
  cluster.nodes[0].devices = {config::device{}, config::device{}};
  CHECK(device_needs(plan_of(cluster), model).empty());
}

TEST_CASE("an expert group needs its experts, and its stage no more") {
  const auto model = small_model();
  const auto inside = device_needs(plan_of(two_gpus(1, 0)), model);
  const auto outside = device_needs(plan_of(two_gpus(1, 1)), model);
  REQUIRE(outside.size() == 2);
  CHECK(outside[0].need.weights < inside[0].need.weights);
  CHECK(outside[1].need.weights > inside[0].need.weights - outside[0].need.weights);
  CHECK(outside[1].need.kv_pages == 0);
  CHECK(outside[1].need.scratch > 0);
}

TEST_CASE("GPUs that compute a stage together need a part of it each") {
  const auto model = small_model();
  auto cluster = two_gpus(1, 0);
  const auto alone = device_needs(plan_of(cluster), model);
  cluster.parallel.tensor = 2;
  const auto together = device_needs(plan_of(cluster), model);
  REQUIRE(together.size() == 2);
  CHECK(together[0].device == "cuda:0");
  CHECK(together[1].device == "cuda:1");
  CHECK(together[0].need == together[1].need);
  CHECK(together[0].need.weights < alone[0].need.weights);
  // Every rank has the latents of all tokens; sums of pages are a trifle.
  CHECK(together[0].need.kv_pages == Approx(alone[0].need.kv_pages).epsilon(0.02));
}

TEST_CASE("a head in 8 bit makes the last stage smaller, and no other") {
  const auto model = small_model();
  auto cluster = two_gpus(2, 0);
  const auto stored = device_needs(plan_of(cluster), model);
  cluster.model.head = config::head_format::int8;
  const auto narrow = device_needs(plan_of(cluster), model);
  REQUIRE(narrow.size() == 2);
  CHECK(narrow[0].need == stored[0].need);
  CHECK(narrow[1].need.weights < stored[1].need.weights);
  CHECK(narrow[1].need.kv_pages == stored[1].need.kv_pages);
  CHECK(narrow[1].need.scratch == stored[1].need.scratch);
}

TEST_CASE("exact numerics keep pages, rows and what is made of wide weights in float32") {
  const auto model = small_model();
  auto cluster = two_gpus(2, 0);
  const auto fast = device_needs(plan_of(cluster), model);
  cluster.model.arithmetic = config::numerics::exact;
  const auto plan = plan_of(cluster);
  CHECK_FALSE(plan.fast_numerics());
  CHECK(actors::numerics_of(plan) == kernels::numerics::exact);
  const auto exact = device_needs(plan, model);
  REQUIRE(exact.size() == 2);
  const auto seals = memory::page_seals::bytes(plan.kv_pages());
  for (std::size_t i = 0; i < 2; ++i) {
    CHECK(exact[i].need.kv_pages - seals == 2 * (fast[i].need.kv_pages - seals));
    CHECK(exact[i].need.scratch > fast[i].need.scratch);
    CHECK(exact[i].need.weights == Approx(fast[i].need.weights).epsilon(0.05));
    CHECK(exact[i].need.contexts == fast[i].need.contexts);
  }
  // Rows that the first stage leaves for the second.
  const auto worker = actors::device_need_of(plan.workers(0).actors(), plan, model);
  CHECK(exact[0].need.scratch - worker.scratch
        == 2 * actors::outbox_bytes(2, plan.max_batch_tokens(), 4 * model.hidden_size));
}

TEST_CASE("workers are told how their GPUs are to add up rows") {
  auto cluster = two_gpus(1, 0);
  cluster.parallel.tensor = 2;
  CHECK(plan_of(cluster).all_reduce() == proto::ALL_REDUCE_AUTO);
  cluster.parallel.sums = config::all_reduce::peer;
  CHECK(plan_of(cluster).all_reduce() == proto::ALL_REDUCE_PEER);
  cluster.parallel.sums = config::all_reduce::nccl;
  CHECK(plan_of(cluster).all_reduce() == proto::ALL_REDUCE_NCCL);
}

TEST_CASE("the first GPU that is too small is refused, by name; unknown ones are not") {
  const auto model = small_model();
  const auto plan = plan_of(two_gpus(2, 0));
  const auto needs = device_needs(plan, model);
  const auto with = [&](std::optional<std::uint64_t> first, std::optional<std::uint64_t> second) {
    return actors::check_devices(plan, model, [&](const planned_device& one) {
      return one.device == "cuda:0" ? first : second;
    });
  };
  const auto enough = needs[0].need.total() + needs[1].need.total();
  CHECK(with(enough, enough));
  CHECK(with(std::nullopt, std::nullopt));
  const auto refused = with(enough, needs[1].need.total() - 1);
  REQUIRE_FALSE(refused);
  CHECK(is_permanent(refused.error().code));
  CHECK_THAT(refused.error().cause, Catch::StartsWith("cuda:1 of node-0 needs "));
  CHECK_THAT(refused.error().cause, Catch::Contains("weights") && Catch::Contains("KV pages"));
}
