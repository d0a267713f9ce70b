#include "troupe/model/stage_model.hpp"

#include <algorithm>
#include <atomic>
#include <functional>

#include <fmt/format.h>

namespace troupe::model {

namespace {

using kernels::rows_view;

/// Logits are as wide as the vocabulary, so so many rows are taken at a time.
constexpr std::int32_t kLogitRows = 64;

/// The end of the layers that the stage loads, which in the last one may include an MTP layer.
std::int32_t end_loaded(const stage_options& options) {
  return options.end_layer + (options.max_drafts > 0 ? 1 : 0);
}

/// Width of the widest dense MLP or shared expert, which decides how much scratch is needed.
std::int32_t widest_mlp(const model_config& config, const stage_options& options) {
  std::int32_t width = 0;
  for (auto layer = options.first_layer; layer < end_loaded(options); ++layer)
    width = std::max(width, config.is_moe_layer(layer) ? config.shared_intermediate_size()
                                                       : config.intermediate_size);
  return width;
}

bool has_moe(const model_config& config, const stage_options& options) {
  for (auto layer = options.first_layer; layer < end_loaded(options); ++layer)
    if (config.is_moe_layer(layer))
      return true;
  return false;
}

/// Two numbers that no other stage of this process has had, whatever lives where it lived.
std::uint64_t new_step_ids() {
  static std::atomic<std::uint64_t> next{1};
  return next.fetch_add(2, std::memory_order_relaxed);
}

kernels::router_params make_router_params(const model_config& config) {
  kernels::router_params params;
  params.num_experts = config.num_experts;
  params.num_groups = config.num_groups;
  params.num_groups_kept = config.num_groups_kept;
  params.top_k = config.num_experts_per_token;
  params.scaling_factor = config.routed_scaling_factor;
  params.normalise = config.norm_topk_prob;
  if (config.router == router_kind::noaux_tc)
    return params;
  // DeepSeek-V2 either normalises or scales, and a single expert is not normalised
  // (modeling_deepseek.py of DeepSeek-V2's release, MoEGate).
  params.score = kernels::router_score::softmax;
  params.rank = kernels::group_rank::best;
  params.normalise = config.norm_topk_prob && params.top_k > 1;
  if (params.normalise)
    params.scaling_factor = 1.0F;
  return params;
}

} // namespace

stage_model::stage_model(std::shared_ptr<tensor_source> source, const model_config& config,
                         const stage_options& options, kernels::ops& ops)
  : config_(config),
    options_(options),
    ops_(ops),
    type_(ops.activation_type()),
    store_(std::move(source), config, ops),
    router_(make_router_params(config)) {}

expected<std::unique_ptr<stage_model>> stage_model::load(std::shared_ptr<tensor_source> source,
                                                         const model_config& config,
                                                         const stage_options& options,
                                                         kernels::ops& ops) {
  if (options.first_layer < 0 || options.first_layer >= options.end_layer
      || options.end_layer > config.num_layers)
    return fail(error_code::invalid_config,
                fmt::format("a stage of layers [{}, {}) is asked for, but the model has {}",
                            options.first_layer, options.end_layer, config.num_layers),
                "use fewer pipeline stages");
  if (options.max_rows < 1)
    return fail(error_code::invalid_config,
                fmt::format("a stage of {} rows is asked for", options.max_rows),
                "give max_batch_tokens of at least 1");
  if (options.max_drafts > 0 && (options.end_layer < config.num_layers || !config.num_mtp_layers))
    return fail(error_code::invalid_config,
                config.num_mtp_layers == 0
                  ? "drafts are asked for, but the model has no MTP layer to make them"
                  : "drafts are asked of a stage that is not the last",
                "set serving.draft_tokens to 0");
  if (config.part.num_ranks > 1 && (options.max_drafts > 0 || !options.with_local_experts))
    return fail(
      error_code::invalid_config,
      "a stage on several devices neither drafts nor has experts elsewhere",
      "set parallel.tensor to 1, or serving.draft_tokens and parallel.expert_groups to 0");
  const auto end_layer = end_loaded(options);
  std::unique_ptr<stage_model> stage(new stage_model(source, config, options, ops));
  auto weights = load_trunk(stage->store_, config, options.first_layer, options.end_layer,
                            options.max_drafts > 0);
  if (!weights)
    return tl::unexpected(std::move(weights.error()));
  stage->weights_ = std::move(*weights);
  auto loaded =
    attention::load(stage->store_, config, options.first_layer, end_layer, options.max_rows, ops);
  if (!loaded)
    return tl::unexpected(std::move(loaded.error()));
  stage->attention_ = std::move(*loaded);
  if (options.with_local_experts && has_moe(config, options)) {
    auto experts = local_experts::load(std::move(source), config, options.first_layer, end_layer,
                                       options.max_rows, ops);
    if (!experts)
      return tl::unexpected(std::move(experts.error()));
    stage->own_experts_ = std::move(*experts);
  }
  stage->allocate_scratch();
  return stage;
}

void stage_model::allocate_scratch() {
  const auto& c = config_;
  const std::int64_t rows = options_.max_rows;
  const auto buffer = [&](std::int64_t max_rows, std::int32_t num_cols) {
    return row_buffer(ops_, type_, max_rows, num_cols);
  };
  hidden_ = buffer(rows, c.hidden_size);
  normed_ = buffer(rows, c.hidden_size);
  delta_ = buffer(rows, c.hidden_size);
  if (const auto width = widest_mlp(c, options_); width > 0) {
    gate_ = buffer(rows, width);
    up_ = buffer(rows, width);
  }
  if (has_moe(c, options_)) {
    const auto num_tasks = rows * c.num_experts_per_token;
    expert_out_ = buffer(num_tasks, c.hidden_size);
    routed_experts_.resize(num_tasks);
    routed_weights_.resize(num_tasks);
    expert_rows_.resize(num_tasks);
  }
  if (config_.part.num_ranks > 1)
    mixed_ = buffer(rows, c.hidden_size);
  if (is_last() && config_.part.rank == 0)
    logits_ = row_buffer(ops_, kernels::element_type::f32, max_logit_rows(), c.vocab_size);
  if (weights_.mtp) {
    mtp_hidden_ = buffer(rows, c.hidden_size);
    mtp_input_ = buffer(rows, 2 * c.hidden_size);
  }
}

std::size_t stage_model::kv_bytes(std::int32_t num_pages, std::int32_t page_tokens) const {
  return weights_.layers.size() * static_cast<std::size_t>(num_pages) * page_tokens
         * config_.kv_dim() * kernels::size_of(attention_->kv_type());
}

void stage_model::attach_kv(void* data, std::int32_t num_pages, std::int32_t page_tokens) {
  kv_ = static_cast<std::byte*>(data);
  num_pages_ = num_pages;
  page_tokens_ = page_tokens;
  step_id_ = new_step_ids();
}

kv_pages stage_model::pages_of(std::int32_t local_layer) const {
  const auto layer_bytes = kv_bytes(num_pages_, page_tokens_) / weights_.layers.size();
  return {kv_ + local_layer * layer_bytes, num_pages_, page_tokens_};
}

expected<void> stage_model::check_batch(const kernels::batch_view& batch) const {
  const auto bad = [](std::size_t row, const std::string& what) {
    return fail(error_code::invalid_request,
                fmt::format("row {} of the micro-batch {}", row, what));
  };
  const auto num_sequences = batch.block_table_offsets.size();
  for (std::size_t row = 0; row < batch.positions.size(); ++row) {
    const auto position = batch.positions[row];
    const auto sequence = batch.sequences[row];
    if (sequence < 0 || static_cast<std::size_t>(sequence) >= num_sequences)
      return bad(row, fmt::format("belongs to sequence {} of {}", sequence, num_sequences));
    const std::int64_t first = batch.block_table_offsets[sequence];
    const auto end = static_cast<std::size_t>(sequence) + 1 < num_sequences
                       ? std::int64_t{batch.block_table_offsets[sequence + 1]}
                       : static_cast<std::int64_t>(batch.block_tables.size());
    if (first < 0 || end > static_cast<std::int64_t>(batch.block_tables.size()) || position < 0
        || position / page_tokens_ >= end - first)
      return bad(row, fmt::format("has position {}, outside the {} pages of its sequence", position,
                                  std::max<std::int64_t>(end - first, 0)));
  }
  for (const auto page : batch.block_tables)
    if (page < 0 || page >= num_pages_)
      return fail(error_code::invalid_request,
                  fmt::format("a block table names page {} of {}", page, num_pages_));
  return {};
}

expected<void> stage_model::check_input(const stage_input& input) const {
  const auto num_rows = input.batch.positions.size();
  if (num_rows == 0 || num_rows > static_cast<std::size_t>(options_.max_rows)
      || input.batch.sequences.size() != num_rows)
    return fail(error_code::internal,
                fmt::format("a micro-batch of {} rows does not fit a stage of {}", num_rows,
                            options_.max_rows));
  if (kv_ == nullptr)
    return fail(error_code::internal, "a stage was asked to compute before it had KV memory");
  if (is_first() ? input.tokens.size() != num_rows
                 : input.hidden == nullptr && input.fetch == nullptr)
    return fail(error_code::internal, fmt::format("a micro-batch of {} rows came without its {}",
                                                  num_rows, is_first() ? "tokens" : "hidden rows"));
  if (is_first())
    for (std::size_t row = 0; row < num_rows; ++row)
      if (input.tokens[row] < 0 || input.tokens[row] >= config_.vocab_size)
        return fail(error_code::invalid_request,
                    fmt::format("row {} of the micro-batch has token id {}, outside the "
                                "vocabulary of {}",
                                row, input.tokens[row], config_.vocab_size));
  if (input.experts == nullptr && own_experts_ == nullptr && has_moe(config_, options_))
    return fail(error_code::internal, "a stage without experts was given no exchange");
  return check_batch(input.batch);
}

expected<rows_view> stage_model::forward(const stage_input& input) {
  num_rows_ = 0;
  if (auto ok = check_input(input); !ok)
    return tl::unexpected(std::move(ok.error()));
  const auto num_rows = static_cast<std::int32_t>(input.batch.positions.size());
  const auto hidden = hidden_.view(num_rows);
  if (input.fetch != nullptr) {
    if (auto fetched = (*input.fetch)(hidden); !fetched)
      return tl::unexpected(std::move(fetched.error()));
  } else if (!is_first()) {
    ops_.copy_from_host(input.hidden, hidden);
    if (options_.checks_finite && !ops_.all_finite(hidden))
      return fail(error_code::internal,
                  fmt::format("hidden rows that came for layer {} hold values that are not finite",
                              options_.first_layer));
  }
  const auto compute = [&] { return compute_layers(input, hidden); };
  if (auto ok = compute_step(step_id_, input.tokens, input.batch, input.experts, std::ref(compute));
      !ok)
    return tl::unexpected(std::move(ok.error()));
  if (input.spoil != nullptr) [[unlikely]]
    (*input.spoil)(hidden);
  if (options_.checks_finite && !ops_.all_finite(hidden))
    return fail(error_code::internal,
                fmt::format("layers {} to {} computed values that are not finite",
                            options_.first_layer, options_.end_layer - 1),
                "weights or KV memory are damaged");
  num_rows_ = num_rows;
  return hidden;
}

/// Without an exchange, a step is nothing but operations on the device, which may know it already.
expected<void> stage_model::compute_step(std::uint64_t what, std::span<const std::int32_t> tokens,
                                         const kernels::batch_view& batch, expert_exchange* experts,
                                         const std::function<expected<void>()>& compute) {
  if (experts != nullptr)
    return compute();
  expected<void> result;
  const auto work = [&] { result = compute(); };
  ops_.step({what, static_cast<std::int32_t>(batch.positions.size())}, tokens, batch,
            std::ref(work));
  return result;
}

expected<void> stage_model::compute_layers(const stage_input& input, const rows_view& hidden) {
  if (is_first())
    ops_.embed(*weights_.embedding, input.tokens, hidden);
  for (auto layer = options_.first_layer; layer < options_.end_layer; ++layer)
    if (auto ok = compute_layer(layer - options_.first_layer, hidden, input.batch, input.experts);
        !ok)
      return ok;
  return {};
}

expected<void> stage_model::compute_layer(std::int32_t local_layer, const rows_view& hidden,
                                          const kernels::batch_view& batch,
                                          expert_exchange* experts) {
  const auto& layer = weights_.layers[local_layer];
  const auto normed = normed_.view(hidden.num_rows);
  const auto delta = delta_.view(hidden.num_rows);
  ops_.rms_norm(hidden, layer.input_norm, config_.rms_norm_eps, normed);
  attention_->compute(local_layer, normed, batch, pages_of(local_layer), delta);
  ops_.all_reduce(delta);
  ops_.add_rms_norm(hidden, delta, layer.post_attention_norm, config_.rms_norm_eps, normed);
  if (layer.moe)
    return add_experts(options_.first_layer + local_layer, *layer.moe, experts, hidden);
  compute_mlp(*layer.mlp, normed, delta);
  ops_.all_reduce(delta);
  ops_.add(hidden, delta);
  return {};
}

/// Alone, the mixture is added to the hidden rows as it is made; of several ranks, each makes a
/// part of it, and the sum of the parts is added.
expected<void> stage_model::add_experts(std::int32_t layer, const moe_weights& w,
                                        expert_exchange* exchange, const rows_view& hidden) {
  if (config_.part.num_ranks == 1)
    return mix_experts(layer, w, exchange, hidden);
  const auto mixed = mixed_.view(hidden.num_rows);
  ops_.clear(mixed);
  if (auto ok = mix_experts(layer, w, exchange, mixed); !ok)
    return ok;
  ops_.all_reduce(mixed);
  ops_.add(hidden, mixed);
  return {};
}

void stage_model::compute_mlp(const kernels::expert_weights& w, const rows_view& x,
                              const rows_view& out) {
  const auto width = w.gate.num_rows;
  const auto gate = slice_cols(gate_.view(x.num_rows), type_, 0, width);
  const auto up = slice_cols(up_.view(x.num_rows), type_, 0, width);
  ops_.mlp(x, w, gate, up, out);
}

/// The mixture without a look at the choice. False where the device wants the host to see it.
bool stage_model::mix_on_device(std::int32_t layer, const moe_weights& w, const rows_view& out) {
  const auto num_rows = out.num_rows;
  kernels::mixture_weights weights{w.gate, w.bias, own_experts_->experts_of(layer), nullptr};
  kernels::mixture_scratch scratch;
  if (w.shared) {
    const auto width = w.shared->gate.num_rows;
    weights.shared = &*w.shared;
    scratch.gate = slice_cols(gate_.view(num_rows), type_, 0, width);
    scratch.up = slice_cols(up_.view(num_rows), type_, 0, width);
    scratch.shared_out = delta_.view(num_rows);
  }
  scratch.expert_out = expert_out_.view(num_rows * config_.num_experts_per_token);
  return ops_.mixture(normed_.view(num_rows), weights, router_, scratch, out);
}

expected<void> stage_model::mix_experts(std::int32_t layer, const moe_weights& w,
                                        expert_exchange* given, const rows_view& out) {
  if (given == nullptr && mix_on_device(layer, w, out))
    return {};
  auto& exchange = given != nullptr ? *given : *own_experts_;
  const auto num_rows = out.num_rows;
  const auto top_k = config_.num_experts_per_token;
  const auto num_tasks = static_cast<std::size_t>(num_rows) * top_k;
  const auto normed = normed_.view(num_rows);
  const auto experts = std::span(routed_experts_).first(num_tasks);
  const auto weights = std::span(routed_weights_).first(num_tasks);
  const auto expert_rows = std::span(expert_rows_).first(num_tasks);
  ops_.route(normed, w.gate, w.bias, router_, experts, weights);
  if (auto ok = exchange.begin(layer, normed, experts, top_k); !ok)
    return ok;
  rows_view shared;
  if (w.shared) {
    shared = delta_.view(num_rows);
    compute_mlp(*w.shared, normed, shared);
  }
  const auto expert_out = expert_out_.view(static_cast<std::int32_t>(num_tasks));
  if (auto ok = exchange.finish(expert_out, expert_rows); !ok)
    return ok;
  ops_.combine(expert_out, expert_rows, weights, top_k, shared, out);
  return {};
}

std::int32_t stage_model::max_logit_rows() const {
  return std::min(options_.max_rows, kLogitRows);
}

/// out[i] = rms_norm(x[rows[i]]) * weight. Neighbouring rows in one call.
void stage_model::norm_rows(const rows_view& x, std::span<const std::int32_t> rows,
                            const float* weight, const rows_view& out) {
  const auto count = static_cast<std::int32_t>(rows.size());
  for (std::int32_t i = 0; i < count;) {
    auto end = i + 1;
    while (end < count && rows[end] == rows[end - 1] + 1)
      ++end;
    ops_.rms_norm(slice_rows(x, type_, rows[i], end - i), weight, config_.rms_norm_eps,
                  slice_rows(out, type_, i, end - i));
    i = end;
  }
}

expected<rows_view> stage_model::logits(std::span<const std::int32_t> rows) {
  if (!weights_.head)
    return fail(error_code::internal, "logits were asked of a stage that does not have the head");
  if (rows.size() > static_cast<std::size_t>(max_logit_rows()))
    return fail(error_code::internal, fmt::format("logits of {} rows were asked for, above {}",
                                                  rows.size(), max_logit_rows()));
  for (const auto row : rows)
    if (row < 0 || row >= num_rows_)
      return fail(
        error_code::internal,
        fmt::format("logits of row {} were asked for, but {} were computed", row, num_rows_));
  const auto count = static_cast<std::int32_t>(rows.size());
  const auto hidden = hidden_.view(num_rows_);
  const auto normed = normed_.view(count);
  norm_rows(hidden, rows, weights_.final_norm, normed);
  const auto logits = logits_.view(count);
  if (count > 0)
    ops_.logits(normed, *weights_.head, logits);
  return logits;
}

expected<void> stage_model::sample(std::span<const std::int32_t> rows,
                                   std::span<const kernels::sampling_params> params,
                                   std::span<kernels::sampled_token> out) {
  if (params.size() != rows.size() || out.size() != rows.size())
    return fail(error_code::internal,
                fmt::format("{} rows came with {} sampling parameters and room for {} tokens",
                            rows.size(), params.size(), out.size()));
  for (const auto& param : params)
    if (param.target >= config_.vocab_size)
      return fail(error_code::invalid_request,
                  fmt::format("token id {} is to be scored, outside the vocabulary of {}",
                              param.target, config_.vocab_size));
  const auto step = static_cast<std::size_t>(max_logit_rows());
  for (std::size_t first = 0; first < rows.size(); first += step) {
    const auto count = std::min(step, rows.size() - first);
    auto values = logits(rows.subspan(first, count));
    if (!values)
      return tl::unexpected(std::move(values.error()));
    ops_.sample(*values, params.subspan(first, count), out.subspan(first, count));
  }
  return {};
}

} // namespace troupe::model
