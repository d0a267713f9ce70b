#include "troupe/model/trunk_weights.hpp"

#include "troupe/model/tensor_reader.hpp"

#include <string>
#include <utility>

#include <fmt/format.h>

namespace troupe::model {

namespace {

void read_layer(tensor_reader& in, const model_config& config, std::int32_t index,
                layer_weights& out) {
  const auto hidden = config.hidden_size;
  const auto layer = fmt::format("model.layers.{}.", index);
  in.read(out.input_norm, layer + "input_layernorm.weight", hidden);
  in.read(out.post_attention_norm, layer + "post_attention_layernorm.weight", hidden);
  if (!config.is_moe_layer(index)) {
    in.read(out.mlp, layer + "mlp.", hidden, config.intermediate_size);
    return;
  }
  auto& moe = out.moe.emplace();
  in.read(moe.gate, layer + "mlp.gate.weight", config.num_experts, hidden,
          kernels::weight_use::stored);
  if (config.router == router_kind::noaux_tc)
    in.read(moe.bias, layer + "mlp.gate.e_score_correction_bias", config.num_experts);
  if (config.num_shared_experts > 0)
    in.read(moe.shared, layer + "mlp.shared_experts.", hidden, config.shared_intermediate_size());
}

void read_mtp(tensor_reader& in, const model_config& config, mtp_weights& out) {
  const auto hidden = config.hidden_size;
  const auto layer = fmt::format("model.layers.{}.", config.num_layers);
  in.read(out.embedding_norm, layer + "enorm.weight", hidden);
  in.read(out.hidden_norm, layer + "hnorm.weight", hidden);
  in.read(out.projection, layer + "eh_proj.weight", hidden, 2 * hidden);
  in.read(out.head_norm, layer + "shared_head.norm.weight", hidden);
}

} // namespace

expected<trunk_weights> load_trunk(weight_store& store, const model_config& config,
                                   std::int32_t first_layer, std::int32_t end_layer,
                                   bool with_mtp) {
  constexpr auto embedding_name = "model.embed_tokens.weight";
  trunk_weights result;
  tensor_reader in(store);
  if (first_layer == 0 || with_mtp)
    in.read(result.embedding, embedding_name, config.vocab_size, config.hidden_size,
            kernels::weight_use::stored);
  result.layers.resize(end_layer - first_layer);
  for (auto layer = first_layer; layer < end_layer; ++layer)
    read_layer(in, config, layer, result.layers[layer - first_layer]);
  if (with_mtp) {
    read_layer(in, config, config.num_layers, result.layers.emplace_back());
    read_mtp(in, config, result.mtp.emplace());
  }
  if (end_layer == config.num_layers && config.part.rank == 0) {
    in.read(result.final_norm, "model.norm.weight", config.hidden_size);
    in.read(result.head, config.tie_word_embeddings ? embedding_name : "lm_head.weight",
            config.vocab_size, config.hidden_size, head_use(config));
  }
  if (auto ok = in.finish(); !ok)
    return tl::unexpected(std::move(ok.error()));
  return result;
}

} // namespace troupe::model
