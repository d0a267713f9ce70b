#pragma once

#include "troupe/http/openai_logprobs.hpp"

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace troupe::http {

/// The objects that a choice can be written as.
enum class choice_shape : std::uint8_t {
  chat_delta,   ///< of a chat.completion.chunk: only what is new
  chat_message, ///< of a chat.completion
  text,         ///< of a text_completion, streamed or whole
};

/// A call of a tool, or what is new of it.
struct tool_call {
  std::uint32_t index = 0;
  std::string name;      ///< chat_delta: empty once the call was named
  std::string arguments; ///< as the model wrote them
};

/// The content of one choice object. Views are used at once and not kept.
struct choice_content {
  std::uint32_t index = 0;
  bool with_role = false; ///< chat_delta: the first one, which names the assistant
  std::string_view text;
  std::string_view reasoning;
  std::span<const tool_call> calls;
  std::string_view call_prefix;     ///< of their ids; the index follows
  logprob_list* logprobs = nullptr; ///< null: none were asked for
  std::string_view finish_reason;   ///< empty: the choice goes on
  std::string_view stop_reason;     ///< JSON; empty counts as null
  bool with_token_ids = false;
  std::span<const std::int32_t> token_ids;
  bool with_prompt_ids = false; ///< text only: chats have them at the top
  std::span<const std::int32_t> prompt_ids;
};

/// Appends the object but for its closing brace, so that the caller can add fields. Takes the
/// tokens out of `logprobs`. Appends by hand: this runs for every token of every stream.
void append_choice(std::string& out, choice_shape shape, const choice_content& c);

/// Appends a JSON list of numbers.
void append_ids(std::string& out, std::span<const std::int32_t> ids);

} // namespace troupe::http
