#include "troupe/model/weights.hpp"

#include "troupe/model/tensor_shard.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <utility>

#include <fmt/format.h>

namespace troupe::model {

namespace {

void list_latent_attention(const model_config& config, const std::string& prefix,
                           std::vector<tensor_spec>& out) {
  const auto heads = config.num_heads;
  const auto query = heads * config.qk_head_dim();
  if (config.q_lora_rank > 0) {
    out.push_back({prefix + "q_a_proj.weight", config.q_lora_rank, config.hidden_size});
    out.push_back({prefix + "q_a_layernorm.weight", 0, config.q_lora_rank});
    out.push_back({prefix + "q_b_proj.weight", query, config.q_lora_rank});
  } else {
    out.push_back({prefix + "q_proj.weight", query, config.hidden_size});
  }
  out.push_back({prefix + "kv_a_proj_with_mqa.weight", config.kv_dim(), config.hidden_size});
  out.push_back({prefix + "kv_a_layernorm.weight", 0, config.kv_lora_rank});
  out.push_back({prefix + "kv_b_proj.weight", heads * (config.qk_nope_head_dim + config.v_head_dim),
                 config.kv_lora_rank});
  out.push_back({prefix + "o_proj.weight", config.hidden_size, heads * config.v_head_dim});
  if (config.o_bias) {
    if (config.q_lora_rank > 0)
      out.push_back({prefix + "q_a_proj.bias", 0, config.q_lora_rank});
    out.push_back({prefix + "kv_a_proj_with_mqa.bias", 0, config.kv_dim()});
    out.push_back({prefix + "o_proj.bias", 0, config.hidden_size});
  }
}

void list_grouped_attention(const model_config& config, const std::string& prefix,
                            std::vector<tensor_spec>& out) {
  const auto hidden = config.hidden_size;
  const auto query = config.num_heads * config.head_dim;
  const auto key = config.num_kv_heads * config.head_dim;
  const auto add = [&](const char* name, std::int32_t num_rows, std::int32_t num_cols, bool bias) {
    out.push_back({fmt::format("{}{}.weight", prefix, name), num_rows, num_cols});
    if (bias)
      out.push_back({fmt::format("{}{}.bias", prefix, name), 0, num_rows});
  };
  add("q_proj", query, hidden, config.qkv_bias);
  add("k_proj", key, hidden, config.qkv_bias);
  add("v_proj", key, hidden, config.qkv_bias);
  add("o_proj", hidden, query, config.o_bias);
}

void list_mlp(const std::string& prefix, std::int32_t hidden, std::int32_t intermediate,
              std::vector<tensor_spec>& out) {
  out.push_back({prefix + "gate_proj.weight", intermediate, hidden});
  out.push_back({prefix + "up_proj.weight", intermediate, hidden});
  out.push_back({prefix + "down_proj.weight", hidden, intermediate});
}

void list_layer(const model_config& config, const model_part& part, std::int32_t index,
                std::vector<tensor_spec>& out) {
  const auto hidden = config.hidden_size;
  const auto layer = fmt::format("model.layers.{}.", index);
  const bool is_moe = config.is_moe_layer(index);
  if (part.trunk) {
    out.push_back({layer + "input_layernorm.weight", 0, hidden});
    if (config.attention == attention_kind::latent)
      list_latent_attention(config, layer + "self_attn.", out);
    else
      list_grouped_attention(config, layer + "self_attn.", out);
    out.push_back({layer + "post_attention_layernorm.weight", 0, hidden});
    if (!is_moe)
      list_mlp(layer + "mlp.", hidden, config.intermediate_size, out);
    else {
      out.push_back({layer + "mlp.gate.weight", config.num_experts, hidden});
      if (config.router == router_kind::noaux_tc)
        out.push_back({layer + "mlp.gate.e_score_correction_bias", 0, config.num_experts});
      if (config.num_shared_experts > 0)
        list_mlp(layer + "mlp.shared_experts.", hidden, config.shared_intermediate_size(), out);
    }
  }
  if (is_moe)
    for (auto expert = part.first_expert; expert < part.end_expert; ++expert)
      list_mlp(fmt::format("{}mlp.experts.{}.", layer, expert), hidden,
               config.moe_intermediate_size, out);
}

/// True if bf16 holds every value.
bool fits_bf16(const std::vector<float>& values) {
  return std::all_of(values.begin(), values.end(), [](float value) {
    return (std::bit_cast<std::uint32_t>(value) & 0xFFFFU) == 0;
  });
}

} // namespace

model_part whole_model(const model_config& config, bool with_mtp) {
  return {0, config.num_layers, true, 0, config.num_experts, with_mtp && config.num_mtp_layers > 0};
}

std::vector<tensor_spec> list_tensors(const model_config& config, const model_part& part) {
  std::vector<tensor_spec> result;
  const bool is_last =
    part.trunk && part.end_layer == config.num_layers && part.first_layer < part.end_layer;
  const bool is_first = part.trunk && part.first_layer == 0 && part.end_layer > 0;
  if (is_first || (is_last && (config.tie_word_embeddings || part.mtp)))
    result.push_back({"model.embed_tokens.weight", config.vocab_size, config.hidden_size});
  for (auto layer = part.first_layer; layer < part.end_layer; ++layer)
    list_layer(config, part, layer, result);
  if (is_last) {
    result.push_back({"model.norm.weight", 0, config.hidden_size});
    if (!config.tie_word_embeddings)
      result.push_back({"lm_head.weight", config.vocab_size, config.hidden_size});
  }
  if (part.mtp)
    list_layer(config, part, config.num_layers, result);
  if (part.mtp && part.trunk) {
    const auto layer = fmt::format("model.layers.{}.", config.num_layers);
    result.push_back({layer + "enorm.weight", 0, config.hidden_size});
    result.push_back({layer + "hnorm.weight", 0, config.hidden_size});
    result.push_back({layer + "eh_proj.weight", config.hidden_size, 2 * config.hidden_size});
    result.push_back({layer + "shared_head.norm.weight", 0, config.hidden_size});
  }
  return result;
}

expected<part_size> check_weights(tensor_source& source, const model_config& config,
                                  const model_part& part) {
  part_size size;
  for (const auto& spec : list_tensors(config, part)) {
    if (spec.num_rows == 0) {
      auto view = find_tensor(source, spec.name, {spec.num_cols});
      if (!view)
        return tl::unexpected(std::move(view.error()));
      if (auto values = read_finite(source, spec.name, *view); !values)
        return tl::unexpected(std::move(values.error()));
      ++size.num_tensors;
      size.num_bytes += view->num_bytes;
      continue;
    }
    auto matrix =
      find_weight(source, config, spec.name, spec.num_rows, spec.num_cols, weight_loading::check);
    if (!matrix)
      return tl::unexpected(std::move(matrix.error()));
    size.num_tensors += matrix->num_tensors;
    size.num_bytes += matrix->num_bytes;
  }
  return size;
}

weight_store::weight_store(std::shared_ptr<tensor_source> source, const model_config& config,
                           kernels::ops& ops)
  : source_(std::move(source)), config_(config), ops_(ops) {}

/// This rank's part of a weight. Where the device has it already, elements are not brought
/// together.
expected<stored_weight> weight_store::find_part(const std::string& name, std::int32_t num_rows,
                                                std::int32_t num_cols, weight_loading how) {
  const auto [rank, num_ranks] = config_.part;
  const auto cut = num_ranks > 1 ? cut_of(name) : weight_cut::whole;
  const auto whole_rows = cut == weight_cut::rows ? num_rows * num_ranks : num_rows;
  const auto whole_cols = cut == weight_cut::cols ? num_cols * num_ranks : num_cols;
  auto stored = find_weight(*source_, config_, name, whole_rows, whole_cols, how);
  if (!stored || cut == weight_cut::whole)
    return stored;
  if (cut == weight_cut::rows)
    return cut_rows(std::move(*stored), rank * num_rows, num_rows);
  return cut_cols(std::move(*stored), rank * num_cols, num_cols, !are_there());
}

expected<kernels::weight_matrix> weight_store::matrix(const std::string& name,
                                                      std::int32_t num_rows, std::int32_t num_cols,
                                                      kernels::weight_use use) {
  const bool wants_elements = ops_.reads_of_weights() == kernels::weight_reading::elements;
  auto stored = find_part(name, num_rows, num_cols,
                          wants_elements ? weight_loading::load : weight_loading::recipe);
  if (!stored)
    return tl::unexpected(std::move(stored.error()));
  // The format promises no alignment, although the usual writers keep it.
  const auto address = reinterpret_cast<std::uintptr_t>(stored->data);
  if (stored->data != nullptr && address % kernels::size_of(stored->type) != 0) {
    const auto num_bytes = num_rows * kernels::row_bytes(stored->type, num_cols);
    stored->repacked.assign(stored->data, stored->data + num_bytes);
    stored->data = nullptr;
  }
  kept_.push_back(std::move(*stored));
  const auto given = kept_.back().view();
  const auto placed = ops_.place(given, use);
  if (placed.data != given.data)
    kept_.pop_back(); // the device has a copy
  return placed;
}

expected<const float*> weight_store::vector(const std::string& name, std::int32_t size) {
  const auto [rank, num_ranks] = config_.part;
  const auto cut = num_ranks > 1 ? cut_of(name) : weight_cut::whole;
  const auto whole_size = cut == weight_cut::rows ? size * num_ranks : size;
  auto view = find_tensor(*source_, name, {whole_size});
  if (!view)
    return tl::unexpected(std::move(view.error()));
  auto values = read_finite(*source_, name, *view);
  if (!values)
    return tl::unexpected(std::move(values.error()));
  if (cut == weight_cut::rows)
    values->assign(values->begin() + std::ptrdiff_t{rank} * size,
                   values->begin() + std::ptrdiff_t{rank + 1} * size);
  // What is added to a sum over ranks is added by one of them.
  if (cut == weight_cut::cols && rank > 0)
    std::fill(values->begin(), values->end(), 0.0F);
  return keep(std::move(*values));
}

expected<std::vector<float>>
weight_store::dequantised(const std::string& name, std::int32_t num_rows, std::int32_t num_cols) {
  auto stored = find_part(name, num_rows, num_cols, weight_loading::load);
  if (!stored)
    return tl::unexpected(std::move(stored.error()));
  auto values = dequantise(stored->view());
  const auto bad = std::find_if_not(values.begin(), values.end(),
                                    [](float value) { return std::isfinite(value); });
  if (bad != values.end())
    return fail(error_code::invalid_model,
                fmt::format("{}: tensor \"{}\" has the value {} at element {}",
                            source_->file_of(name), name, *bad, bad - values.begin()),
                "the file is damaged: copy it again from its source");
  return values;
}

const float* weight_store::keep(std::vector<float> values) {
  floats_.push_back(std::move(values));
  kernels::weight_matrix as_row;
  as_row.data = floats_.back().data();
  as_row.num_rows = 1;
  as_row.num_cols = static_cast<std::int32_t>(floats_.back().size());
  const auto placed = ops_.place(as_row, kernels::weight_use::stored);
  if (placed.data != as_row.data)
    floats_.pop_back(); // the device has a copy
  return static_cast<const float*>(placed.data);
}

kernels::weight_matrix weight_store::keep(std::vector<float> values, std::int32_t num_cols,
                                          kernels::weight_use use) {
  kernels::weight_matrix result;
  result.num_rows = static_cast<std::int32_t>(values.size()) / num_cols;
  result.num_cols = num_cols;
  const bool is_short = fits_bf16(values);
  if (is_short) { // as what is made of a bf16 checkpoint: half the memory to read
    auto& kept = halves_.emplace_back(values.size());
    std::transform(values.begin(), values.end(), kept.begin(), [](float value) {
      return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16);
    });
    result.data = kept.data();
    result.type = kernels::element_type::bf16;
  } else {
    floats_.push_back(std::move(values));
    result.data = floats_.back().data();
  }
  const auto placed = ops_.place(result, use);
  if (placed.data != result.data) // the device has a copy
    is_short ? halves_.pop_back() : floats_.pop_back();
  return placed;
}

kernels::weight_matrix weight_store::keep_shape(std::int32_t num_rows, std::int32_t num_cols,
                                                kernels::weight_use use) {
  kernels::weight_matrix shape;
  shape.type = kernels::element_type::bf16;
  shape.num_rows = num_rows;
  shape.num_cols = num_cols;
  return ops_.place(shape, use);
}

kernels::weight_use wide_product_use(const model_config& config) {
  return config.int8 ? kernels::weight_use::narrow_product : kernels::weight_use::product;
}

kernels::weight_use head_use(const model_config& config) {
  return config.head == head_format::int8 ? kernels::weight_use::int8_product
                                          : wide_product_use(config);
}

expected<kernels::expert_weights> load_mlp(weight_store& store, const std::string& prefix,
                                           std::int32_t hidden_size,
                                           std::int32_t intermediate_size) {
  kernels::expert_weights result;
  auto gate = store.matrix(prefix + "gate_proj.weight", intermediate_size, hidden_size);
  if (!gate)
    return tl::unexpected(std::move(gate.error()));
  auto up = store.matrix(prefix + "up_proj.weight", intermediate_size, hidden_size);
  if (!up)
    return tl::unexpected(std::move(up.error()));
  auto down = store.matrix(prefix + "down_proj.weight", hidden_size, intermediate_size);
  if (!down)
    return tl::unexpected(std::move(down.error()));
  return kernels::expert_weights{*gate, *up, *down};
}

} // namespace troupe::model
