#include "troupe/model/stage_model.hpp"

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include <fmt/format.h>

namespace troupe::model {

namespace {

/// An exchange behind which nobody computes.
class no_experts final : public expert_exchange {
public:
  expected<void> begin(std::int32_t, const kernels::rows_view&, std::span<const std::int32_t>,
                       std::int32_t) override {
    return {};
  }

  expected<void> finish(const kernels::rows_view&, std::span<std::int32_t> expert_rows) override {
    std::iota(expert_rows.begin(), expert_rows.end(), 0);
    return {};
  }
};

/// A micro-batch of as many rows as one likes, all of one sequence, whose pages are all the same.
struct rehearsed_batch {
  rehearsed_batch(std::int32_t num_rows, std::int32_t vocab_size, std::int32_t page_tokens,
                  std::int32_t table_size)
    : tokens(num_rows), positions(num_rows), sequences(num_rows, 0), table(table_size, 0) {
    for (std::int32_t i = 0; i < num_rows; ++i) {
      tokens[i] = static_cast<std::int32_t>(std::int64_t{i} * 977 % vocab_size);
      positions[i] = i % page_tokens;
    }
  }

  kernels::batch_view view() const { return {positions, sequences, table, offsets}; }

  std::vector<std::int32_t> tokens, positions, sequences, table;
  std::vector<std::int32_t> offsets{0};
};

} // namespace

expected<void> stage_model::rehearse(std::int32_t num_pages, std::int32_t page_tokens) {
  const auto pages = ops_.allocate(kv_bytes(1, page_tokens));
  if (pages == nullptr)
    return fail(error_code::resource_exhausted, "there is no memory for a single page of KV");
  ops_.rehearse(true);
  attach_kv(pages.get(), 1, page_tokens);
  expected<void> result;
  for (const auto num_rows : {options_.max_rows, std::min(options_.max_rows, max_recorded_rows), 1})
    if (result)
      result = rehearse_step(num_rows, num_pages);
  attach_kv(nullptr, 0, 0);
  num_rows_ = 0;
  ops_.rehearse(false);
  if (result && !ops_.failure().empty())
    return fail(error_code::internal, ops_.failure());
  return result;
}

expected<void> stage_model::record_step(std::int32_t num_rows) {
  if (kv_ == nullptr || num_rows > options_.max_rows || !options_.with_local_experts)
    return {};
  for (auto layer = options_.first_layer; own_experts_ && layer < options_.end_layer; ++layer)
    if (config_.is_moe_layer(layer))
      ops_.know_experts(own_experts_->experts_of(layer));
  if (!ops_.record_only(true))
    return {};
  const rehearsed_batch batch(num_rows, config_.vocab_size, page_tokens_, 1);
  stage_input input;
  input.tokens = batch.tokens;
  input.batch = batch.view();
  const auto view = hidden_.view(num_rows);
  const auto compute = [&] { return compute_layers(input, view); };
  auto result = compute_step(step_id_, input.tokens, input.batch, nullptr, std::ref(compute));
  ops_.record_only(false);
  if (result && !ops_.failure().empty())
    return fail(error_code::internal, ops_.failure());
  return result;
}

/// One micro-batch and what may follow it. What comes of it is of no use, and may be anything.
expected<void> stage_model::rehearse_step(std::int32_t num_rows, std::int32_t table_size) {
  const rehearsed_batch batch(num_rows, config_.vocab_size, page_tokens_, table_size);
  const std::vector<std::byte> hidden(is_first()
                                        ? 0
                                        : static_cast<std::size_t>(num_rows) * config_.hidden_size
                                            * kernels::size_of(type_));
  no_experts nobody;
  stage_input input;
  input.tokens = batch.tokens;
  input.hidden = hidden.data();
  input.batch = batch.view();
  input.experts = own_experts_ == nullptr ? &nobody : nullptr;
  if (auto ok = check_input(input); !ok)
    return ok;
  const auto view = hidden_.view(num_rows);
  if (!is_first())
    ops_.copy_from_host(input.hidden, view);
  // One layer of each kind: what they take is the same for all.
  const auto compute = [&]() -> expected<void> {
    if (is_first())
      ops_.embed(*weights_.embedding, input.tokens, view);
    bool is_known[2] = {false, false};
    for (auto layer = options_.first_layer; layer < options_.end_layer; ++layer)
      if (!std::exchange(is_known[config_.is_moe_layer(layer) ? 1 : 0], true))
        if (auto ok = compute_layer(layer - options_.first_layer, view, input.batch, input.experts);
            !ok)
          return ok;
    return {};
  };
  if (auto ok = compute_step(step_id_, input.tokens, input.batch, input.experts, std::ref(compute));
      !ok)
    return ok;
  ops_.all_finite(view);
  num_rows_ = num_rows;
  if (!weights_.head)
    return {};

  const std::int32_t banned[] = {0};
  kernels::sampling_params param;
  param.temperature = 1.0F;
  param.banned = banned;
  const auto num_samples = std::min(num_rows, max_logit_rows());
  std::vector<std::int32_t> rows(num_samples);
  std::iota(rows.begin(), rows.end(), 0);
  std::vector<kernels::sampled_token> drawn(num_samples);
  if (auto ok = sample(rows, std::vector(num_samples, param), drawn); !ok)
    return ok;
  if (!weights_.mtp)
    return {};
  rows.resize(num_rows);
  std::iota(rows.begin(), rows.end(), 0);
  const std::vector<draft_chain> chains(1, draft_chain{0, options_.max_drafts, param});
  std::vector<std::int32_t> drafts(options_.max_drafts);
  draft_input to_draft;
  to_draft.rows = rows;
  to_draft.tokens = batch.tokens;
  to_draft.batch = batch.view();
  to_draft.chains = chains;
  to_draft.experts = input.experts;
  return draft(to_draft, drafts);
}

} // namespace troupe::model
