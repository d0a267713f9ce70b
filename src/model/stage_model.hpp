#pragma once

#include "troupe/base/error.hpp"
#include "troupe/kernels/ops.hpp"
#include "troupe/model/attention.hpp"
#include "troupe/model/expert_exchange.hpp"
#include "troupe/model/model_config.hpp"
#include "troupe/model/rows.hpp"
#include "troupe/model/trunk_weights.hpp"
#include "troupe/model/tensor_source.hpp"
#include "troupe/model/weights.hpp"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

namespace troupe::model {

/// Which layers a stage has and how much it computes at once.
struct stage_options {
  std::int32_t first_layer = 0;   ///< with 0, the stage embeds tokens
  std::int32_t end_layer = 0;     ///< with the model's number of layers, the stage samples
  std::int32_t max_rows = 2048;   ///< rows of the largest micro-batch
  bool with_local_experts = true; ///< false: every forward pass is given an exchange
  bool checks_finite = true;      ///< false, for measuring: values may be anything
  std::int32_t max_drafts = 0;    ///< last stage: tokens drafted at once; 0: no MTP layer is loaded
};

/// A micro-batch as one stage sees it. Arrays live as long as the call and are left as they are.
struct stage_input {
  std::span<const std::int32_t> tokens; ///< [rows], first stage only
  const void* hidden = nullptr; ///< other stages: dense host memory [rows, hidden], activation type
  /// In place of `hidden`, where rows lie on a device: brings them to the device memory given, and
  /// sees to it that they are finite. What it fails with, `forward` fails with, and nothing has
  /// been computed.
  const std::function<expected<void>(const kernels::rows_view&)>* fetch = nullptr;
  kernels::batch_view batch;
  expert_exchange* experts = nullptr; ///< null: the stage's own
  /// For drills: may change what was computed, before it is checked. Null: nothing does.
  const std::function<void(const kernels::rows_view&)>* spoil = nullptr;
};

/// A sequence whose next tokens are to be drafted.
struct draft_chain {
  std::int32_t row = 0;        ///< of the draft_input: the last of its sequence
  std::int32_t num_drafts = 0; ///< at most stage_options::max_drafts
  /// How a draft is drawn from what the MTP layer expects: as the model's own token will be, with
  /// the same random number, so that they agree as often as they can. `position` is that of the
  /// first draft.
  kernels::sampling_params draw;
};

/// Rows of the last forward pass that stand, as the MTP layer sees them. It computes every row of
/// every sequence once, since its own keys and values must be there for the rows behind.
struct draft_input {
  std::span<const std::int32_t> rows;   ///< of the forward pass, ascending
  std::span<const std::int32_t> tokens; ///< [rows] the token behind each
  kernels::batch_view batch;            ///< of these rows
  std::span<const draft_chain> chains;
  expert_exchange* experts = nullptr; ///< null: the stage's own
};

/// A run of layers of any model of the family: DeepSeek-V3 and R1 (technical report, arXiv
/// 2412.19437, section 2; inference/model.py of its release), DeepSeek-V2 (arXiv 2405.04434), Llama
/// and Qwen2.
///
///   h = h + attention(rms_norm(h)); h = h + mlp(rms_norm(h))
///
/// What differs between them is in two places: the kind of attention (attention.hpp) and the
/// router (kernels::router_params, chosen by model_config::router). Layers for which
/// model_config::is_moe_layer holds are mixtures of experts: scores, selection within the
/// best groups, a weighted sum in ascending order of experts, plus the shared experts. All
/// other layers have one MLP.
///
/// The last stage may also have the first MTP layer, which drafts tokens (section 2.2 of the
/// report): from the hidden state h of a row, behind the final norm, and the token t behind it,
///
///   x = layer(projection(concat(rms_norm(embedding[t]), rms_norm(h))))
///   draft of the token behind t: head(rms_norm(x))
///
/// and further drafts from x in place of h and the draft in place of t, as EAGLE does (arXiv
/// 2401.15077). It keeps its keys and values in pages like any other layer.
///
/// With a rank's config (tensor_shard.hpp) it computes that rank's part, and the device adds the
/// parts up where they are parts of a sum (kernels::ops::all_reduce): see stage_group.hpp.
///
/// Used by one thread at a time. Computing a micro-batch again writes the same bits.
class stage_model {
public:
  /// Maps and checks the weights of the layers (large ones are used where they are mapped),
  /// and allocates all scratch memory. `ops` must outlive the stage.
  /// Errors: invalid_config for impossible layers, invalid_model naming file and tensor, io_failed.
  static expected<std::unique_ptr<stage_model>> load(std::shared_ptr<tensor_source> source,
                                                     const model_config& config,
                                                     const stage_options& options,
                                                     kernels::ops& ops);

  bool is_first() const { return options_.first_layer == 0; }
  bool is_last() const { return options_.end_layer == config_.num_layers; }
  const model_config& config() const { return config_; }
  const stage_options& options() const { return options_; }

  /// Layers that keep keys and values: the stage's own and, where it drafts, the MTP layer.
  std::int32_t num_kv_layers() const { return static_cast<std::int32_t>(weights_.layers.size()); }

  /// Bytes of KV memory for these layers.
  std::size_t kv_bytes(std::int32_t num_pages, std::int32_t page_tokens) const;

  /// Gives the KV memory: one block of kv_bytes, [layers, num_pages, page_tokens,
  /// kv_dim] in activation type, on the device. It stays the caller's and may hold KV of an
  /// earlier life of this stage.
  void attach_kv(void* data, std::int32_t num_pages, std::int32_t page_tokens);

  /// Before there is KV memory: computes micro-batches of the largest size and of small ones, of
  /// nothing that anybody has asked for, in pages of its own. So a device takes whatever memory it
  /// will need, and says at once if there is too little. `num_pages` is the longest block table.
  /// Errors: resource_exhausted; internal with the failure of the device.
  expected<void> rehearse(std::int32_t num_pages, std::int32_t page_tokens);

  /// Makes the device ready to compute steps of so many rows, where it repeats steps and computes
  /// all of them alone; nothing is computed, and KV memory is left as it is. After `rehearse`, with
  /// KV memory. Errors: internal with the failure of the device.
  expected<void> record_step(std::int32_t num_rows);
  /// Most rows of a step that a device repeats.
  static constexpr std::int32_t max_recorded_rows = 64;

  /// Computes the layers. The result [rows, hidden] is on the device and valid until the next
  /// call. Errors: invalid_request for tokens, positions or pages out of range; internal for
  /// no or too many rows and for values that are not finite; whatever the exchange returns.
  /// After an error the same micro-batch may be computed again.
  expected<kernels::rows_view> forward(const stage_input& input);

  /// Largest number of rows that `logits` takes at once.
  std::int32_t max_logit_rows() const;

  /// Last stage with max_drafts, after a forward pass and before the next: the MTP layer for all
  /// rows given, and drafts for the chains: out [chains, max_drafts], -1 behind the last one of a
  /// chain. A chain ends early where its block table does. What is drafted decides only how
  /// much the next step can verify. Errors: as `forward`.
  expected<void> draft(const draft_input& input, std::span<std::int32_t> out);

  /// Last stage: logits [rows.size(), vocab], float32, of rows of the last forward pass, valid
  /// until the next call. Errors: internal for other rows or another stage.
  expected<kernels::rows_view> logits(std::span<const std::int32_t> rows);

  /// Last stage: draws or scores one token for each of any number of rows of the last forward pass.
  /// Errors: as `logits`; invalid_request for a target outside the vocabulary.
  expected<void> sample(std::span<const std::int32_t> rows,
                        std::span<const kernels::sampling_params> params,
                        std::span<kernels::sampled_token> out);

private:
  stage_model(std::shared_ptr<tensor_source> source, const model_config& config,
              const stage_options& options, kernels::ops& ops);

  void allocate_scratch();
  expected<void> rehearse_step(std::int32_t num_rows, std::int32_t table_size);
  expected<void> check_input(const stage_input& input) const;
  expected<void> check_batch(const kernels::batch_view& batch) const;
  expected<void> check_drafts(const draft_input& input, std::span<const std::int32_t> out) const;
  kv_pages pages_of(std::int32_t local_layer) const;
  expected<void> compute_step(std::uint64_t what, std::span<const std::int32_t> tokens,
                              const kernels::batch_view& batch, expert_exchange* experts,
                              const std::function<expected<void>()>& compute);
  expected<void> compute_layers(const stage_input& input, const kernels::rows_view& hidden);
  expected<void> compute_layer(std::int32_t local_layer, const kernels::rows_view& hidden,
                               const kernels::batch_view& batch, expert_exchange* experts);
  expected<void> compute_mtp(std::int32_t num_rows, std::span<const std::int32_t> tokens,
                             const kernels::batch_view& batch, expert_exchange* experts);
  void draw_drafts(const draft_input& input, std::int32_t depth, std::span<std::int32_t> out);
  void norm_rows(const kernels::rows_view& x, std::span<const std::int32_t> rows,
                 const float* weight, const kernels::rows_view& out);
  void compute_mlp(const kernels::expert_weights& w, const kernels::rows_view& x,
                   const kernels::rows_view& out);
  expected<void> add_experts(std::int32_t layer, const moe_weights& w, expert_exchange* exchange,
                             const kernels::rows_view& hidden);
  expected<void> mix_experts(std::int32_t layer, const moe_weights& w, expert_exchange* exchange,
                             const kernels::rows_view& out);
  bool mix_on_device(std::int32_t layer, const moe_weights& w, const kernels::rows_view& out);

  model_config config_;
  stage_options options_;
  kernels::ops& ops_;
  kernels::element_type type_;
  weight_store store_;
  trunk_weights weights_;
  std::unique_ptr<attention> attention_;
  std::unique_ptr<local_experts> own_experts_;
  kernels::router_params router_;

  std::uint64_t step_id_ = 0; ///< kernels::step_key::what of the layers; the next: the MTP layer's
  std::byte* kv_ = nullptr;
  std::int32_t num_pages_ = 0;
  std::int32_t page_tokens_ = 0;

  // Scratch, [max_rows, ...] unless noted.
  row_buffer hidden_;                        // [hidden]
  row_buffer normed_;                        // [hidden]
  row_buffer delta_;                         // [hidden]
  row_buffer mixed_;                         // [hidden], of one rank of several
  row_buffer gate_;                          // [widest MLP]
  row_buffer up_;                            // [widest MLP]
  row_buffer expert_out_;                    // [max_rows * top_k, hidden]
  row_buffer logits_;                        // [max_logit_rows, vocab], float32
  row_buffer mtp_hidden_;                    // [hidden]
  row_buffer mtp_input_;                     // [2 * hidden]: embedding, hidden
  std::vector<std::int32_t> routed_experts_; // [max_rows * top_k]
  std::vector<float> routed_weights_;        // [max_rows * top_k]
  std::vector<std::int32_t> expert_rows_;    // [max_rows * top_k]
  std::int32_t num_rows_ = 0;                ///< of the last forward pass that succeeded

  /// The chains that still draft: rows of mtp_hidden_, and what the next one begins with.
  struct draft_scratch {
    std::vector<std::int32_t> chains, rows, tokens, positions, sequences;
    std::vector<kernels::sampling_params> params;
    std::vector<kernels::sampled_token> drawn;
  };
  draft_scratch drafting_;
};

} // namespace troupe::model
