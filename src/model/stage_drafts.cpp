#include "troupe/model/stage_model.hpp"

#include <algorithm>
#include <functional>

#include <fmt/format.h>

namespace troupe::model {

using kernels::rows_view;

expected<void> stage_model::check_drafts(const draft_input& input,
                                         std::span<const std::int32_t> out) const {
  const auto num_rows = input.rows.size();
  if (!weights_.mtp)
    return fail(error_code::internal, "drafts were asked of a stage without an MTP layer");
  if (num_rows > static_cast<std::size_t>(num_rows_) || input.tokens.size() != num_rows
      || input.batch.positions.size() != num_rows || input.batch.sequences.size() != num_rows
      || out.size() != input.chains.size() * options_.max_drafts)
    return fail(error_code::internal,
                fmt::format("drafts were asked for {} rows with {} tokens and {} chains", num_rows,
                            input.tokens.size(), input.chains.size()));
  for (std::size_t i = 0; i < num_rows; ++i)
    if (input.rows[i] < 0 || input.rows[i] >= num_rows_ || input.tokens[i] < 0
        || input.tokens[i] >= config_.vocab_size)
      return fail(error_code::invalid_request,
                  fmt::format("drafts behind row {} of {} and token id {} of {} were asked for",
                              input.rows[i], num_rows_, input.tokens[i], config_.vocab_size));
  for (const auto& chain : input.chains)
    if (chain.row < 0 || static_cast<std::size_t>(chain.row) >= num_rows || chain.num_drafts < 0
        || chain.num_drafts > options_.max_drafts)
      return fail(error_code::internal,
                  fmt::format("{} drafts behind row {} of {} were asked for, of at most {}",
                              chain.num_drafts, chain.row, num_rows, options_.max_drafts));
  return check_batch(input.batch);
}

expected<void> stage_model::draft(const draft_input& input, std::span<std::int32_t> out) {
  std::fill(out.begin(), out.end(), -1);
  if (auto ok = check_drafts(input, out); !ok)
    return ok;
  const auto num_rows = static_cast<std::int32_t>(input.rows.size());
  if (num_rows == 0)
    return {};
  const auto hidden =
    slice_cols(mtp_input_.view(num_rows), type_, config_.hidden_size, config_.hidden_size);
  norm_rows(hidden_.view(num_rows_), input.rows, weights_.final_norm, hidden);
  ops_.rms_norm(hidden, weights_.mtp->hidden_norm, config_.rms_norm_eps, hidden);
  if (auto ok = compute_mtp(num_rows, input.tokens, input.batch, input.experts); !ok)
    return ok;

  auto& d = drafting_;
  d.chains.clear();
  d.rows.clear();
  d.positions.clear();
  d.sequences.clear();
  for (std::size_t c = 0; c < input.chains.size(); ++c) {
    const auto row = input.chains[c].row;
    if (input.chains[c].num_drafts == 0)
      continue;
    d.chains.push_back(static_cast<std::int32_t>(c));
    d.rows.push_back(row);
    d.positions.push_back(input.batch.positions[row]);
    d.sequences.push_back(input.batch.sequences[row]);
  }
  for (std::int32_t depth = 0; !d.chains.empty(); ++depth) {
    draw_drafts(input, depth, out);
    if (d.chains.empty())
      break;
    const auto count = static_cast<std::int32_t>(d.chains.size());
    norm_rows(mtp_hidden_.view(num_rows), d.rows, weights_.mtp->hidden_norm,
              slice_cols(mtp_input_.view(count), type_, config_.hidden_size, config_.hidden_size));
    auto batch = input.batch;
    batch.positions = d.positions;
    batch.sequences = d.sequences;
    if (auto ok = compute_mtp(count, d.tokens, batch, input.experts); !ok)
      return ok;
    for (std::int32_t i = 0; i < count; ++i)
      d.rows[i] = i;
  }
  return {};
}

/// The MTP layer for rows whose hidden states lie in the right half of mtp_input_, into
/// mtp_hidden_.
expected<void> stage_model::compute_mtp(std::int32_t num_rows, std::span<const std::int32_t> tokens,
                                        const kernels::batch_view& batch,
                                        expert_exchange* experts) {
  const auto compute = [&] {
    const auto input = mtp_input_.view(num_rows);
    const auto embedded = slice_cols(input, type_, 0, config_.hidden_size);
    const auto hidden = mtp_hidden_.view(num_rows);
    ops_.embed(*weights_.embedding, tokens, embedded);
    ops_.rms_norm(embedded, weights_.mtp->embedding_norm, config_.rms_norm_eps, embedded);
    ops_.linear(input, weights_.mtp->projection, hidden);
    return compute_layer(config_.num_layers - options_.first_layer, hidden, batch, experts);
  };
  return compute_step(step_id_ + 1, tokens, batch, experts, std::ref(compute));
}

/// Draws the drafts of this depth, and keeps the chains that draft once more.
void stage_model::draw_drafts(const draft_input& input, std::int32_t depth,
                              std::span<std::int32_t> out) {
  auto& d = drafting_;
  const auto hidden = mtp_hidden_.view(static_cast<std::int32_t>(input.rows.size()));
  const auto count = d.chains.size();
  d.params.resize(count);
  d.drawn.resize(count);
  for (std::size_t i = 0; i < count; ++i) {
    auto& draw = d.params[i] = input.chains[d.chains[i]].draw;
    draw.position += static_cast<std::uint32_t>(depth);
    draw.num_logprobs = 0;
    draw.target = -1;
  }
  const auto block = static_cast<std::size_t>(max_logit_rows());
  for (std::size_t first = 0; first < count; first += block) {
    const auto size = std::min(block, count - first);
    const auto normed = normed_.view(static_cast<std::int32_t>(size));
    const auto logits = logits_.view(static_cast<std::int32_t>(size));
    norm_rows(hidden, std::span(d.rows).subspan(first, size), weights_.mtp->head_norm, normed);
    ops_.logits(normed, *weights_.head, logits);
    ops_.sample(logits, std::span(d.params).subspan(first, size),
                std::span(d.drawn).subspan(first, size));
  }
  const auto& batch = input.batch;
  std::size_t kept = 0;
  d.tokens.clear();
  for (std::size_t i = 0; i < count; ++i) {
    const auto chain = d.chains[i];
    const auto token = d.drawn[i].token;
    out[static_cast<std::size_t>(chain) * options_.max_drafts + depth] = token;
    const auto sequence = static_cast<std::size_t>(d.sequences[i]);
    const auto end = sequence + 1 < batch.block_table_offsets.size()
                       ? batch.block_table_offsets[sequence + 1]
                       : static_cast<std::int32_t>(batch.block_tables.size());
    const bool has_room =
      (d.positions[i] + 1) / page_tokens_ < end - batch.block_table_offsets[sequence];
    if (token < 0 || depth + 1 == input.chains[chain].num_drafts || !has_room)
      continue;
    d.chains[kept] = chain;
    d.rows[kept] = d.rows[i];
    d.positions[kept] = d.positions[i] + 1;
    d.sequences[kept] = d.sequences[i];
    d.tokens.push_back(token);
    ++kept;
  }
  d.chains.resize(kept);
  d.rows.resize(kept);
  d.positions.resize(kept);
  d.sequences.resize(kept);
}

} // namespace troupe::model
