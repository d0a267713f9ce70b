#pragma once

#include "troupe/base/error.hpp"

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace troupe::model {

/// YaRN's stretching of the rotary frequencies (arXiv 2309.00071), as DeepSeek configures it.
struct yarn_config {
  double factor = 1.0;
  std::int32_t original_max_positions = 4096;
  double beta_fast = 32.0;
  double beta_slow = 1.0;
  double mscale = 1.0;
  double mscale_all_dim = 0.0;
};

/// Llama 3.1's stretching of the rotary frequencies (`rope_type: llama3`;
/// _compute_llama3_parameters of transformers' modeling_rope_utils.py): long wavelengths are
/// stretched, short ones kept.
struct llama3_rope_config {
  double factor = 1.0;
  double low_freq_factor = 1.0;
  double high_freq_factor = 4.0;
  std::int32_t original_max_positions = 8192;
};

/// The two kinds of attention: DeepSeek's multi-head latent attention, and grouped queries.
enum class attention_kind : std::uint8_t { latent, grouped };

/// How experts are chosen, named as in `topk_method`. The first scores by sigmoid and has a
/// correction bias, the others score by softmax.
enum class router_kind : std::uint8_t { noaux_tc, greedy, group_limited_greedy };

/// Weights in FP8 or INT8 with one scale a block.
struct fp8_config {
  std::int32_t block_rows = 128;
  std::int32_t block_cols = 128;
};

/// Weights in INT8 with one scale a group of columns of a row. The tensors of a checkpoint say
/// this themselves; made-up weights take it from here.
struct int8_config {
  std::int32_t group_size = 0; ///< 0: one group a row
};

/// How AWQ and GPTQ pack integers; see integer_packing.hpp.
enum class packed_layout : std::uint8_t { awq, gptq };

/// Weights packed into words with one scale and one zero point a group of columns.
struct packed_config {
  packed_layout layout = packed_layout::awq;
  std::int32_t bits = 4;       ///< 4; GPTQ also 8
  std::int32_t group_size = 0; ///< columns; 0: all
  bool zeros_less_one = false; ///< zero points are stored less one (GPTQ's first format)
};

/// Which part of the weights a device has that computes a stage together with others.
struct tensor_rank {
  std::int32_t rank = 0;
  std::int32_t num_ranks = 1;
};

/// How the head is kept: as the checkpoint has it, or rounded to 8 bit when it is loaded, by row
/// and group of 128 columns (kernels/narrow_weight.hpp).
enum class head_format : std::uint8_t { stored, int8 };

/// What config.json says of a model of the family (`model_type` deepseek_v3, deepseek_v2, llama or
/// qwen2), checked to be consistent. A plain value.
struct model_config {
  std::string model_type;
  std::int32_t vocab_size = 0;
  std::int32_t hidden_size = 0;
  std::int32_t num_layers = 0;     ///< without the MTP layers behind them
  std::int32_t num_mtp_layers = 0; ///< the first of them drafts; see stage_model::draft
  std::int32_t max_positions = 0;
  float rms_norm_eps = 1e-6F;
  bool tie_word_embeddings = false;

  attention_kind attention = attention_kind::latent;
  std::int32_t num_heads = 0;
  bool o_bias = false; ///< of o_proj; with latent attention also of q_a_proj and kv_a_proj

  // Multi-head latent attention.
  std::int32_t q_lora_rank = 0; ///< 0: one q_proj instead of q_a and q_b
  std::int32_t kv_lora_rank = 0;
  std::int32_t qk_nope_head_dim = 0;
  std::int32_t qk_rope_head_dim = 0;
  std::int32_t v_head_dim = 0;
  bool rope_interleaved = true; ///< pairs are neighbours; false: halves of the rotated part

  // Grouped-query attention.
  std::int32_t num_kv_heads = 0;
  std::int32_t head_dim = 0;
  bool qkv_bias = false; ///< of q_proj, k_proj and v_proj

  double rope_theta = 10000.0;
  double rope_linear_factor = 1.0; ///< positions are divided by it
  std::optional<yarn_config> yarn;
  std::optional<llama3_rope_config> llama3_rope;

  // Feed-forward. Models without experts have num_experts 0.
  std::int32_t intermediate_size = 0;     ///< of the dense layers
  std::int32_t moe_intermediate_size = 0; ///< of one expert
  std::int32_t first_k_dense_replace = 0;
  std::int32_t moe_layer_freq = 1;
  std::int32_t num_experts = 0;
  std::int32_t num_shared_experts = 0;
  std::int32_t num_experts_per_token = 0;
  std::int32_t num_groups = 1;
  std::int32_t num_groups_kept = 1;
  router_kind router = router_kind::noaux_tc;
  float routed_scaling_factor = 1.0F;
  bool norm_topk_prob = true;

  std::optional<fp8_config> fp8;       ///< from quantization_config
  std::optional<packed_config> packed; ///< from quantization_config
  std::optional<int8_config> int8;     ///< from quantization_config
  std::int32_t weight_bits = 16;       ///< of most weights, to estimate memory by
  std::int32_t wide_bits = 16;         ///< of those that are not quantized, likewise
  bool wide_is_f16 = false;            ///< those are float16 and not bf16

  std::int32_t bos_token = -1;          ///< -1: the config names none
  std::vector<std::int32_t> eos_tokens; ///< of config.json and generation_config.json, ascending
  std::optional<float> default_temperature; ///< of generation_config.json
  std::optional<float> default_top_p;

  /// Of a whole model: all. Of one rank's part (rank_config, tensor_shard.hpp): the numbers of
  /// heads and the intermediate sizes above are that part's.
  tensor_rank part;

  head_format head = head_format::stored; ///< for who loads the model to choose

  bool is_moe_layer(std::int32_t layer) const {
    return num_experts > 0 && layer >= first_k_dense_replace && layer % moe_layer_freq == 0;
  }

  /// Elements of one head's query. Latent: the part without positions, then the rotated part.
  std::int32_t qk_head_dim() const {
    return attention == attention_kind::latent ? qk_nope_head_dim + qk_rope_head_dim : head_dim;
  }

  /// Elements of one head's query that are rotated.
  std::int32_t rope_dim() const {
    return attention == attention_kind::latent ? qk_rope_head_dim : head_dim;
  }

  /// Elements that one layer caches for one token: the latent, then the rotated key; or the
  /// rotated keys of all heads, then their values.
  std::int32_t kv_dim() const {
    return attention == attention_kind::latent ? kv_lora_rank + qk_rope_head_dim
                                               : 2 * num_kv_heads * head_dim;
  }

  /// Elements of the attention's matrices in one layer, for placement.
  std::uint64_t attention_size() const;

  /// Width of the shared experts, which are one MLP.
  std::int32_t shared_intermediate_size() const {
    return num_shared_experts * moe_intermediate_size;
  }
};

/// FILE of a model that is named "random:FILE": a config.json of made-up weights. Nothing for a
/// directory.
std::optional<std::filesystem::path> random_config_of(const std::filesystem::path& model);

/// Reads `model`/config.json and, where it is there, `model`/generation_config.json; or FILE alone
/// where `model` is "random:FILE".
/// Errors: invalid_model naming the file, the key and what would be right; io_failed.
expected<model_config> load_model_config(const std::filesystem::path& model);

/// Parses the text of a config.json; `file` is the name put into errors. Takes the old
/// `rope_scaling` and the new `rope_parameters` spelling.
expected<model_config> parse_model_config(std::string_view text, const std::string& file);

/// Adds the defaults of a generation_config.json: temperature, top_p and end-of-text ids.
expected<void> apply_generation_config(std::string_view text, const std::string& file,
                                       model_config& config);

} // namespace troupe::model
