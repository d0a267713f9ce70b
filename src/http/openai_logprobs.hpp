#pragma once

#include "troupe/http/openai_request.hpp"
#include "troupe/schedule/types.hpp"

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace troupe::model {
class tokenizer;
}

namespace troupe::http {

/// How logprobs name a token: by its text, or "token_id:123".
class token_namer {
public:
  token_namer(const model::tokenizer& tokenizer, bool as_ids)
    : tokenizer_(&tokenizer), as_ids_(as_ids) {}

  /// Appends the name as a JSON string. Bytes that are no characters become U+FFFD.
  void append_name(std::string& out, std::int32_t token) const;
  /// Appends the token's bytes as a JSON list of numbers.
  void append_bytes(std::string& out, std::int32_t token) const;
  /// Characters that begin in the token's bytes.
  std::uint32_t num_characters(std::int32_t token) const;

private:
  const model::tokenizer* tokenizer_;
  bool as_ids_;
};

/// Collects the logprobs of one choice and writes them in OpenAI's two shapes: for chats
/// {"content": [{token, logprob, bytes, top_logprobs}]}, for completions the parallel lists
/// {text_offset, token_logprobs, tokens, top_logprobs}, where the map of each position also holds
/// the token itself, as in vLLM. Offsets count characters of the choice's text.
class logprob_list {
public:
  logprob_list(token_namer namer, bool chat, std::int32_t num_best)
    : namer_(namer), chat_(chat), num_best_(static_cast<std::size_t>(num_best)) {}

  /// Adds a token; `visible` is false for one that is not in the text.
  void add(const schedule::output_token& token, bool visible);
  /// Adds a token that nothing predicts: the first of a prompt.
  void add_unscored(std::int32_t token, bool visible);

  bool empty() const { return count_ == 0; }
  /// Appends the object and forgets the tokens; offsets go on where they were.
  void write(std::string& out);

private:
  void begin_entry(std::int32_t token, bool visible);
  void add_chat_entry(const schedule::output_token& token);
  void add_best(const schedule::output_token& token);

  token_namer namer_;
  bool chat_;
  std::size_t num_best_;
  std::size_t count_ = 0;
  std::uint64_t offset_ = 0;
  std::string entries_; ///< of chats
  std::string tokens_;
  std::string logprobs_;
  std::string best_;
  std::string offsets_;
};

/// Appends vLLM's `prompt_logprobs`: a list with null for the first token and for each other one
/// {"id": {"logprob", "rank", "decoded_token"}} of the token itself and of the best ones. The rank
/// is null for a token that is not among the best. `scored[i]` belongs to `prompt[i]`.
void append_prompt_logprobs(std::string& out, std::span<const std::int32_t> prompt,
                            std::span<const schedule::output_token> scored, std::int32_t num_best,
                            const token_namer& namer);

} // namespace troupe::http
