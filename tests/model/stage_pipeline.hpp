#pragma once

#include "troupe/model/checkpoint.hpp"
#include "troupe/model/stage_group.hpp"
#include "troupe/model/tensor_shard.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>

namespace troupe::model::test {

/// Experts in groups, each with its own weights and buffers, as processes would have them.
class grouped_experts final : public expert_exchange {
public:
  grouped_experts(const std::shared_ptr<tensor_source>& source, const model_config& config,
                  std::int32_t num_groups, std::int32_t max_rows, kernels::ops& ops,
                  bool with_mtp = false)
    : ops_(ops),
      hidden_(config.hidden_size),
      sent_(ops, ops.activation_type(), max_rows, hidden_),
      computed_(ops, ops.activation_type(), std::int64_t{max_rows} * config.num_experts_per_token,
                hidden_) {
    std::vector<expert_range> ranges;
    const auto size = config.num_experts / num_groups;
    for (std::int32_t i = 0; i < num_groups; ++i)
      ranges.push_back({i * size, (i + 1) * size});
    auto plan =
      dispatch_plan::make(ranges, config.num_experts, max_rows, config.num_experts_per_token);
    REQUIRE(plan);
    plan_ = std::make_unique<dispatch_plan>(std::move(*plan));
    for (const auto& range : ranges) {
      auto group = expert_group_model::load(source, config, range, ops, with_mtp);
      REQUIRE(group);
      groups_.push_back(std::move(*group));
    }
    inbox_.resize(num_groups);
  }

  expected<void> begin(std::int32_t layer, const kernels::rows_view& x,
                       std::span<const std::int32_t> experts, std::int32_t) override {
    layer_ = layer;
    if (auto ok = plan_->build(experts); !ok)
      return ok;
    for (std::size_t g = 0; g < groups_.size(); ++g) {
      inbox_[g].resize(plan_->work(g).rows.size() * hidden_);
      gather_rows(ops_, x, plan_->work(g).rows, inbox_[g].data());
    }
    return {};
  }

  expected<void> finish(const kernels::rows_view& expert_out,
                        std::span<std::int32_t> expert_rows) override {
    if (num_failures_ > 0) {
      --num_failures_;
      return fail(error_code::peer_lost, "group 1 went away");
    }
    std::vector<float> reply;
    for (auto g = groups_.size(); g-- > 0;) { // replies come in any order
      const auto work = plan_->work(g);
      const auto num_tasks = static_cast<std::int32_t>(work.tasks.size());
      const auto x = sent_.view(static_cast<std::int32_t>(work.rows.size()));
      ops_.import_rows(inbox_[g].data(), x);
      std::vector<kernels::expert_task> tasks(work.tasks.begin(), work.tasks.end());
      for (auto& task : tasks)
        task.expert -= groups_[g]->experts().first;
      const auto out = computed_.view(num_tasks);
      if (auto ok = groups_[g]->run(layer_, x, tasks, out); !ok)
        return ok;
      reply.resize(static_cast<std::size_t>(num_tasks) * hidden_);
      ops_.export_rows(out, reply.data());
      ops_.import_rows(
        reply.data(), slice_rows(expert_out, ops_.activation_type(), work.first_output, num_tasks));
    }
    std::copy(plan_->expert_rows().begin(), plan_->expert_rows().end(), expert_rows.begin());
    return {};
  }

  /// The next calls of finish fail.
  void fail_next(int num_failures) { num_failures_ = num_failures; }

private:
  kernels::ops& ops_;
  std::int32_t hidden_;
  row_buffer sent_;
  row_buffer computed_;
  std::unique_ptr<dispatch_plan> plan_;
  std::vector<std::unique_ptr<expert_group_model>> groups_;
  std::vector<std::vector<float>> inbox_;
  std::int32_t layer_ = -1;
  int num_failures_ = 0;
};

/// Where each stage ends, and in how many groups the experts are; 0: inside the stages.
struct layout {
  std::vector<std::int32_t> stage_ends;
  std::int32_t num_groups = 0;
  bool rehearses = false; ///< before it has KV memory, and records steps when it has
  head_format head = head_format::stored;
  std::chrono::nanoseconds alert{0}; ///< of ranks; see stage_group
};

/// Consecutive tokens of one sequence.
struct slice {
  std::int32_t sequence;
  std::int32_t first_position;
  std::vector<std::int32_t> tokens;
};

/// A whole model in this process: stages one behind the other, KV pages in shuffled order.
class stage_pipeline {
public:
  static constexpr std::int32_t page_tokens = 16;

  stage_pipeline(const std::string& directory, const layout& how, std::int32_t max_sequences,
                 std::int32_t max_tokens, kernels::ops& ops, std::int32_t max_rows = 512,
                 std::int32_t max_drafts = 0)
    : stage_pipeline(directory, how, max_sequences, max_tokens, std::vector{&ops}, max_rows,
                     max_drafts) {}

  /// Each stage on several devices, given by rank.
  stage_pipeline(const std::string& directory, const layout& how, std::int32_t max_sequences,
                 std::int32_t max_tokens, const std::vector<kernels::ops*>& ranks,
                 std::int32_t max_rows = 512, std::int32_t max_drafts = 0)
    : ops_(*ranks.front()), pages_per_sequence_((max_tokens + page_tokens - 1) / page_tokens) {
    auto config = load_model_config(directory);
    REQUIRE(config);
    config->head = how.head;
    auto source = open_weights(directory);
    REQUIRE(source);
    const auto num_pages = pages_per_sequence_ * max_sequences;
    pages_.resize(num_pages);
    for (std::int32_t i = 0; i < num_pages; ++i)
      pages_[i] = i;
    std::shuffle(pages_.begin(), pages_.end(), std::mt19937(11));
    if (how.num_groups > 0)
      exchange = std::make_unique<grouped_experts>(*source, *config, how.num_groups, max_rows, ops_,
                                                   max_drafts > 0);
    const auto num_ranks = static_cast<std::int32_t>(ranks.size());
    std::int32_t first = 0;
    for (const auto end : how.stage_ends) {
      stage_options options{first, end, max_rows, how.num_groups == 0};
      options.max_drafts = end == config->num_layers ? max_drafts : 0;
      std::vector<std::unique_ptr<stage_model>> models;
      std::vector<void*> kv;
      for (std::int32_t rank = 0; rank < num_ranks; ++rank) {
        auto& ops = *ranks[rank];
        auto part = num_ranks == 1 ? config : rank_config(*config, rank, num_ranks);
        REQUIRE(part);
        auto model = stage_model::load(*source, *part, options, ops);
        REQUIRE(model);
        if (how.rehearses)
          REQUIRE((*model)->rehearse(num_pages, page_tokens));
        kv_.push_back(ops.allocate((*model)->kv_bytes(num_pages, page_tokens)));
        kv.push_back(kv_.back().get());
        models.push_back(std::move(*model));
      }
      auto& stage =
        stages.emplace_back(std::make_unique<stage_group>(std::move(models), how.alert));
      stage->attach_kv(kv, num_pages, page_tokens);
      if (how.rehearses)
        for (std::int32_t rows = 1; rows <= 8; ++rows)
          REQUIRE(stage->record_step(rows));
      first = end;
    }
  }

  std::int32_t vocab_size() const { return stages.front()->leader().config().vocab_size; }
  stage_model& last() { return stages.back()->leader(); }

  /// Computes a micro-batch; its rows are those of the slices, in order.
  expected<void> forward(const std::vector<slice>& slices) {
    tokens_.clear();
    positions_.clear();
    sequences_.clear();
    tables_.clear();
    offsets_.clear();
    for (std::size_t s = 0; s < slices.size(); ++s) {
      const auto& one = slices[s];
      for (std::size_t i = 0; i < one.tokens.size(); ++i) {
        tokens_.push_back(one.tokens[i]);
        positions_.push_back(one.first_position + static_cast<std::int32_t>(i));
        sequences_.push_back(static_cast<std::int32_t>(s));
      }
      offsets_.push_back(static_cast<std::int32_t>(tables_.size()));
      const auto used = positions_.back() / page_tokens + 1;
      const auto begin = pages_.begin() + one.sequence * pages_per_sequence_;
      tables_.insert(tables_.end(), begin, begin + used);
    }
    stage_input input;
    input.batch = {positions_, sequences_, tables_, offsets_};
    input.experts = exchange.get();
    for (std::size_t i = 0; i < stages.size(); ++i) {
      if (i == 0)
        input.tokens = tokens_;
      auto hidden = stages[i]->forward(input);
      if (!hidden)
        return tl::unexpected(hidden.error());
      boundary_.resize(static_cast<std::size_t>(hidden->num_rows) * hidden->num_cols);
      ops_.copy_to_host(*hidden, boundary_.data());
      input.tokens = {};
      input.hidden = boundary_.data();
    }
    return {};
  }

  /// The MTP layer for rows of the last forward pass that stand.
  expected<void> draft(std::span<const std::int32_t> rows, std::span<const std::int32_t> tokens,
                       std::span<const draft_chain> chains, std::vector<std::int32_t>& out) {
    std::vector<std::int32_t> positions, sequences;
    for (const auto row : rows) {
      positions.push_back(positions_.at(row));
      sequences.push_back(sequences_.at(row));
    }
    out.resize(chains.size() * last().options().max_drafts);
    return last().draft(
      {rows, tokens, {positions, sequences, tables_, offsets_}, chains, exchange.get()}, out);
  }

  /// Tokens of the last forward pass, one a row.
  std::span<const std::int32_t> tokens() const { return tokens_; }

  /// Logits [tokens, vocab] of one sequence, fed in chunks.
  std::vector<float> score(const std::vector<std::int32_t>& tokens, std::int32_t chunk,
                           std::int32_t sequence = 0) {
    std::vector<float> result;
    for (std::size_t first = 0; first < tokens.size(); first += chunk) {
      const auto end = std::min(tokens.size(), first + chunk);
      REQUIRE(forward({{sequence,
                        static_cast<std::int32_t>(first),
                        {tokens.begin() + first, tokens.begin() + end}}}));
      append_logits(0, static_cast<std::int32_t>(end - first), result);
    }
    return result;
  }

  /// Appends the logits of rows [first, first + count) of the last forward pass.
  void append_logits(std::int32_t first, std::int32_t count, std::vector<float>& out) {
    for (std::int32_t row = first; row < first + count;) {
      const auto step = std::min(first + count - row, last().max_logit_rows());
      std::vector<std::int32_t> rows(step);
      for (auto& one : rows)
        one = row++;
      auto logits = last().logits(rows);
      REQUIRE(logits);
      const auto at = out.size();
      out.resize(at + static_cast<std::size_t>(step) * vocab_size());
      ops_.copy_to_host(*logits, out.data() + at);
    }
  }

  std::vector<std::unique_ptr<stage_group>> stages;
  std::unique_ptr<grouped_experts> exchange;

private:
  kernels::ops& ops_;
  std::int32_t pages_per_sequence_;
  std::vector<std::int32_t> pages_;
  std::vector<std::shared_ptr<void>> kv_;
  std::vector<float> boundary_;
  std::vector<std::int32_t> tokens_, positions_, sequences_, tables_, offsets_;
};

/// One entry of a golden.json.
struct golden {
  std::vector<std::int32_t> prompt, tokens;
  std::vector<std::vector<std::pair<std::int32_t, double>>> top_logprobs;
  std::vector<double> prompt_logprobs;
  double min_margin = 0.0;

  std::vector<std::int32_t> all_tokens() const {
    auto result = prompt;
    result.insert(result.end(), tokens.begin(), tokens.end());
    return result;
  }
};

inline std::vector<golden> load_golden(const std::string& directory) {
  std::ifstream in(directory + "/golden.json");
  std::vector<golden> result;
  for (const auto& entry : nlohmann::json::parse(in)) {
    golden one;
    entry.at("prompt").get_to(one.prompt);
    entry.at("tokens").get_to(one.tokens);
    entry.at("top_logprobs").get_to(one.top_logprobs);
    entry.at("prompt_logprobs").get_to(one.prompt_logprobs);
    entry.at("min_margin").get_to(one.min_margin);
    result.push_back(std::move(one));
  }
  return result;
}

/// ln softmax(logits)[token].
inline double logprob(const float* logits, std::int32_t vocab, std::int32_t token) {
  const double top = *std::max_element(logits, logits + vocab);
  double sum = 0.0;
  for (std::int32_t i = 0; i < vocab; ++i)
    sum += std::exp(logits[i] - top);
  return logits[token] - top - std::log(sum);
}

/// Appends the distances of log-probabilities from the golden ones. `logits` are those of all
/// tokens but the last, one row of `vocab` each.
inline void add_deviations(const golden& expected, const std::vector<float>& logits,
                           std::int32_t vocab, std::vector<double>& out) {
  const auto row = [&](std::size_t i) { return logits.data() + i * vocab; };
  for (std::size_t i = 0; i < expected.prompt_logprobs.size(); ++i)
    out.push_back(
      std::abs(logprob(row(i), vocab, expected.prompt[i + 1]) - expected.prompt_logprobs[i]));
  for (std::size_t i = 0; i < expected.top_logprobs.size() && i < expected.tokens.size(); ++i)
    for (const auto& [token, value] : expected.top_logprobs[i])
      out.push_back(std::abs(logprob(row(expected.prompt.size() - 1 + i), vocab, token) - value));
}

/// The value that `part` of the others do not exceed. Reorders them.
inline double quantile(std::vector<double>& values, double part) {
  const auto at = values.begin() + static_cast<std::ptrdiff_t>(part * (values.size() - 1));
  std::nth_element(values.begin(), at, values.end());
  return *at;
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

} // namespace troupe::model::test
