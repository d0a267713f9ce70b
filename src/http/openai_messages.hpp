#pragma once

#include "troupe/http/openai_fields.hpp"
#include "troupe/http/openai_request.hpp"

#include <cstdint>
#include <optional>
#include <string>

namespace troupe::http {

/// Refuses the name of any other model with not_found; none at all means the one that is served.
void check_model_name(field_reader& fields, const serving_model& served);

struct tool_request;

/// Reads the field `messages` into a list as chat templates take it: {role, content, name,
/// reasoning_content, tool_call_id, tool_calls}, where they are given. The role developer counts
/// as system; content is a string or a list of text parts, which are joined by line breaks.
/// Refuses empty lists, unknown roles and parts that are not text.
json read_messages(field_reader& fields);

/// Reads `messages` and `chat_template_kwargs`, renders them with the tools and encodes the text;
/// with `open_answer` it ends where the assistant's answer begins. A conversation that the
/// template refuses is the client's fault. `unix_s`: see parse_chat_request.
prompt_input chat_prompt(field_reader& fields, const serving_model& served,
                         const tool_request& tools, bool open_answer, bool add_special_tokens,
                         std::optional<std::int64_t> unix_s = {});

/// Encodes text as the client wrote it. Notes failures under `name`.
prompt_input text_prompt(field_reader& fields, const std::string& name, const std::string& text,
                         const serving_model& served, bool add_special_tokens);

} // namespace troupe::http
