#include "troupe/model/model_config.hpp"

#include "troupe/model/config_reader.hpp"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <limits>
#include <string_view>

#include <fmt/format.h>

namespace troupe::model {

namespace {

constexpr std::uint64_t kMaxConfigBytes = 16U << 20;
constexpr std::int32_t kMaxDim = 1 << 24;
constexpr std::int32_t kMaxLayers = 4096;
constexpr std::int32_t kMaxHeads = 1 << 14;
constexpr std::int32_t kMaxExperts = 1 << 16;
constexpr std::int32_t kMaxPositions = 1 << 30;

/// Refuses a key that switches on something other than what this architecture does.
void require_text(config_reader& in, const char* key, const std::string& only) {
  const auto value = in.text_or(key, only);
  if (value != only)
    in.refuse(key, fmt::format("is \"{}\", which is not supported", value),
              fmt::format("only \"{}\" is", only));
}

void require_boolean(config_reader& in, const char* key, bool only) {
  if (in.boolean_or(key, only) != only)
    in.refuse(key, fmt::format("is {}, which is not supported", !only),
              fmt::format("only {} is", only));
}

yarn_config read_yarn(config_reader& rope, const model_config& config) {
  yarn_config yarn;
  yarn.factor = rope.number("factor", 1.0, 1e6);
  yarn.original_max_positions =
    rope.integer_or("original_max_position_embeddings", 1, kMaxPositions, config.max_positions);
  yarn.beta_fast = rope.number_or("beta_fast", 1e-6, 1e6, 32.0);
  yarn.beta_slow = rope.number_or("beta_slow", 1e-6, 1e6, 1.0);
  if (yarn.beta_slow > yarn.beta_fast)
    rope.refuse("beta_slow", fmt::format("is {}, above beta_fast", yarn.beta_slow),
                "give a value not above beta_fast");
  if (rope.has("attention_factor"))
    rope.refuse("attention_factor", "is given, which is not supported", "give mscale instead");
  require_boolean(rope, "truncate", true);
  yarn.mscale = rope.number_or("mscale", 0.0, 100.0, 1.0);
  yarn.mscale_all_dim = rope.number_or("mscale_all_dim", 0.0, 100.0, 0.0);
  return yarn;
}

llama3_rope_config read_llama3_rope(config_reader& rope) {
  llama3_rope_config llama3;
  llama3.factor = rope.number("factor", 1.0, 1e6);
  llama3.low_freq_factor = rope.number("low_freq_factor", 1e-6, 1e6);
  llama3.high_freq_factor = rope.number("high_freq_factor", 1e-6, 1e6);
  if (llama3.low_freq_factor >= llama3.high_freq_factor)
    rope.refuse("low_freq_factor",
                fmt::format("is {}, not below high_freq_factor", llama3.low_freq_factor),
                "give a value below high_freq_factor");
  llama3.original_max_positions =
    rope.integer("original_max_position_embeddings", 1, kMaxPositions);
  return llama3;
}

expected<void> read_rope(config_reader& in, const std::string& file, model_config& config) {
  // transformers 5 renamed rope_scaling and moved rope_theta into it.
  const char* key = in.has("rope_parameters") ? "rope_parameters" : "rope_scaling";
  // Llama's first models had no rope_theta.
  const auto read_theta = [&](config_reader& from) {
    return config.attention == attention_kind::latent
             ? from.number("rope_theta", 1.001, 1e12)
             : from.number_or("rope_theta", 1.001, 1e12, 10000.0);
  };
  if (!in.has(key)) {
    config.rope_theta = read_theta(in);
    return in.finish();
  }
  config_reader rope(file, in.object(key), fmt::format("{}.", key));
  if (auto ok = in.finish(); !ok)
    return ok;
  config.rope_theta = read_theta(rope.has("rope_theta") ? rope : in);
  if (auto ok = in.finish(); !ok)
    return ok;
  if (const auto part = rope.number_or("partial_rotary_factor", 0.0, 1.0, 1.0); part != 1.0)
    rope.refuse("partial_rotary_factor", fmt::format("is {}, which is not supported", part),
                "only 1 is");
  const char* type_key = rope.has("rope_type") ? "rope_type" : "type";
  const auto type = rope.text_or(type_key, "default");
  const bool is_grouped = config.attention == attention_kind::grouped;
  if (type == "yarn")
    config.yarn = read_yarn(rope, config);
  else if (type == "llama3" && is_grouped)
    config.llama3_rope = read_llama3_rope(rope);
  else if (type == "linear" && is_grouped)
    config.rope_linear_factor = rope.number("factor", 1.0, 1e6);
  else if (type != "default")
    rope.refuse(type_key, fmt::format("is \"{}\", which is not supported", type),
                is_grouped ? "\"default\", \"linear\", \"llama3\" and \"yarn\" are"
                           : "\"yarn\" and \"default\" are");
  return rope.finish();
}

fp8_config read_blocks(config_reader& quant) {
  const auto block = quant.integers("weight_block_size", 1, kMaxDim);
  if (block.size() == 2)
    return {block[0], block[1]};
  quant.refuse("weight_block_size", fmt::format("has {} entries", block.size()),
               "give two, rows and columns of a block, such as [128, 128]");
  return {};
}

/// The weights of the first group of `config_groups` (compressed-tensors), which say how many
/// bits and columns a group has; null where there are none.
const nlohmann::json* find_group_weights(const nlohmann::json& quant) {
  const auto groups = quant.find("config_groups");
  if (groups == quant.end() || !groups->is_object())
    return nullptr;
  for (const auto& group : *groups)
    if (group.is_object() && group.contains("weights") && group["weights"].is_object())
      return &group["weights"];
  return nullptr;
}

void read_compressed_tensors(config_reader& quant, const std::string& file,
                             const nlohmann::json& object, model_config& config) {
  const auto format = quant.text_or("format", "dense");
  const std::initializer_list<std::string_view> known = {
    "dense", "int-quantized", "float-quantized", "naive-quantized", "pack-quantized"};
  if (std::find(known.begin(), known.end(), format) == known.end())
    quant.refuse("format", fmt::format("is \"{}\", which is not supported", format),
                 "\"int-quantized\", \"float-quantized\" and \"pack-quantized\" are");
  const auto* weights = find_group_weights(object);
  if (weights == nullptr)
    return;
  config_reader group(file, *weights, "quantization_config.config_groups.weights.");
  config.weight_bits = group.integer_or("num_bits", 1, 32, 8);
  if (config.weight_bits == 8 && group.text_or("type", "int") == "int")
    config.int8 = int8_config{std::max(group.integer_or("group_size", -1, kMaxDim, 0), 0)};
  if (auto ok = group.finish(); !ok)
    quant.refuse("config_groups", "has weights that cannot be read", ok.error().cause);
}

packed_config read_packed(config_reader& quant, packed_layout layout) {
  packed_config result;
  result.layout = layout;
  result.bits = quant.integer("bits", 2, 8);
  const bool is_awq = layout == packed_layout::awq;
  if (result.bits != 4 && (is_awq || result.bits != 8))
    quant.refuse("bits", fmt::format("is {}, which is not supported", result.bits),
                 is_awq ? "only 4 is" : "4 and 8 are");
  // -1 and null are written for scales of whole rows.
  result.group_size = std::max(quant.integer_or("group_size", -1, kMaxDim, 0), 0);
  if (is_awq) {
    const auto version = quant.text_or("version", "gemm");
    if (version != "gemm" && version != "GEMM")
      quant.refuse("version", fmt::format("is \"{}\", which is not supported", version),
                   "only \"gemm\" is");
    return result;
  }
  const auto format = quant.text_or("checkpoint_format", "gptq");
  result.zeros_less_one = format == "gptq";
  if (format != "gptq" && format != "gptq_v2")
    quant.refuse("checkpoint_format", fmt::format("is \"{}\", which is not supported", format),
                 "\"gptq\" and \"gptq_v2\" are");
  return result;
}

/// Which tensors a quantized checkpoint has is seen from the tensors; this is what they do not say.
expected<void> read_quantization(config_reader& in, const std::string& file, model_config& config) {
  if (!in.has("quantization_config"))
    return {};
  config_reader quant(file, in.object("quantization_config"), "quantization_config.");
  if (auto ok = in.finish(); !ok)
    return ok;
  const auto method = quant.text("quant_method");
  if (method == "fp8") {
    require_text(quant, "fmt", "e4m3");
    config.fp8 = read_blocks(quant);
  } else if (method == "blockwise_int8") {
    config.fp8 = read_blocks(quant);
  } else if (method == "awq") {
    config.packed = read_packed(quant, packed_layout::awq);
  } else if (method == "gptq") {
    config.packed = read_packed(quant, packed_layout::gptq);
  } else if (method == "compressed-tensors") {
    read_compressed_tensors(quant, file, in.object("quantization_config"), config);
  } else if (method != "w8a8_int8") {
    quant.refuse("quant_method", fmt::format("is \"{}\", which is not supported", method),
                 "\"fp8\", \"awq\", \"gptq\", \"compressed-tensors\", \"blockwise_int8\" and "
                 "\"w8a8_int8\" are; a checkpoint in bf16, f16 or f32 needs no "
                 "quantization_config");
  }
  if (config.packed)
    config.weight_bits = config.packed->bits;
  else if (method != "compressed-tensors")
    config.weight_bits = 8;
  return quant.finish();
}

/// Relations between keys, and products that must stay addressable as int32 columns.
void check_consistency(config_reader& in, const model_config& config) {
  const auto check_width = [&](const char* key, std::int64_t width) {
    if (width > std::numeric_limits<std::int32_t>::max() / 4)
      in.refuse(key, fmt::format("makes a matrix {} wide", width), "give a smaller value");
  };
  const std::int64_t heads = config.num_heads;
  check_width("num_attention_heads", heads * config.qk_head_dim());
  if (config.attention == attention_kind::grouped) {
    if (config.head_dim % 2 != 0)
      in.refuse("head_dim", fmt::format("is {}, an odd number", config.head_dim),
                "rotation works on pairs: give an even number");
    if (config.num_heads % config.num_kv_heads != 0)
      in.refuse("num_key_value_heads",
                fmt::format("is {}, which does not divide the {} heads of num_attention_heads",
                            config.num_kv_heads, config.num_heads),
                "give a divisor of num_attention_heads");
    return;
  }
  check_width("num_attention_heads", heads * (config.qk_nope_head_dim + config.v_head_dim));
  check_width("num_attention_heads", heads * config.kv_lora_rank);
  check_width("n_shared_experts",
              std::int64_t{config.num_shared_experts} * config.moe_intermediate_size);
  if (config.qk_rope_head_dim % 2 != 0)
    in.refuse("qk_rope_head_dim", fmt::format("is {}, an odd number", config.qk_rope_head_dim),
              "rotation works on pairs: give an even number");
  if (config.num_experts % config.num_groups != 0) {
    in.refuse("n_group",
              fmt::format("is {}, which does not divide the {} experts of n_routed_experts",
                          config.num_groups, config.num_experts),
              "give a divisor of n_routed_experts");
    return;
  }
  const auto group_size = config.num_experts / config.num_groups;
  if (config.router == router_kind::noaux_tc && config.num_groups > 1 && group_size < 2)
    in.refuse("n_group", fmt::format("is {}, which leaves one expert a group", config.num_groups),
              "a group is ranked by its two best experts: give fewer groups");
  if (config.num_groups_kept > config.num_groups)
    in.refuse("topk_group",
              fmt::format("is {}, above n_group {}", config.num_groups_kept, config.num_groups),
              "give a value not above n_group");
  if (config.num_experts_per_token > config.num_groups_kept * group_size)
    in.refuse("num_experts_per_tok",
              fmt::format("is {}, but the kept groups have {} experts",
                          config.num_experts_per_token, config.num_groups_kept * group_size),
              "give a value not above topk_group * n_routed_experts / n_group");
}

void add_eos(const std::vector<std::int32_t>& ids, model_config& config) {
  auto& all = config.eos_tokens;
  all.insert(all.end(), ids.begin(), ids.end());
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
}

void read_latent_attention(config_reader& in, model_config& config) {
  config.attention = attention_kind::latent;
  config.num_heads = in.integer("num_attention_heads", 1, kMaxHeads);
  config.q_lora_rank = in.integer_or("q_lora_rank", 1, kMaxDim, 0);
  config.kv_lora_rank = in.integer("kv_lora_rank", 1, kMaxDim);
  config.qk_nope_head_dim = in.integer("qk_nope_head_dim", 1, kMaxDim);
  config.qk_rope_head_dim = in.integer("qk_rope_head_dim", 2, kMaxDim);
  config.v_head_dim = in.integer("v_head_dim", 1, kMaxDim);
  config.o_bias = in.boolean_or("attention_bias", false);
  config.rope_interleaved = in.boolean_or("rope_interleave", true);
}

/// What DeepSeek-V2 and V3 have in common behind the attention.
void read_experts(config_reader& in, model_config& config) {
  config.intermediate_size = in.integer("intermediate_size", 1, kMaxDim);
  config.moe_intermediate_size = in.integer("moe_intermediate_size", 1, kMaxDim);
  config.first_k_dense_replace = in.integer("first_k_dense_replace", 0, kMaxLayers);
  config.moe_layer_freq = in.integer_or("moe_layer_freq", 1, kMaxLayers, 1);
  config.num_experts = in.integer("n_routed_experts", 1, kMaxExperts);
  config.num_shared_experts = in.integer_or("n_shared_experts", 0, kMaxExperts, 0);
  config.num_experts_per_token = in.integer("num_experts_per_tok", 1, kMaxExperts);
}

void read_deepseek_v3(config_reader& in, model_config& config) {
  config.num_mtp_layers = in.integer_or("num_nextn_predict_layers", 0, kMaxLayers, 0);
  read_latent_attention(in, config);
  read_experts(in, config);
  config.num_groups = in.integer("n_group", 1, kMaxExperts);
  config.num_groups_kept = in.integer("topk_group", 1, kMaxExperts);
  config.routed_scaling_factor = static_cast<float>(in.number("routed_scaling_factor", 0.0, 1e6));
  config.norm_topk_prob = in.boolean_or("norm_topk_prob", true);
  config.router = router_kind::noaux_tc;
  require_text(in, "scoring_func", "sigmoid");
  require_text(in, "topk_method", "noaux_tc");
}

/// Defaults are those of configuration_deepseek.py of DeepSeek-V2's release.
void read_deepseek_v2(config_reader& in, model_config& config) {
  read_latent_attention(in, config);
  read_experts(in, config);
  config.routed_scaling_factor =
    static_cast<float>(in.number_or("routed_scaling_factor", 0.0, 1e6, 1.0));
  config.norm_topk_prob = in.boolean_or("norm_topk_prob", false);
  require_text(in, "scoring_func", "softmax");
  const auto method = in.text_or("topk_method", "greedy");
  if (method == "greedy") {
    config.router = router_kind::greedy;
  } else if (method == "group_limited_greedy") {
    config.router = router_kind::group_limited_greedy;
    config.num_groups = in.integer("n_group", 1, kMaxExperts);
    config.num_groups_kept = in.integer("topk_group", 1, kMaxExperts);
  } else {
    in.refuse("topk_method", fmt::format("is \"{}\", which is not supported", method),
              "\"greedy\" and \"group_limited_greedy\" are");
  }
}

/// Llama and Qwen2: grouped-query attention and one MLP a layer.
void read_dense(config_reader& in, model_config& config) {
  config.attention = attention_kind::grouped;
  config.num_heads = in.integer("num_attention_heads", 1, kMaxHeads);
  config.num_kv_heads = in.integer_or("num_key_value_heads", 1, kMaxHeads, config.num_heads);
  if (!in.has("head_dim") && config.hidden_size % config.num_heads != 0)
    in.refuse("head_dim", "is missing, and num_attention_heads does not divide hidden_size",
              "give the width of one head");
  config.head_dim = in.integer_or("head_dim", 2, kMaxDim, config.hidden_size / config.num_heads);
  config.intermediate_size = in.integer("intermediate_size", 1, kMaxDim);
  require_boolean(in, "mlp_bias", false);
  config.first_k_dense_replace = config.num_layers;
}

void read_llama(config_reader& in, model_config& config) {
  read_dense(in, config);
  config.qkv_bias = config.o_bias = in.boolean_or("attention_bias", false);
}

void read_qwen2(config_reader& in, model_config& config) {
  read_dense(in, config);
  config.qkv_bias = true;
  if (in.boolean_or("use_sliding_window", false)
      && in.integer_or("max_window_layers", 0, kMaxLayers, 0) < config.num_layers)
    in.refuse("use_sliding_window", "is true, which is not supported", "only false is");
}

struct family {
  const char* model_type;
  void (*read)(config_reader& in, model_config& config);
};

constexpr family kFamilies[] = {{"deepseek_v3", read_deepseek_v3},
                                {"deepseek_v2", read_deepseek_v2},
                                {"llama", read_llama},
                                {"qwen2", read_qwen2}};

} // namespace

std::uint64_t model_config::attention_size() const {
  const auto hidden = static_cast<std::uint64_t>(hidden_size);
  const auto heads = static_cast<std::uint64_t>(num_heads);
  const auto query = heads * static_cast<std::uint64_t>(qk_head_dim());
  if (attention == attention_kind::grouped)
    return 2 * hidden * query + hidden * static_cast<std::uint64_t>(kv_dim());
  const auto q_rank = static_cast<std::uint64_t>(q_lora_rank);
  const auto kv_rank = static_cast<std::uint64_t>(kv_lora_rank);
  const auto values = heads * static_cast<std::uint64_t>(v_head_dim);
  return (q_rank > 0 ? hidden * q_rank + q_rank * query : hidden * query)
         + hidden * static_cast<std::uint64_t>(kv_dim())
         + kv_rank * (heads * static_cast<std::uint64_t>(qk_nope_head_dim) + values)
         + values * hidden;
}

expected<model_config> parse_model_config(std::string_view text, const std::string& file) {
  auto object = parse_json_object(text, file);
  if (!object)
    return tl::unexpected(std::move(object.error()));
  config_reader in(file, *object);
  model_config config;
  config.model_type = in.text("model_type");
  if (auto ok = in.finish(); !ok)
    return tl::unexpected(std::move(ok.error()));
  const auto* known =
    std::find_if(std::begin(kFamilies), std::end(kFamilies),
                 [&](const family& f) { return config.model_type == f.model_type; });
  if (known == std::end(kFamilies)) {
    in.refuse(
      "model_type", fmt::format("is \"{}\", which is not supported", config.model_type),
      "\"deepseek_v3\" (DeepSeek-V3, R1 and their relatives), \"deepseek_v2\", \"llama\" and "
      "\"qwen2\" are");
    return tl::unexpected(in.finish().error());
  }
  config.vocab_size = in.integer("vocab_size", 1, kMaxDim);
  config.hidden_size = in.integer("hidden_size", 1, kMaxDim);
  config.num_layers = in.integer("num_hidden_layers", 1, kMaxLayers);
  config.max_positions = in.integer("max_position_embeddings", 1, kMaxPositions);
  config.rms_norm_eps = static_cast<float>(in.number("rms_norm_eps", 0.0, 1.0));
  config.tie_word_embeddings = in.boolean_or("tie_word_embeddings", false);
  require_text(in, "hidden_act", "silu");
  const auto type = in.text_or(in.has("dtype") ? "dtype" : "torch_dtype", "bfloat16");
  config.wide_bits = type == "float32" ? 32 : 16;
  config.wide_is_f16 = type == "float16";
  known->read(in, config);
  config.bos_token = in.integer_or("bos_token_id", 0, config.vocab_size - 1, -1);
  add_eos(in.integers("eos_token_id", 0, config.vocab_size - 1), config);
  if (auto ok = in.finish(); !ok)
    return tl::unexpected(std::move(ok.error()));
  check_consistency(in, config);
  if (auto ok = in.finish(); !ok)
    return tl::unexpected(std::move(ok.error()));
  if (auto ok = read_rope(in, file, config); !ok)
    return tl::unexpected(std::move(ok.error()));
  if (auto ok = read_quantization(in, file, config); !ok)
    return tl::unexpected(std::move(ok.error()));
  return config;
}

expected<void> apply_generation_config(std::string_view text, const std::string& file,
                                       model_config& config) {
  auto object = parse_json_object(text, file);
  if (!object)
    return tl::unexpected(std::move(object.error()));
  config_reader in(file, *object);
  if (in.has("temperature"))
    config.default_temperature = static_cast<float>(in.number("temperature", 0.0, 100.0));
  if (in.has("top_p"))
    config.default_top_p = static_cast<float>(in.number("top_p", 0.0, 1.0));
  if (in.has("eos_token_id"))
    add_eos(in.integers("eos_token_id", 0, config.vocab_size - 1), config);
  return in.finish();
}

std::optional<std::filesystem::path> random_config_of(const std::filesystem::path& model) {
  constexpr std::string_view prefix = "random:";
  const auto text = model.string();
  if (!text.starts_with(prefix))
    return std::nullopt;
  return std::filesystem::path(text.substr(prefix.size()));
}

expected<model_config> load_model_config(const std::filesystem::path& model) {
  const auto random = random_config_of(model);
  const auto file = random ? *random : model / "config.json";
  auto text = read_text_file(file, kMaxConfigBytes);
  if (!text)
    return tl::unexpected(std::move(text.error()));
  auto config = parse_model_config(*text, file.string());
  if (!config || random)
    return config;
  const auto generation = model / "generation_config.json";
  std::error_code ignored;
  if (!std::filesystem::exists(generation, ignored))
    return config;
  auto defaults = read_text_file(generation, kMaxConfigBytes);
  if (!defaults)
    return tl::unexpected(std::move(defaults.error()));
  if (auto ok = apply_generation_config(*defaults, generation.string(), *config); !ok)
    return tl::unexpected(std::move(ok.error()));
  return config;
}

} // namespace troupe::model
