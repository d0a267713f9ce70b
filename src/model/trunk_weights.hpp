#pragma once

#include "troupe/base/error.hpp"
#include "troupe/kernels/ops.hpp"
#include "troupe/model/model_config.hpp"
#include "troupe/model/weights.hpp"

#include <cstdint>
#include <optional>
#include <vector>

namespace troupe::model {

/// The router and the shared experts of one MoE layer.
struct moe_weights {
  kernels::weight_matrix gate;                   ///< [experts, hidden]
  const float* bias = nullptr;                   ///< [experts]; null where the router has none
  std::optional<kernels::expert_weights> shared; ///< as one MLP
};

/// One layer but its attention (see attention.hpp).
struct layer_weights {
  const float* input_norm = nullptr;          ///< [hidden]
  const float* post_attention_norm = nullptr; ///< [hidden]
  std::optional<kernels::expert_weights> mlp; ///< of a dense layer
  std::optional<moe_weights> moe;             ///< of a MoE layer
};

/// What joins the MTP layer to the model (DeepSeek-V3 technical report, section 2.2). Its
/// embedding and its head are the model's own.
struct mtp_weights {
  const float* embedding_norm = nullptr; ///< [hidden]
  const float* hidden_norm = nullptr;    ///< [hidden]
  kernels::weight_matrix projection;     ///< [hidden, 2 * hidden]: of the embedding, of the hidden
  const float* head_norm = nullptr;      ///< [hidden]
};

/// All weights of a run of layers but the attention and the routed experts.
struct trunk_weights {
  std::vector<layer_weights> layers; ///< the MTP layer behind the others
  std::optional<mtp_weights> mtp;
  std::optional<kernels::weight_matrix> embedding; ///< [vocab, hidden], with layer 0 or MTP
  const float* final_norm = nullptr;               ///< [hidden], with the last layer, of rank 0
  std::optional<kernels::weight_matrix> head;      ///< [vocab, hidden], likewise
};

/// Loads layers [first_layer, end_layer), and the first MTP layer if wanted. The store keeps what
/// the result points to. Errors: invalid_model naming file and tensor; io_failed.
expected<trunk_weights> load_trunk(weight_store& store, const model_config& config,
                                   std::int32_t first_layer, std::int32_t end_layer,
                                   bool with_mtp = false);

} // namespace troupe::model
