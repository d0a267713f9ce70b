#pragma once

#include "harness.hpp"

#include <atomic>
#include <functional>
#include <string>
#include <thread>
#include <vector>

/// Conversations with known answers, and clients that stream them.
namespace troupe::process_tests {

/// One of the demo model's golden conversations.
struct conversation {
  std::string question;
  std::vector<std::int32_t> prompt;
  std::vector<std::int32_t> tokens;    ///< the greedy answer; the last one is the end of the text
  std::string text;                    ///< of the answer, with its reasoning
  std::string answer;                  ///< what follows the reasoning
  std::vector<double> prompt_logprobs; ///< of each prompt token but the first
  json top_logprobs;                   ///< of the first tokens: lists of [token, logprob]
};

/// All 48 of them (configs/models/troupe-mini/golden.json).
const std::vector<conversation>& golden();

/// The body of POST /v1/completions that streams the golden answer with its token ids.
json golden_request(const conversation& c);

/// What a client got from one stream.
struct stream_result {
  int status = 0;
  std::string id;                        ///< of the answer, if any of it came
  std::string problem;                   ///< empty if the stream was well formed to its end
  std::vector<std::int32_t> tokens;      ///< in the order of arrival
  std::vector<steady::time_point> times; ///< of each token
  std::string text;
  std::string finish;

  /// The first difference to a golden answer; empty if there is none.
  std::string difference(const conversation& c) const;
};

/// Streams one completion with return_token_ids to its end; `on_tokens` runs when one or more have
/// come and may leave by returning false. `key` goes as the Idempotency-Key. Any thread.
stream_result stream_completion(const std::string& endpoint, const json& request,
                                const std::function<bool(const stream_result&)>& on_tokens = {},
                                const std::string& key = {});

/// Runs all golden conversations at the same time, once; returns what went wrong, a line each.
/// A stream that stood still for seconds counts, though nothing was lost.
std::vector<std::string> run_golden_crowd(const std::string& endpoint);

/// The golden conversations, asked at the same time and again and again, a thread each.
class golden_load {
public:
  /// A time between two tokens of a stream.
  struct gap {
    steady::time_point begin;
    steady::time_point end;
  };

  /// Every `stride`-th conversation.
  explicit golden_load(std::string endpoint, std::size_t stride = 1);
  ~golden_load();

  /// Lets every conversation under way come to its end, 60 s at most, and joins.
  void finish();

  /// The longest gap that ended in (from, to]. Only after `finish`.
  steady::duration longest_gap(steady::time_point from, steady::time_point to) const;

  /// What went wrong, a line each. Only after `finish`.
  std::vector<std::string> problems() const;
  std::size_t num_conversations() const { return num_done_; }
  std::size_t num_tokens() const { return num_tokens_; }
  std::size_t num_streams() const { return clients_.size(); }

private:
  struct client {
    std::vector<gap> gaps;
    std::vector<std::string> problems;
    std::thread thread;
  };
  void converse(client& c, const conversation& talk);

  std::string endpoint_;
  std::atomic<bool> stopping_{false};
  std::atomic<std::size_t> num_done_{0};
  std::atomic<std::size_t> num_tokens_{0};
  std::vector<std::unique_ptr<client>> clients_;
};

/// Lines put together, for INFO.
std::string lines(const std::vector<std::string>& list);

} // namespace troupe::process_tests
