#include "troupe/http/openai_choice.hpp"

#include "troupe/http/openai_json.hpp"

#include <fmt/format.h>

#include <iterator>

namespace troupe::http {

namespace {

/// Both names that clients look for: vLLM's and DeepSeek's.
void append_reasoning(std::string& out, std::string_view reasoning) {
  out += R"("reasoning":)";
  append_json_string(out, reasoning);
  out += R"(,"reasoning_content":)";
  append_json_string(out, reasoning);
}

void append_call_id(std::string& out, const choice_content& c, const tool_call& call) {
  out += R"("id":)";
  append_json_string(out, fmt::format("{}{}", c.call_prefix, call.index));
  out += R"(,"type":"function",)";
}

/// A list of calls, whole or, in a delta, what is new of them.
void append_calls(std::string& out, const choice_content& c, bool delta) {
  out += R"("tool_calls":[)";
  for (const tool_call& call : c.calls) {
    if (&call != &c.calls.front())
      out += ',';
    out += '{';
    if (delta)
      fmt::format_to(std::back_inserter(out), R"("index":{},)", call.index);
    if (!call.name.empty()) {
      append_call_id(out, c, call);
      out += R"("function":{"name":)";
      append_json_string(out, call.name);
      out += ',';
    } else {
      out += R"("function":{)";
    }
    out += R"("arguments":)";
    append_json_string(out, call.arguments);
    out += "}}";
  }
  out += ']';
}

void append_delta(std::string& out, const choice_content& c) {
  out += R"("delta":{)";
  if (c.with_role)
    out += R"("role":"assistant","content":)";
  else if (!c.text.empty())
    out += R"("content":)";
  if (c.with_role || !c.text.empty())
    append_json_string(out, c.text);
  if (!c.reasoning.empty()) {
    if (out.back() != '{')
      out += ',';
    append_reasoning(out, c.reasoning);
  }
  if (!c.calls.empty()) {
    if (out.back() != '{')
      out += ',';
    append_calls(out, c, true);
  }
  out += '}';
}

void append_message(std::string& out, const choice_content& c) {
  out += R"("message":{"role":"assistant","content":)";
  if (c.text.empty() && !c.calls.empty())
    out += "null";
  else
    append_json_string(out, c.text);
  out += R"(,"refusal":null,)";
  if (c.reasoning.empty())
    out += R"("reasoning":null,"reasoning_content":null)";
  else
    append_reasoning(out, c.reasoning);
  out += ',';
  append_calls(out, c, false);
  out += '}';
}

} // namespace

void append_ids(std::string& out, std::span<const std::int32_t> ids) {
  out += '[';
  for (std::size_t i = 0; i < ids.size(); ++i)
    fmt::format_to(std::back_inserter(out), "{}{}", i > 0 ? "," : "", ids[i]);
  out += ']';
}

void append_choice(std::string& out, choice_shape shape, const choice_content& c) {
  fmt::format_to(std::back_inserter(out), R"({{"index":{},)", c.index);
  switch (shape) {
  case choice_shape::chat_delta: append_delta(out, c); break;
  case choice_shape::chat_message: append_message(out, c); break;
  case choice_shape::text:
    out += R"("text":)";
    append_json_string(out, c.text);
    break;
  }
  out += R"(,"logprobs":)";
  if (c.logprobs && !c.logprobs->empty())
    c.logprobs->write(out);
  else
    out += "null";
  out += R"(,"finish_reason":)";
  if (c.finish_reason.empty()) {
    out += "null";
  } else {
    append_json_string(out, c.finish_reason);
    out.append(R"(,"stop_reason":)").append(c.stop_reason.empty() ? "null" : c.stop_reason);
  }
  if (c.with_token_ids) {
    out += R"(,"token_ids":)";
    append_ids(out, c.token_ids);
  }
  if (c.with_prompt_ids) {
    out += R"(,"prompt_token_ids":)";
    append_ids(out, c.prompt_ids);
  }
}

} // namespace troupe::http
