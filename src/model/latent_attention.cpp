#include "troupe/model/latent_attention.hpp"

#include "troupe/model/tensor_reader.hpp"

#include <algorithm>
#include <utility>

#include <fmt/format.h>

namespace troupe::model {

namespace {

using kernels::rows_view;

/// Latent queries are wide (heads * kv_lora), so so many rows are taken at a time.
constexpr std::int32_t kRowsAtOnce = 256;

kernels::batch_view slice_batch(const kernels::batch_view& batch, std::int32_t first,
                                std::int32_t count) {
  auto result = batch;
  result.positions = batch.positions.subspan(first, count);
  result.sequences = batch.sequences.subspan(first, count);
  return result;
}

/// kv_b taken apart: per head nope rows of keys, then v rows of values, each of kv_lora.
struct split_kv_b {
  std::vector<float> keys;   ///< [heads, kv_lora, nope]
  std::vector<float> values; ///< [heads, v, kv_lora]
};

split_kv_b split(const std::vector<float>& kv_b, const model_config& config) {
  const auto nope = config.qk_nope_head_dim;
  const auto latent = config.kv_lora_rank;
  const auto key_size = static_cast<std::size_t>(nope) * latent;
  const auto value_size = static_cast<std::size_t>(config.v_head_dim) * latent;
  split_kv_b result;
  result.keys.resize(config.num_heads * key_size);
  result.values.resize(config.num_heads * value_size);
  for (std::int32_t head = 0; head < config.num_heads; ++head) {
    const auto* from = kv_b.data() + head * (key_size + value_size);
    auto* key = result.keys.data() + head * key_size;
    for (std::int32_t row = 0; row < nope; ++row)
      for (std::int32_t col = 0; col < latent; ++col)
        key[static_cast<std::size_t>(col) * nope + row] = *from++;
    std::copy(from, from + value_size, result.values.data() + head * value_size);
  }
  return result;
}

} // namespace

latent_attention::latent_attention(const model_config& config, std::int32_t max_rows,
                                   kernels::ops& ops)
  : config_(config), ops_(ops), type_(ops.activation_type()), rope_(make_rope_constants(config)) {
  const auto& c = config_;
  const auto block = std::min(max_rows, kRowsAtOnce);
  if (c.q_lora_rank > 0)
    q_a_ = row_buffer(ops, type_, max_rows, c.q_lora_rank);
  q_ = row_buffer(ops, type_, max_rows, c.num_heads * c.qk_head_dim());
  kv_a_ = row_buffer(ops, type_, max_rows, c.kv_dim());
  q_latent_ = row_buffer(ops, type_, block, c.num_heads * c.kv_lora_rank);
  o_latent_ = row_buffer(ops, type_, block, c.num_heads * c.kv_lora_rank);
  attended_ = row_buffer(ops, type_, max_rows, c.num_heads * c.v_head_dim);
}

expected<std::unique_ptr<attention>>
latent_attention::load(weight_store& store, const model_config& config, std::int32_t first_layer,
                       std::int32_t end_layer, std::int32_t max_rows, kernels::ops& ops) {
  std::unique_ptr<latent_attention> result(new latent_attention(config, max_rows, ops));
  for (auto layer = first_layer; layer < end_layer; ++layer)
    if (auto ok = result->read_layer(store, layer); !ok)
      return tl::unexpected(std::move(ok.error()));
  result->inv_freq_ = store.keep(result->rope_.inv_freq);
  return result;
}

expected<void> latent_attention::read_layer(weight_store& store, std::int32_t index) {
  const auto& c = config_;
  const auto hidden = c.hidden_size;
  const auto query = c.num_heads * c.qk_head_dim();
  const auto prefix = fmt::format("model.layers.{}.self_attn.", index);
  tensor_reader in(store);
  auto& out = layers_.emplace_back();
  if (c.q_lora_rank > 0) {
    in.read(out.q_a, prefix + "q_a_proj.weight", c.q_lora_rank, hidden);
    in.read(out.q_a_norm, prefix + "q_a_layernorm.weight", c.q_lora_rank);
    in.read(out.q_b, prefix + "q_b_proj.weight", query, c.q_lora_rank);
  } else {
    in.read(out.q_b, prefix + "q_proj.weight", query, hidden);
  }
  in.read(out.kv_a, prefix + "kv_a_proj_with_mqa.weight", c.kv_dim(), hidden);
  in.read(out.kv_a_norm, prefix + "kv_a_layernorm.weight", c.kv_lora_rank);
  if (store.are_there()) { // what is made of kv_b too
    out.w_uk =
      store.keep_shape(c.num_heads * c.kv_lora_rank, c.qk_nope_head_dim, wide_product_use(c));
    out.w_uv = store.keep_shape(c.num_heads * c.v_head_dim, c.kv_lora_rank, wide_product_use(c));
  } else {
    const auto kv_b = in.values(prefix + "kv_b_proj.weight",
                                c.num_heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank);
    if (in.ok()) {
      auto parts = split(kv_b, c);
      out.w_uk = in.keep(std::move(parts.keys), c.qk_nope_head_dim, wide_product_use(c));
      out.w_uv = in.keep(std::move(parts.values), c.kv_lora_rank, wide_product_use(c));
    }
  }
  in.read(out.o, prefix + "o_proj.weight", hidden, c.num_heads * c.v_head_dim);
  if (c.o_bias) {
    if (c.q_lora_rank > 0)
      in.read(out.q_a_bias, prefix + "q_a_proj.bias", c.q_lora_rank);
    in.read(out.kv_a_bias, prefix + "kv_a_proj_with_mqa.bias", c.kv_dim());
    in.read(out.o_bias, prefix + "o_proj.bias", hidden);
  }
  return in.finish();
}

void latent_attention::rotate(const rows_view& x, std::int32_t num_heads, std::int32_t head_stride,
                              std::int32_t offset, std::span<const std::int32_t> positions) {
  const auto width = config_.qk_rope_head_dim;
  if (config_.rope_interleaved)
    ops_.rope(x, num_heads, head_stride, offset, width, positions, inv_freq_, rope_.magnitude);
  else
    ops_.rope_halves(x, num_heads, head_stride, offset, width, positions, inv_freq_,
                     rope_.magnitude);
}

void latent_attention::project_input(const layer_weights& w, const rows_view& x,
                                     const rows_view& q) {
  const bool ranked = config_.q_lora_rank > 0;
  const kernels::linear_part parts[] = {{w.kv_a, kv_a_.view(x.num_rows)},
                                        ranked ? kernels::linear_part{w.q_a, q_a_.view(x.num_rows)}
                                               : kernels::linear_part{w.q_b, q}};
  ops_.linears(x, parts);
}

void latent_attention::store_kv(const layer_weights& w, const rows_view& kv_a,
                                const kernels::batch_view& batch,
                                const kernels::kv_layer_view& kv) {
  if (w.kv_a_bias != nullptr)
    ops_.add_bias(kv_a, w.kv_a_bias);
  const auto latent = slice_cols(kv_a, type_, 0, kv.latent_dim);
  const auto rope_key = slice_cols(kv_a, type_, kv.latent_dim, kv.rope_dim);
  ops_.rms_norm(latent, w.kv_a_norm, config_.rms_norm_eps, latent);
  rotate(rope_key, 1, kv.rope_dim, 0, batch.positions);
  ops_.append_kv(latent, rope_key, batch, kv);
}

void latent_attention::expand_q(const layer_weights& w, const rows_view& q) {
  if (config_.q_lora_rank == 0)
    return;
  const auto q_a = q_a_.view(q.num_rows);
  if (w.q_a_bias != nullptr)
    ops_.add_bias(q_a, w.q_a_bias);
  ops_.rms_norm(q_a, w.q_a_norm, config_.rms_norm_eps, q_a);
  ops_.linear(q_a, w.q_b, q);
}

void latent_attention::compute(std::int32_t layer, const rows_view& x,
                               const kernels::batch_view& batch, const kv_pages& pages,
                               const rows_view& out) {
  const auto& w = layers_[layer];
  const auto num_rows = x.num_rows;
  const auto heads = config_.num_heads;
  const auto nope = config_.qk_nope_head_dim;
  const auto head_dim = config_.qk_head_dim();
  const auto latent = config_.kv_lora_rank;
  const auto v = config_.v_head_dim;
  const kernels::kv_layer_view kv{pages.data, pages.num_pages, pages.page_tokens, latent,
                                  config_.qk_rope_head_dim};
  const auto q = q_.view(num_rows);
  project_input(w, x, q);
  // All keys first: a row attends to rows of its own micro-batch.
  store_kv(w, kv_a_.view(num_rows), batch, kv);
  expand_q(w, q);
  rotate(q, heads, head_dim, nope, batch.positions);
  const auto attended = attended_.view(num_rows);
  for (std::int32_t first = 0; first < num_rows; first += kRowsAtOnce) {
    const auto count = std::min(kRowsAtOnce, num_rows - first);
    const auto q_block = slice_rows(q, type_, first, count);
    const auto q_latent = q_latent_.view(count);
    const auto o_latent = o_latent_.view(count);
    ops_.linear_per_head(q_block, head_dim, w.w_uk, heads, q_latent, latent);
    const auto q_rope = slice_cols(q_block, type_, nope, q_block.num_cols - nope);
    ops_.latent_attention(q_latent, q_rope, head_dim, heads, rope_.softmax_scale,
                          slice_batch(batch, first, count), kv, o_latent);
    ops_.linear_per_head(o_latent, latent, w.w_uv, heads, slice_rows(attended, type_, first, count),
                         v);
  }
  ops_.linear(attended, w.o, out);
  if (w.o_bias != nullptr)
    ops_.add_bias(out, w.o_bias);
}

} // namespace troupe::model
