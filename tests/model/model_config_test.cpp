#include "troupe/model/model_config.hpp"

#include "temporary_directory.hpp"
#include "tiny_checkpoint.hpp"

#include <catch2/catch.hpp>

using namespace troupe;
using namespace troupe::model;
using nlohmann::json;

namespace {

error refused(const json& config) {
  auto result = parse_model_config(config.dump(), "dir/config.json");
  REQUIRE_FALSE(result);
  CHECK(result.error().code == error_code::invalid_model);
  CHECK_THAT(result.error().cause, Catch::Contains("dir/config.json"));
  return result.error();
}

} // namespace

TEST_CASE("the demo model's config and generation defaults are read") {
  auto config = load_model_config(TROUPE_SOURCE_DIR "/configs/models/troupe-mini");
  REQUIRE(config);
  CHECK(config->vocab_size == 1024);
  CHECK(config->hidden_size == 256);
  CHECK(config->num_layers == 6);
  CHECK(config->num_mtp_layers == 1);
  CHECK(config->kv_dim() == 96);
  CHECK(config->qk_head_dim() == 64);
  CHECK_FALSE(config->is_moe_layer(0));
  CHECK(config->is_moe_layer(1));
  REQUIRE(config->fp8);
  CHECK(config->fp8->block_cols == 128);
  REQUIRE(config->yarn);
  CHECK(config->yarn->factor == 4.0);
  CHECK(config->bos_token == 1017);
  CHECK(config->eos_tokens == std::vector<std::int32_t>{1018});
  REQUIRE(config->default_temperature);
  CHECK(*config->default_temperature == 0.6F);
  CHECK(*config->default_top_p == 0.95F);
}

TEST_CASE("old and new spelling of rope scaling mean the same") {
  auto old_style = test::tiny_config();
  old_style["rope_scaling"] = {{"type", "yarn"},
                               {"factor", 40},
                               {"mscale", 0.7},
                               {"mscale_all_dim", 0.8},
                               {"original_max_position_embeddings", 16}};
  old_style["rope_theta"] = 5000;
  auto new_style = test::tiny_config();
  new_style.erase("rope_theta");
  new_style["rope_parameters"] = old_style["rope_scaling"];
  new_style["rope_parameters"].erase("type");
  new_style["rope_parameters"]["rope_type"] = "yarn";
  new_style["rope_parameters"]["rope_theta"] = 5000;
  auto a = parse_model_config(old_style.dump(), "a");
  auto b = parse_model_config(new_style.dump(), "b");
  REQUIRE(a);
  REQUIRE(b);
  for (const auto* config : {&*a, &*b}) {
    CHECK(config->rope_theta == 5000.0);
    REQUIRE(config->yarn);
    CHECK(config->yarn->factor == 40.0);
    CHECK(config->yarn->beta_fast == 32.0);
    CHECK(config->yarn->beta_slow == 1.0);
    CHECK(config->yarn->mscale == 0.7);
    CHECK(config->yarn->mscale_all_dim == 0.8);
    CHECK(config->yarn->original_max_positions == 16);
  }
  new_style["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 5000}};
  auto plain = parse_model_config(new_style.dump(), "c");
  REQUIRE(plain);
  CHECK_FALSE(plain->yarn);
}

TEST_CASE("end-of-text ids may be a list and are joined with those of generation_config") {
  auto text = test::tiny_config();
  text["eos_token_id"] = {7, 3};
  auto config = parse_model_config(text.dump(), "config.json");
  REQUIRE(config);
  REQUIRE(apply_generation_config(R"({"eos_token_id": [3, 5], "top_p": 0.5})", "g", *config));
  CHECK(config->eos_tokens == std::vector<std::int32_t>{3, 5, 7});
  CHECK(config->default_top_p == 0.5F);
  CHECK_FALSE(config->default_temperature);
  auto bad = apply_generation_config(R"({"temperature": "hot"})", "g.json", *config);
  REQUIRE_FALSE(bad);
  CHECK_THAT(bad.error().cause, Catch::Contains("g.json") && Catch::Contains("temperature"));
}

TEST_CASE("every required key is missed by name") {
  for (const auto* key : {"model_type",
                          "vocab_size",
                          "hidden_size",
                          "intermediate_size",
                          "moe_intermediate_size",
                          "num_hidden_layers",
                          "num_attention_heads",
                          "n_routed_experts",
                          "n_group",
                          "topk_group",
                          "num_experts_per_tok",
                          "first_k_dense_replace",
                          "routed_scaling_factor",
                          "kv_lora_rank",
                          "qk_rope_head_dim",
                          "qk_nope_head_dim",
                          "v_head_dim",
                          "max_position_embeddings",
                          "rms_norm_eps",
                          "rope_theta",
                          "eos_token_id"}) {
    auto text = test::tiny_config();
    text.erase(key);
    const auto error = refused(text);
    CHECK_THAT(error.cause, Catch::Contains('"' + std::string(key) + "\" is missing"));
    CHECK_FALSE(error.cure.empty());
  }
}

TEST_CASE("wrong types and values are refused with the key and the value") {
  const std::vector<std::pair<const char*, json>> wrong{
    {"hidden_size", "12"},
    {"hidden_size", 0},
    {"hidden_size", -12},
    {"hidden_size", 12.5},
    {"hidden_size", 1LL << 40},
    {"hidden_size", UINT64_MAX},
    {"vocab_size", json::array()},
    {"num_hidden_layers", true},
    {"rms_norm_eps", "small"},
    {"rms_norm_eps", -1.0},
    {"rope_theta", 0},
    {"eos_token_id", 32},
    {"eos_token_id", "end"},
    {"eos_token_id", {1, -1}},
    {"bos_token_id", 99},
    {"qk_rope_head_dim", 3},
    {"n_group", 3},
    {"n_group", 4},
    {"topk_group", 3},
    {"num_experts_per_tok", 3},
    {"hidden_act", "gelu"},
    {"scoring_func", "softmax"},
    {"topk_method", "greedy"},
    {"attention_bias", 1},
    {"rope_interleave", 0},
    {"norm_topk_prob", 1},
    {"quantization_config", 8},
    {"rope_scaling", "yarn"},
    {"num_attention_heads", 1 << 14},
  };
  for (const auto& [key, value] : wrong) {
    auto text = test::tiny_config();
    text[key] = value;
    if (std::string(key) == "num_attention_heads")
      text["kv_lora_rank"] = 1 << 20;
    const auto error = refused(text);
    CHECK_THAT(error.cause, Catch::Contains('"' + std::string(key) + '"'));
    CHECK_FALSE(error.cure.empty());
  }
}

TEST_CASE("deepseek_v2: both ways of routing, and defaults for what old configs leave out") {
  auto text = test::tiny_config();
  text["model_type"] = "deepseek_v2";
  for (const auto* key : {"quantization_config", "n_group", "topk_group", "routed_scaling_factor"})
    text.erase(key);
  auto lite = parse_model_config(text.dump(), "a");
  REQUIRE(lite);
  CHECK(lite->router == router_kind::greedy);
  CHECK(lite->num_groups == 1);
  CHECK(lite->num_groups_kept == 1);
  CHECK(lite->routed_scaling_factor == 1.0F);
  CHECK_FALSE(lite->norm_topk_prob);
  CHECK(lite->attention == attention_kind::latent);

  // Greedy routing takes no notice of groups.
  text["n_group"] = nullptr;
  text["topk_group"] = 1;
  REQUIRE(parse_model_config(text.dump(), "b"));
  text["n_group"] = 4;
  text["topk_group"] = 2;
  text["routed_scaling_factor"] = 16.0;
  text["topk_method"] = "group_limited_greedy";
  auto limited = parse_model_config(text.dump(), "c");
  REQUIRE(limited);
  CHECK(limited->router == router_kind::group_limited_greedy);
  CHECK(limited->num_groups == 4);
  CHECK(limited->num_groups_kept == 2);
  CHECK(limited->routed_scaling_factor == 16.0F);
  text["topk_method"] = "noaux_tc";
  CHECK_THAT(refused(text).cause, Catch::Contains("topk_method"));
  text["topk_method"] = "greedy";
  text["scoring_func"] = "sigmoid";
  CHECK_THAT(refused(text).cause, Catch::Contains("scoring_func"));
}

TEST_CASE("llama and qwen2: dense models of grouped queries") {
  const auto base = json::parse(R"({"vocab_size": 32, "hidden_size": 24, "intermediate_size": 20,
    "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "eos_token_id": 1})");
  auto text = base;
  text["model_type"] = "llama";
  auto plain = parse_model_config(text.dump(), "a");
  REQUIRE(plain);
  CHECK(plain->attention == attention_kind::grouped);
  CHECK(plain->head_dim == 6);
  CHECK(plain->num_kv_heads == 4);
  CHECK(plain->kv_dim() == 2 * 4 * 6);
  CHECK(plain->qk_head_dim() == 6);
  CHECK(plain->rope_dim() == 6);
  CHECK(plain->rope_theta == 10000.0);
  CHECK(plain->num_experts == 0);
  CHECK_FALSE(plain->is_moe_layer(0));
  CHECK_FALSE(plain->is_moe_layer(2));
  CHECK_FALSE(plain->qkv_bias);
  CHECK(plain->attention_size() == 4U * 24 * 24);

  text["head_dim"] = 8;
  text["num_key_value_heads"] = 2;
  text["attention_bias"] = true;
  text["rope_scaling"] = {{"rope_type", "llama3"},
                          {"factor", 8},
                          {"low_freq_factor", 1},
                          {"high_freq_factor", 4},
                          {"original_max_position_embeddings", 16}};
  auto grouped = parse_model_config(text.dump(), "b");
  REQUIRE(grouped);
  CHECK(grouped->head_dim == 8);
  CHECK(grouped->kv_dim() == 2 * 2 * 8);
  CHECK(grouped->attention_size() == 2U * 24 * 32 + 24U * 32);
  CHECK(grouped->qkv_bias);
  CHECK(grouped->o_bias);
  REQUIRE(grouped->llama3_rope);
  CHECK(grouped->llama3_rope->original_max_positions == 16);
  text["rope_scaling"] = {{"type", "linear"}, {"factor", 4}};
  auto stretched = parse_model_config(text.dump(), "c");
  REQUIRE(stretched);
  CHECK(stretched->rope_linear_factor == 4.0);

  auto qwen = base;
  qwen["model_type"] = "qwen2";
  qwen["use_sliding_window"] = false;
  qwen["rope_theta"] = 1e6;
  auto biased = parse_model_config(qwen.dump(), "d");
  REQUIRE(biased);
  CHECK(biased->qkv_bias);
  CHECK_FALSE(biased->o_bias);
  qwen["use_sliding_window"] = true;
  qwen["max_window_layers"] = 3;
  CHECK(parse_model_config(qwen.dump(), "e"));

  const std::vector<std::pair<const char*, json>> wrong{
    {"num_key_value_heads", 3},
    {"num_key_value_heads", 0},
    {"head_dim", 7},
    {"mlp_bias", true},
    {"hidden_act", "gelu"},
    {"rope_scaling", {{"type", "dynamic"}}},
    {"rope_scaling", {{"rope_type", "llama3"}, {"factor", 8}}}};
  for (const auto& [key, value] : wrong) {
    auto bad = base;
    bad["model_type"] = "llama";
    bad[key] = value;
    CHECK_THAT(refused(bad).cause, Catch::Contains(key));
  }
  qwen["max_window_layers"] = 2;
  CHECK_THAT(refused(qwen).cause, Catch::Contains("use_sliding_window"));
  auto odd = base;
  odd["model_type"] = "llama";
  odd["hidden_size"] = 25;
  CHECK_THAT(refused(odd).cause, Catch::Contains("head_dim"));
}

TEST_CASE("quantization: what the tensors do not say is read, the rest is refused by name") {
  auto text = test::tiny_config();
  const auto read = [&](const json& quantization) {
    text["quantization_config"] = quantization;
    auto config = parse_model_config(text.dump(), "q");
    REQUIRE(config);
    return *config;
  };
  auto awq = read({{"quant_method", "awq"},
                   {"bits", 4},
                   {"group_size", 128},
                   {"zero_point", true},
                   {"version", "gemm"},
                   {"modules_to_not_convert", nullptr}});
  REQUIRE(awq.packed);
  CHECK(awq.packed->layout == packed_layout::awq);
  CHECK(awq.packed->group_size == 128);
  CHECK_FALSE(awq.packed->zeros_less_one);
  CHECK_FALSE(awq.fp8);
  auto gptq = read({{"quant_method", "gptq"}, {"bits", 8}, {"group_size", -1}, {"sym", true}});
  REQUIRE(gptq.packed);
  CHECK(gptq.packed->layout == packed_layout::gptq);
  CHECK(gptq.packed->bits == 8);
  CHECK(gptq.packed->group_size == 0);
  CHECK(gptq.packed->zeros_less_one);
  auto second = read(
    {{"quant_method", "gptq"}, {"bits", 4}, {"group_size", 64}, {"checkpoint_format", "gptq_v2"}});
  CHECK_FALSE(second.packed->zeros_less_one);
  auto int8 = read(json::parse(R"({"quant_method": "compressed-tensors", "format": "int-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int", "group_size": null}}}})"));
  REQUIRE(int8.int8);
  CHECK(int8.int8->group_size == 0);
  CHECK_FALSE(read({{"quant_method", "compressed-tensors"}, {"config_groups", 3}}).int8);
  CHECK(read({{"quant_method", "fp8"}, {"weight_block_size", {64, 32}}, {"scale_fmt", "ue8m0"}})
          .fp8->block_cols
        == 32);

  const std::vector<std::pair<const char*, json>> wrong{
    {"bits", {{"quant_method", "awq"}, {"bits", 8}}},
    {"bits", {{"quant_method", "gptq"}, {"bits", 3}}},
    {"bits", {{"quant_method", "gptq"}}},
    {"group_size", {{"quant_method", "gptq"}, {"bits", 4}, {"group_size", "all"}}},
    {"version", {{"quant_method", "awq"}, {"bits", 4}, {"version", "gemv"}}},
    {"checkpoint_format", {{"quant_method", "gptq"}, {"bits", 4}, {"checkpoint_format", "marlin"}}},
    {"format", {{"quant_method", "compressed-tensors"}, {"format", "marlin-24"}}},
    {"quant_method", {{"bits", 4}}}};
  for (const auto& [key, value] : wrong) {
    text["quantization_config"] = value;
    CHECK_THAT(refused(text).cause, Catch::Contains("quantization_config." + std::string(key)));
  }
}

TEST_CASE("nested keys are named with their path") {
  auto text = test::tiny_config();
  text["quantization_config"] = {{"quant_method", "bitsandbytes"}, {"bits", 4}};
  CHECK_THAT(refused(text).cause, Catch::Contains("quantization_config.quant_method")
                                    && Catch::Contains("bitsandbytes"));
  text["quantization_config"] = {{"quant_method", "fp8"}, {"weight_block_size", {128}}};
  CHECK_THAT(refused(text).cause, Catch::Contains("quantization_config.weight_block_size"));
  text = test::tiny_config();
  text["rope_scaling"] = {{"type", "dynamic"}};
  CHECK_THAT(refused(text).cause, Catch::Contains("rope_scaling.type"));
  text["rope_scaling"] = {{"type", "yarn"}};
  CHECK_THAT(refused(text).cause, Catch::Contains("rope_scaling.factor"));
}

TEST_CASE("other architectures, other JSON and missing files are refused clearly") {
  auto text = test::tiny_config();
  text["model_type"] = "mamba";
  const auto error = refused(text);
  CHECK_THAT(error.cause, Catch::Contains("mamba"));
  CHECK_THAT(error.cure, Catch::Contains("deepseek_v3"));
  for (const auto* broken : {"", "{", "[]", "{\"a\": \xff}", "nan"}) {
    auto result = parse_model_config(broken, "x/config.json");
    REQUIRE_FALSE(result);
    CHECK(result.error().code == error_code::invalid_model);
    CHECK_THAT(result.error().cause, Catch::Contains("x/config.json"));
  }
  const testing::temporary_directory directory;
  auto missing = load_model_config(directory.path());
  REQUIRE_FALSE(missing);
  CHECK(missing.error().code == error_code::invalid_model);
  CHECK_THAT(missing.error().cause, Catch::Contains("config.json"));
}
