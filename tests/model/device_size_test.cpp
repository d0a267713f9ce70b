#include "troupe/model/device_size.hpp"

#include <string>

#include <catch2/catch.hpp>

using namespace troupe;
using namespace troupe::model;

namespace {

/// What config.json of DeepSeek-R1 says, or that of one whose wide weights are of another type.
model_config r1(const std::string& wide = "bfloat16") {
  std::string text = R"({"architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3", "attention_bias": false, "bos_token_id": 0, "eos_token_id": 1,
    "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
    "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_group": 4,
    "topk_method": "noaux_tc", "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    "vocab_size": 129280,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "weight_block_size": [128, 128]}})";
  text.replace(text.find("bfloat16"), 8, wide);
  auto config = parse_model_config(text, "config.json");
  REQUIRE(config);
  return *config;
}

double gigabytes(std::uint64_t bytes) {
  return static_cast<double>(bytes) / 1e9;
}

} // namespace

TEST_CASE("the weights of R1 take what their tensors take, and a little more") {
  const auto config = r1();
  // Counted by hand. One expert: 3 * 7168 * 2048 = 44.04 MB; a layer has 257: 11.318 GB. Attention:
  // q_a 11.01 + q_b 37.75 + kv_a 4.13 + o 117.44 MB in FP8, kv_b 2 * 16.78 MB wide: 203.9 MB; the
  // router 3.7 MB wide.
  const model_part one_layer{10, 11, true, 0, 256};
  CHECK(gigabytes(device_weight_bytes(config, one_layer))
        == Approx((11.318 + 0.2039 + 0.0037) * (1 + 1.0 / 32) + 0.268).epsilon(0.002));
  // The embedding and the head are wide: 1.853 GB each.
  const auto all = gigabytes(device_weight_bytes(config, whole_model(config)));
  CHECK(all > 58 * 11.526 + 3 * 0.6 + 2 * 1.853);
  CHECK(all < 1.05 * (58 * 11.526 + 3 * 0.6 + 2 * 1.853));
  CHECK(device_weight_bytes(config, whole_model(config, true))
        > device_weight_bytes(config, whole_model(config)) + 11'500'000'000U);
  // An expert group: 32 experts of one layer.
  const model_part group{10, 11, false, 0, 32};
  CHECK(gigabytes(device_weight_bytes(config, group))
        == Approx(32 * 0.04405 * (1 + 1.0 / 32) + 0.268).epsilon(0.002));
}

TEST_CASE("wider weights take more, and groups that a GPU cannot multiply count as wide") {
  auto config = r1();
  const model_part part{10, 11, true, 0, 256};
  const auto fp8 = device_weight_bytes(config, part);
  config.fp8.reset();
  config.int8 = int8_config{128};
  const auto int8 = device_weight_bytes(config, part);
  CHECK(int8 > fp8);
  CHECK(gigabytes(int8) < 1.06 * gigabytes(fp8));
  config.int8 = int8_config{64};
  const auto expanded = device_weight_bytes(config, part);
  config.int8.reset();
  config.weight_bits = 16;
  CHECK(device_weight_bytes(config, part) == expanded);
  CHECK(gigabytes(expanded) > 1.9 * gigabytes(fp8));
  config.packed = packed_config{packed_layout::awq, 4, 128, false};
  config.weight_bits = 4;
  CHECK(gigabytes(device_weight_bytes(config, part)) < 0.6 * gigabytes(fp8));
}

TEST_CASE("a head in 8 bit takes half, with scales by groups of 128 columns") {
  auto config = r1();
  const auto stored = device_weight_bytes(config, whole_model(config));
  const auto layer = device_weight_bytes(config, {10, 11, true, 0, 256});
  config.head = head_format::int8;
  const auto narrow = device_weight_bytes(config, whole_model(config));
  const double head = 129280.0 * 7168;
  CHECK(gigabytes(stored - narrow)
        == Approx((2 * head - head * (1 + 4.0 / 128)) * (1 + 1.0 / 32) / 1e9).epsilon(0.001));
  CHECK(device_weight_bytes(config, {10, 11, true, 0, 256}) == layer);
  // A head that is the embedding is kept apart from it.
  config.tie_word_embeddings = true;
  const auto tied = device_weight_bytes(config, whole_model(config));
  CHECK(gigabytes(tied) == Approx(gigabytes(narrow)).epsilon(1e-6));
}

TEST_CASE("with exact numerics, weights stay as they are stored, and rows are in float32") {
  constexpr auto kExact = kernels::numerics::exact;
  auto config = r1();
  const model_part layer{10, 11, true, 0, 256};
  // As it is stored but for what is made of kv_b, which bf16 does not hold.
  const double kv_b = 2 * 128.0 * 128 * 512;
  CHECK(gigabytes(device_weight_bytes(config, layer, kExact) - device_weight_bytes(config, layer))
        == Approx(2 * kv_b * (1 + 1.0 / 32) / 1e9).epsilon(0.01));
  // Groups that the matrix unit cannot multiply are not expanded.
  config.fp8.reset();
  config.int8 = int8_config{64};
  CHECK(gigabytes(device_weight_bytes(config, layer, kExact))
        < 0.6 * gigabytes(device_weight_bytes(config, layer)));
  // Nor are wide weights rounded.
  config.int8.reset();
  config.weight_bits = 16;
  const auto bf16 = device_weight_bytes(config, layer, kExact);
  CHECK(gigabytes(bf16) == Approx(gigabytes(device_weight_bytes(config, layer))).epsilon(0.001));
  config.wide_bits = 32;
  CHECK(gigabytes(device_weight_bytes(config, layer, kExact))
        == Approx(2 * gigabytes(bf16)).epsilon(0.02));
  CHECK(gigabytes(device_weight_bytes(config, layer)) == Approx(gigabytes(bf16)).epsilon(0.001));

  config = r1();
  const stage_options options{10, 18, 2048, true};
  const auto exact = device_scratch_bytes(config, options, kExact);
  CHECK(gigabytes(exact) > 2048 * 8 * 7168 * 4 / 1e9);
  CHECK(exact < 2 * device_scratch_bytes(config, options));
  CHECK(device_scratch_bytes(config, 32, 2048, kExact) < exact);
}

TEST_CASE("checkpoints say how wide their weights are") {
  CHECK(r1().wide_bits == 16);
  CHECK_FALSE(r1().wide_is_f16);
  CHECK(r1("float16").wide_bits == 16);
  CHECK(r1("float16").wide_is_f16);
  CHECK(r1("float32").wide_bits == 32);
}

TEST_CASE("scratch memory follows the rows of a micro-batch") {
  const auto config = r1();
  stage_options options{10, 18, 2048, true};
  const auto large = device_scratch_bytes(config, options);
  // The largest: hidden rows of experts, and the same as the matrix unit wants them.
  CHECK(gigabytes(large) > 2 * 2048 * 8 * 7168 * 2 / 1e9);
  CHECK(gigabytes(large) < 2.0);
  options.max_rows = 256;
  CHECK(gigabytes(device_scratch_bytes(config, options)) < gigabytes(large) / 2);
  options.max_rows = 2048;
  options.with_local_experts = false;
  CHECK(device_scratch_bytes(config, options) < large);
  options = {53, 61, 2048, true};
  const auto last = device_scratch_bytes(config, options);
  CHECK(last > large);
  options.max_drafts = 2;
  CHECK(device_scratch_bytes(config, options) > last);
  CHECK(device_scratch_bytes(config, 32, 2048) < large);
  CHECK(device_scratch_bytes(config, 2, 2048) < device_scratch_bytes(config, 32, 2048));
}
