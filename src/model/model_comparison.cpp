#include "troupe/model/model_comparison.hpp"

#include "troupe/model/config_reader.hpp"
#include "troupe/model/model_tokenizer.hpp"
#include "troupe/model/stage_model.hpp"
#include "troupe/model/tensor_source.hpp"

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <utility>

#include <fmt/format.h>

namespace troupe::model {

namespace {

constexpr std::int32_t kPageTokens = 16;
constexpr std::int32_t kMaxRows = 256;
constexpr std::uint64_t kMaxFileBytes = 256U << 20;

/// Turns a row of logits into log-probabilities.
void normalise(std::span<float> row) {
  const double top = *std::max_element(row.begin(), row.end());
  double sum = 0.0;
  for (const float value : row)
    sum += std::exp(value - top);
  const double shift = top + std::log(sum);
  for (float& value : row)
    value = static_cast<float>(value - shift);
}

/// A whole model in this process, with room for one text.
class scorer {
public:
  static expected<std::unique_ptr<scorer>> load(const std::filesystem::path& directory,
                                                std::size_t longest, int num_threads) {
    auto result = std::make_unique<scorer>();
    auto config = load_model_config(directory);
    if (!config)
      return tl::unexpected(std::move(config.error()));
    auto weights = open_weights(directory);
    if (!weights)
      return tl::unexpected(std::move(weights.error()));
    result->ops_ = kernels::make_cpu_ops(num_threads);
    stage_options options;
    options.end_layer = config->num_layers;
    options.max_rows = kMaxRows;
    auto model = stage_model::load(std::move(*weights), *config, options, *result->ops_);
    if (!model)
      return tl::unexpected(std::move(model.error()));
    result->model_ = std::move(*model);
    const auto num_pages = static_cast<std::int32_t>(longest / kPageTokens) + 1;
    result->kv_ = result->ops_->allocate(result->model_->kv_bytes(num_pages, kPageTokens));
    if (result->kv_ == nullptr)
      return fail(error_code::resource_exhausted,
                  fmt::format("there is no memory for {} KV pages", num_pages),
                  "compare on a shorter text");
    result->model_->attach_kv(result->kv_.get(), num_pages, kPageTokens);
    result->pages_.resize(num_pages);
    std::iota(result->pages_.begin(), result->pages_.end(), 0);
    return result;
  }

  std::int32_t vocab_size() const { return model_->config().vocab_size; }

  /// Appends the log-probabilities behind each token but the last.
  expected<void> add(std::span<const std::int32_t> tokens, std::vector<float>& out) {
    const auto count = tokens.size() - 1;
    for (std::size_t first = 0; first < count; first += kMaxRows) {
      const auto rows = std::min<std::size_t>(kMaxRows, count - first);
      positions_.resize(rows);
      std::iota(positions_.begin(), positions_.end(), static_cast<std::int32_t>(first));
      const std::vector<std::int32_t> sequences(rows, 0);
      const std::vector<std::int32_t> offsets{0};
      stage_input input;
      input.tokens = tokens.subspan(first, rows);
      input.batch = {positions_, sequences, pages_, offsets};
      if (auto hidden = model_->forward(input); !hidden)
        return tl::unexpected(std::move(hidden.error()));
      if (auto ok = add_logits(static_cast<std::int32_t>(rows), out); !ok)
        return ok;
    }
    return {};
  }

private:
  expected<void> add_logits(std::int32_t num_rows, std::vector<float>& out) {
    const auto vocab = static_cast<std::size_t>(vocab_size());
    for (std::int32_t first = 0; first < num_rows;) {
      const auto count = std::min(model_->max_logit_rows(), num_rows - first);
      std::vector<std::int32_t> rows(count);
      std::iota(rows.begin(), rows.end(), first);
      auto logits = model_->logits(rows);
      if (!logits)
        return tl::unexpected(std::move(logits.error()));
      const auto at = out.size();
      out.resize(at + count * vocab);
      ops_->copy_to_host(*logits, out.data() + at);
      for (std::int32_t row = 0; row < count; ++row)
        normalise(std::span(out).subspan(at + row * vocab, vocab));
      first += count;
    }
    return {};
  }

  std::unique_ptr<kernels::ops> ops_; // outlives the model
  std::unique_ptr<stage_model> model_;
  std::shared_ptr<void> kv_;
  std::vector<std::int32_t> pages_;
  std::vector<std::int32_t> positions_;
};

std::int32_t most_likely(std::span<const float> row) {
  return static_cast<std::int32_t>(std::max_element(row.begin(), row.end()) - row.begin());
}

/// Kullback-Leibler divergence of `other` from `truth`.
double divergence(std::span<const float> truth, std::span<const float> other) {
  double sum = 0.0;
  for (std::size_t i = 0; i < truth.size(); ++i)
    sum += std::exp(double{truth[i]}) * (double{truth[i]} - other[i]);
  return std::max(sum, 0.0);
}

} // namespace

expected<expectations> expect_tokens(const std::filesystem::path& model,
                                     std::span<const comparison_text> texts, int num_threads) {
  std::size_t longest = 1;
  for (const auto& text : texts)
    longest = std::max(longest, text.tokens.size());
  auto loaded = scorer::load(model, longest, num_threads);
  if (!loaded)
    return tl::unexpected(std::move(loaded.error()));
  expectations result;
  result.vocab_size = (*loaded)->vocab_size();
  for (const auto& text : texts)
    if (text.tokens.size() > 1)
      if (auto ok = (*loaded)->add(text.tokens, result.logprobs); !ok)
        return tl::unexpected(std::move(ok.error()));
  return result;
}

model_comparison compare(std::span<const comparison_text> texts, const expectations& source,
                         const expectations& converted) {
  model_comparison result;
  const auto vocab = static_cast<std::size_t>(source.vocab_size);
  std::size_t at = 0;
  std::size_t num_agreeing = 0;
  double source_sum = 0.0;
  double converted_sum = 0.0;
  for (const auto& text : texts) {
    bool same = true;
    for (std::size_t i = 0; i + 1 < text.tokens.size(); ++i, at += vocab) {
      const auto truth = std::span(source.logprobs).subspan(at, vocab);
      const auto other = std::span(converted.logprobs).subspan(at, vocab);
      const auto token = text.tokens[i + 1];
      const auto kl = divergence(truth, other);
      const auto likely = most_likely(other);
      ++result.num_tokens;
      result.mean_kl += kl;
      result.worst_kl = std::max(result.worst_kl, kl);
      num_agreeing += likely == most_likely(truth) ? 1 : 0;
      result.mean_deviation += std::abs(double{truth[token]} - other[token]);
      source_sum += truth[token];
      converted_sum += other[token];
      if (text.answer_begin == 0 || i + 1 < text.answer_begin)
        continue;
      ++result.num_answer_tokens;
      result.num_same_answer_tokens += likely == token ? 1 : 0;
      same = same && likely == token;
    }
    if (text.answer_begin > 0) {
      ++result.num_answers;
      result.num_same_answers += same ? 1 : 0;
    }
  }
  if (result.num_tokens == 0)
    return result;
  const auto count = static_cast<double>(result.num_tokens);
  result.mean_kl /= count;
  result.mean_deviation /= count;
  result.top1_agreement = static_cast<double>(num_agreeing) / count;
  result.source_perplexity = std::exp(-source_sum / count);
  result.perplexity = std::exp(-converted_sum / count);
  return result;
}

expected<std::vector<comparison_text>> read_conversations(const std::filesystem::path& file) {
  auto text = read_text_file(file, kMaxFileBytes);
  if (!text)
    return tl::unexpected(std::move(text.error()));
  std::vector<comparison_text> result;
  try {
    for (const auto& one : nlohmann::json::parse(*text)) {
      auto tokens = one.at("prompt").get<std::vector<std::int32_t>>();
      const auto begin = tokens.size();
      const auto answer = one.at("tokens").get<std::vector<std::int32_t>>();
      tokens.insert(tokens.end(), answer.begin(), answer.end());
      result.push_back({std::move(tokens), begin});
    }
  } catch (const nlohmann::json::exception& reason) {
    return fail(error_code::invalid_model,
                fmt::format("{} holds no conversations: {}", file.string(), reason.what()),
                "it must be a list of objects with \"prompt\" and \"tokens\", lists of token ids");
  }
  return result;
}

expected<std::vector<comparison_text>> read_comparison_text(const std::filesystem::path& file,
                                                            const std::filesystem::path& model,
                                                            std::size_t max_piece,
                                                            std::size_t max_tokens) {
  auto config = load_model_config(model);
  if (!config)
    return tl::unexpected(std::move(config.error()));
  auto words = load_tokenizer(model, *config);
  if (!words)
    return tl::unexpected(std::move(words.error()));
  auto text = read_text_file(file, kMaxFileBytes);
  if (!text)
    return tl::unexpected(std::move(text.error()));
  auto tokens = words->encode(*text);
  if (!tokens)
    return tl::unexpected(std::move(tokens.error()));
  tokens->resize(std::min(tokens->size(), max_tokens));
  std::vector<comparison_text> result;
  for (std::size_t first = 0; first + 1 < tokens->size(); first += max_piece) {
    const auto end = std::min(tokens->size(), first + max_piece);
    result.push_back({{tokens->begin() + static_cast<std::ptrdiff_t>(first),
                       tokens->begin() + static_cast<std::ptrdiff_t>(end)},
                      0});
  }
  return result;
}

} // namespace troupe::model
