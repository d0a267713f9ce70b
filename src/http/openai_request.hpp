#pragma once

#include "troupe/http/openai_error.hpp"
#include "troupe/model/tool_call_parser.hpp"
#include "troupe/schedule/types.hpp"

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace troupe::model {
class chat_renderer;
class tokenizer;
} // namespace troupe::model

namespace troupe::http {

/// What the parser needs to know of the model that is served. Any number of
/// threads may parse with one of these.
struct serving_model {
  std::string name;                 ///< the name that clients have to ask for
  std::uint32_t max_context = 2048; ///< positions of one sequence: prompt and answer
  std::int32_t vocab_size = 0;
  std::vector<std::int32_t> eos_tokens;
  schedule::sampling defaults;      ///< of generation_config.json; its seed is not used
  std::uint32_t max_choices = 1024; ///< prompts times n of one HTTP request

  const model::tokenizer* tokenizer = nullptr; ///< outlives this object
  const model::chat_renderer* chat = nullptr;  ///< outlives it too; null: the model cannot chat
};

/// One prompt of a request.
struct prompt_input {
  std::vector<std::int32_t> tokens;
  std::optional<std::string> text;    ///< as the client wrote it; none for token ids
  std::uint32_t num_added_tokens = 0; ///< leading tokens that are not in the text (BOS)
  std::uint32_t max_tokens = 16;
};

/// A valid request for completions, every default filled in.
struct completion_request {
  bool chat = false;
  std::vector<prompt_input> prompts;
  std::uint32_t n = 1; ///< choices a prompt
  std::uint32_t min_tokens = 0;
  schedule::sampling draw;       ///< the seed is that of choice 0; choice i draws with seed + i
  std::vector<std::string> stop; ///< strings that end the text
  std::vector<std::int32_t> stop_tokens;    ///< tokens that end it: end of text and stop_token_ids
  std::vector<std::int32_t> stop_token_ids; ///< those among them that the client asked for
  std::int32_t num_logprobs = -1;           ///< -1: none; else how many of the best to report
  std::int32_t num_prompt_logprobs = -1;    ///< the same for the prompt_logprobs field
  bool stream = false;
  bool include_usage = false;
  bool echo = false;
  bool score_only = false; ///< echo with max_tokens 0: the one token that is drawn is not shown
  bool skip_special_tokens = true;
  bool include_stop = false; ///< the stop string stays in the text
  bool return_token_ids = false;
  bool tokens_as_ids = false; ///< logprobs name tokens "token_id:123"
  bool include_reasoning = true;
  bool split_reasoning = false;        ///< the answer may begin with reasoning, which is told apart
  bool reasoning_open = true;          ///< the prompt has begun it
  std::vector<std::string> tool_names; ///< what the model may call; empty: nothing
  std::uint32_t max_calls = 0;         ///< calls after which a choice ends; 0: any number
  model::tool_syntax calls_as = model::tool_syntax::none; ///< how it writes calls

  std::uint32_t num_choices() const { return static_cast<std::uint32_t>(prompts.size()) * n; }
};

/// Reads the body of POST /v1/chat/completions. `random_seed` is used if the client sends none;
/// `unix_s` is the time for templates that write the date (none: now). With both given, the same
/// body is read the same at any time.
/// Errors: invalid_request (the field, the offending value and what is allowed), not_found (another
/// model's name), too_large (prompt over the context, too many choices). Pure, any thread.
answered<completion_request> parse_chat_request(std::string_view body, const serving_model& served,
                                                std::uint64_t random_seed,
                                                std::optional<std::int64_t> unix_s = {});

/// The same for POST /v1/completions.
answered<completion_request> parse_text_request(std::string_view body, const serving_model& served,
                                                std::uint64_t random_seed);

/// One scheduler request a choice, prompts in order and the n choices of a prompt together:
/// choice i has the id first_id + i and the seed draw.seed + i. Pure.
std::vector<schedule::request> to_schedule(const completion_request& r,
                                           schedule::request_id first_id,
                                           schedule::time_point deadline);

} // namespace troupe::http
