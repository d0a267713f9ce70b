#pragma once

#include "troupe/http/openai_error.hpp"
#include "troupe/http/openai_request.hpp"

#include <cstdint>
#include <string>
#include <string_view>

namespace troupe::http {

/// Answers POST /tokenize as vLLM does: {"prompt"} or {"messages", "add_generation_prompt"}, with
/// "add_special_tokens" and "return_token_strs", gives {"count", "max_model_len", "tokens",
/// "token_strs"}. Returns the body. Errors as of parse_chat_request. Pure, any thread.
answered<std::string> tokenize(std::string_view body, const serving_model& served);

/// Answers POST /detokenize: {"tokens"} gives {"prompt"}, special tokens written out. The same.
answered<std::string> detokenize(std::string_view body, const serving_model& served);

/// Body of GET /v1/models. `started_s` is the Unix time since which the model is served.
std::string models_body(const serving_model& served, std::int64_t started_s);

/// Body of GET /v1/models/NAME. Errors: not_found for any other name.
answered<std::string> model_body(std::string_view name, const serving_model& served,
                                 std::int64_t started_s);

} // namespace troupe::http
