#pragma once

#include "troupe/http/openai_fields.hpp"
#include "troupe/http/openai_request.hpp"

#include <string>
#include <vector>

namespace troupe::http {

/// What a chat may call.
struct tool_request {
  json shown;                     ///< `tools` as the template gets them; null: none
  std::vector<std::string> names; ///< of the functions in it
  bool parallel = true;           ///< more than one call an answer
};

/// Reads `tools`, `tool_choice` and `parallel_tool_calls`. With the choice "none" the model is
/// shown no tools. Refuses tools that are no functions, a choice that would need the answer to be
/// constrained ("required" or one function), and tools where the model's template shows none.
tool_request read_tools(field_reader& fields, const serving_model& served);

/// Reads `tool_calls` of an assistant's message, a list that is not empty: calls of functions,
/// their arguments as text or as an object.
json read_calls(field_reader& fields, const json& calls, const std::string& where);

} // namespace troupe::http
