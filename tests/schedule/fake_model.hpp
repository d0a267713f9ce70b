#pragma once

#include "troupe/schedule/types.hpp"

#include <catch2/catch.hpp>

#include <algorithm>
#include <deque>
#include <utility>
#include <vector>

namespace troupe::schedule {

/// Fails the running test with `what`; cheaper than CHECK where it is called for every row.
inline void ensure(bool ok, const char* what) {
  if (!ok)
    FAIL(what);
}

/// splitmix64's finaliser (Steele, Lea, Flood 2014) over two words.
inline std::uint64_t mix(std::uint64_t a, std::uint64_t b) {
  auto z = a * 0x9e3779b97f4a7c15ULL + b + 0x632be59bd9b4e019ULL;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  return z ^ (z >> 31);
}

inline constexpr std::uint64_t kVocabulary = 24;

/// What the last stage makes of a row's hidden state.
inline output_token answer_row(std::uint64_t hidden, const output_row& row, const sampling& draw,
                               const std::vector<std::int32_t>& banned) {
  output_token out;
  out.token = row.target;
  if (row.target < 0) {
    auto h = mix(mix(hidden, draw.seed), row.position);
    const auto is_banned = [&] {
      return row.ban_stop_tokens
             && std::find(banned.begin(), banned.end(), out.token) != banned.end();
    };
    do {
      h = mix(h, 1);
      out.token = static_cast<std::int32_t>(h % kVocabulary);
    } while (is_banned());
  }
  out.logprob = -static_cast<float>(mix(hidden, static_cast<std::uint64_t>(out.token)) % 4096);
  for (std::int32_t i = 0; i < row.num_logprobs; ++i)
    out.top_tokens.push_back(i);
  return out;
}

/// What a request must give, whatever else is served: its prompt's scores and its tokens.
struct reference {
  std::vector<std::int32_t> log; ///< prompt and generated tokens
  std::vector<output_token> scores;
  std::vector<output_token> generated;
  finish_reason finish = finish_reason::length;

  reference(const request& r, std::uint32_t max_length, std::size_t num_stages) : log(r.prompt) {
    std::vector<std::uint64_t> folded(num_stages, 0);
    for (std::uint32_t p = 0; p < log.size(); ++p) {
      auto hidden = static_cast<std::uint64_t>(log[p]);
      for (auto& f : folded)
        hidden = f = mix(f, mix(hidden, p));
      if (p + 1 < r.prompt.size()) {
        if (r.num_prompt_logprobs >= 0)
          scores.push_back(answer_row(
            hidden, {.target = log[p + 1], .num_logprobs = r.num_prompt_logprobs}, r.draw, {}));
        continue;
      }
      if (generated.size() == r.max_tokens || log.size() == max_length)
        return;
      generated.push_back(answer_row(hidden,
                                     {.target = -1,
                                      .num_logprobs = std::max(r.num_logprobs, 0),
                                      .ban_stop_tokens = generated.size() < r.min_tokens,
                                      .position = p + 1},
                                     r.draw, r.stop_tokens));
      log.push_back(generated.back().token);
      if (std::find(r.stop_tokens.begin(), r.stop_tokens.end(), log.back())
          != r.stop_tokens.end()) {
        finish = finish_reason::stop;
        return;
      }
    }
  }
};

/// Stages with a paged KV each. A row's hidden state is a hash over all KV of its sequence up
/// to the row, read through the block table, so a wrong page anywhere gives other tokens.
class fake_pipeline {
public:
  fake_pipeline(const limits& l, std::size_t num_stages) : lim_(l), stages_(num_stages) {
    for (auto& s : stages_)
      s.kv.resize(std::size_t{l.num_pages} * l.page_tokens);
  }

  /// Takes a micro-batch. It must stay as it is until `forget` names its step.
  void send(const micro_batch* batch) {
    pending_.push_back({batch, {}});
    pending_.back().hidden.resize(stages_.size());
  }

  const std::deque<const micro_batch*> in_flight() const {
    std::deque<const micro_batch*> batches;
    for (const auto& w : pending_)
      batches.push_back(w.batch);
    return batches;
  }

  /// Lets a stage compute its next micro-batch. False if it has nothing to do.
  bool advance(std::size_t idx) {
    auto& stage = stages_[idx];
    for (auto& w : pending_) {
      if (!w.hidden[idx].empty())
        continue;
      if (idx > 0 && w.hidden[idx - 1].empty())
        return false;
      compute(stage, w, idx);
      return true;
    }
    return false;
  }

  /// A stage comes back from the dead: what it did for the steps in flight is done again. The step
  /// that its device was computing when it died may still be written by `write_late`.
  void restart(std::size_t idx) {
    auto& stage = stages_[idx];
    for (const auto& w : pending_)
      if (!w.hidden[idx].empty() && (idx + 1 == stages_.size() || w.hidden[idx + 1].empty()))
        stage.late = writes_of(stage, w);
    for (auto& w : pending_)
      w.hidden[idx].clear();
  }

  /// The step whose answers are there, if it is the oldest.
  const micro_batch* finished() const {
    return !pending_.empty() && !pending_.front().hidden.back().empty() ? pending_.front().batch
                                                                        : nullptr;
  }

  std::vector<output_token> answers() const {
    const auto& w = pending_.front();
    std::vector<output_token> out;
    for (const auto& row : w.batch->outputs) {
      const auto& slice = w.batch->sequences[static_cast<std::size_t>(row.sequence)];
      out.push_back(answer_row(w.hidden.back()[static_cast<std::size_t>(row.row)], row, slice.draw,
                               slice.stop_tokens));
    }
    return out;
  }

  /// The device of a dead process writes what it had in work. True if there was something.
  bool write_late(std::size_t idx) {
    auto& stage = stages_[idx];
    for (const auto& [at, value] : stage.late)
      stage.kv[at] = value;
    return !std::exchange(stage.late, {}).empty();
  }

  /// It has been cleared away.
  void forget_late() {
    for (auto& stage : stages_)
      stage.late.clear();
  }

  void pop() { pending_.pop_front(); }

  void clear() { pending_.clear(); }

  std::size_t num_stages() const { return stages_.size(); }

private:
  struct slot {
    request_id owner = 0;
    std::uint32_t position = 0;
    std::uint64_t value = 0;

    bool operator==(const slot&) const = default;
  };

  struct stage {
    std::vector<slot> kv;
    std::uint64_t last_step = 0;                    ///< steps up to here were computed before
    std::vector<std::pair<std::size_t, slot>> late; ///< by index
  };

  struct work {
    const micro_batch* batch;
    std::vector<std::vector<std::uint64_t>> hidden; ///< [stage][row], empty: not computed
  };

  std::size_t index_of(const sequence_slice& slice, std::uint32_t p) const {
    const auto page = static_cast<std::size_t>(slice.pages.at(p / lim_.page_tokens));
    return page * lim_.page_tokens + p % lim_.page_tokens;
  }

  std::vector<std::pair<std::size_t, slot>> writes_of(const stage& s, const work& w) const {
    std::vector<std::pair<std::size_t, slot>> all;
    for (const auto& slice : w.batch->sequences)
      for (std::uint32_t i = 0; i < slice.num_rows; ++i) {
        const auto at = index_of(slice, slice.first_position + i);
        all.emplace_back(at, s.kv.at(at));
      }
    return all;
  }

  void compute(stage& s, work& w, std::size_t idx) {
    const bool again = w.batch->step <= s.last_step;
    s.last_step = std::max(s.last_step, w.batch->step);
    std::size_t row = 0;
    for (const auto& slice : w.batch->sequences) {
      const auto at = [&](std::uint32_t p) -> slot& { return s.kv.at(index_of(slice, p)); };
      for (std::uint32_t i = 0; i < slice.num_rows; ++i, ++row) {
        const auto p = slice.first_position + i;
        const auto in =
          idx == 0 ? static_cast<std::uint64_t>(w.batch->tokens[row]) : w.hidden[idx - 1][row];
        const slot written{slice.request, p, mix(in, p)};
        ensure(!again || at(p) == written, "a replay writes the same bits");
        at(p) = written;
        std::uint64_t hidden = 0;
        for (std::uint32_t q = 0; q <= p; ++q) {
          const auto& read = at(q);
          ensure(read.owner == slice.request && read.position == q,
                 "a row reads only what its own sequence wrote");
          hidden = mix(hidden, read.value);
        }
        w.hidden[idx].push_back(hidden);
      }
    }
  }

  limits lim_;
  std::vector<stage> stages_;
  std::deque<work> pending_; ///< oldest first
};

} // namespace troupe::schedule
