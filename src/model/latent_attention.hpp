#pragma once

#include "troupe/model/attention.hpp"
#include "troupe/model/rope.hpp"
#include "troupe/model/rows.hpp"

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace troupe::model {

/// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; inference/model.py of
/// DeepSeek-V3's release): one normalised latent and one rotated key a token serve all heads, and
/// that is what pages hold. Always computed in its absorbed form, in prefill as in decoding:
/// queries are taken into the latent space. So a row's arithmetic does not depend on how a
/// prompt was cut. Pairs are rotated as the checkpoint stores them, interleaved as a rule.
class latent_attention final : public attention {
public:
  static expected<std::unique_ptr<attention>> load(weight_store& store, const model_config& config,
                                                   std::int32_t first_layer, std::int32_t end_layer,
                                                   std::int32_t max_rows, kernels::ops& ops);

  kernels::element_type kv_type() const override { return ops_.kv_type(); }
  void compute(std::int32_t layer, const kernels::rows_view& x, const kernels::batch_view& batch,
               const kv_pages& pages, const kernels::rows_view& out) override;

private:
  /// One layer, prepared for the absorbed form.
  struct layer_weights {
    kernels::weight_matrix q_a;       ///< [q_lora, hidden]; unused where q_lora_rank is 0
    const float* q_a_norm = nullptr;  ///< [q_lora]
    kernels::weight_matrix q_b;       ///< [heads * (nope + rope), q_lora or hidden]
    kernels::weight_matrix kv_a;      ///< [kv_lora + rope, hidden]
    const float* kv_a_norm = nullptr; ///< [kv_lora]
    kernels::weight_matrix w_uk;      ///< [heads * kv_lora, nope]: kv_b's keys, transposed by head
    kernels::weight_matrix w_uv;      ///< [heads * v, kv_lora]: kv_b's values
    kernels::weight_matrix o;         ///< [hidden, heads * v]
    const float* q_a_bias = nullptr;  ///< [q_lora]; with kv_a_bias and o_bias, or null
    const float* kv_a_bias = nullptr; ///< [kv_lora + rope]
    const float* o_bias = nullptr;    ///< [hidden]
  };

  latent_attention(const model_config& config, std::int32_t max_rows, kernels::ops& ops);

  expected<void> read_layer(weight_store& store, std::int32_t index);
  void rotate(const kernels::rows_view& x, std::int32_t num_heads, std::int32_t head_stride,
              std::int32_t offset, std::span<const std::int32_t> positions);
  /// The products of x: kv_a, and q_a or where there is none q.
  void project_input(const layer_weights& w, const kernels::rows_view& x,
                     const kernels::rows_view& q);
  void store_kv(const layer_weights& w, const kernels::rows_view& kv_a,
                const kernels::batch_view& batch, const kernels::kv_layer_view& kv);
  void expand_q(const layer_weights& w, const kernels::rows_view& q);

  model_config config_;
  kernels::ops& ops_;
  kernels::element_type type_;
  rope_constants rope_;
  const float* inv_freq_ = nullptr;
  std::vector<layer_weights> layers_;

  // Scratch, [max_rows, ...] unless noted.
  row_buffer q_a_;      // [q_lora]
  row_buffer q_;        // [heads * (nope + rope)]
  row_buffer kv_a_;     // [kv_lora + rope]
  row_buffer q_latent_; // [rows at a time, heads * kv_lora]
  row_buffer o_latent_; // [rows at a time, heads * kv_lora]
  row_buffer attended_; // [heads * v]
};

} // namespace troupe::model
