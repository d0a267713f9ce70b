#include "troupe/model/chat_tools.hpp"

#include "troupe/model/json_shape.hpp"

#include <fmt/format.h>

#include <string>

namespace troupe::model {

using nlohmann::ordered_json;

namespace {

/// {"function": {"arguments"}} of a call, or without the wrapping; null where there are none.
template <class Json>
Json* arguments_of(Json& call) {
  if (!call.is_object())
    return nullptr;
  const auto inner = call.find("function");
  Json& function = inner != call.end() && inner->is_object() ? *inner : call;
  const auto found = function.find("arguments");
  return found == function.end() ? nullptr : &*found;
}

bool has_calls(const ordered_json& message) {
  const auto calls = message.find("tool_calls");
  return calls != message.end() && calls->is_array() && !calls->empty();
}

/// Gives a turn of calls alone the content, or none, that the template takes.
void fit_content(ordered_json& message, const call_style& style) {
  const auto content = message.find("content");
  const bool is_empty = content != message.end() && *content == "";
  const bool is_none = content == message.end() || content->is_null();
  if (!(is_empty && !style.empty) && !is_none)
    return;
  if (style.absent)
    message.erase("content");
  else if (style.null)
    message["content"] = nullptr;
  else if (style.empty)
    message["content"] = "";
}

expected<ordered_json> read_object(const std::string& text) {
  if (text.empty()) // some clients keep a call without arguments so
    return ordered_json::object();
  const auto shape = shape_of_json(text);
  if (shape.depth <= max_json_depth && shape.most_members <= max_json_members) {
    auto object = ordered_json::parse(text, nullptr, false);
    if (object.is_object())
      return object;
  }
  return fail(error_code::invalid_request, "the arguments are not a JSON object",
              "the model's chat template takes only calls whose arguments are one");
}

/// As Python's json.dumps(value, ensure_ascii=False): what models have been trained on.
void append_spaced(std::string& out, const ordered_json& value) {
  bool first = true;
  if (value.is_object()) {
    out += '{';
    for (const auto& [key, item] : value.items()) {
      out.append(first ? "" : ", ").append(ordered_json(key).dump()).append(": ");
      append_spaced(out, item);
      first = false;
    }
    out += '}';
  } else if (value.is_array()) {
    out += '[';
    for (const auto& item : value) {
      out.append(first ? "" : ", ");
      append_spaced(out, item);
      first = false;
    }
    out += ']';
  } else {
    out += value.dump();
  }
}

} // namespace

expected<std::optional<ordered_json>> with_fitting_calls(const ordered_json& messages,
                                                         const call_style& style) {
  std::optional<ordered_json> changed;
  for (std::size_t i = 0; i < messages.size(); ++i) {
    if (!has_calls(messages[i]))
      continue;
    if (!changed)
      changed = messages;
    auto& message = (*changed)[i];
    fit_content(message, style);
    auto& calls = message["tool_calls"];
    for (std::size_t c = 0; c < calls.size(); ++c) {
      auto* given = arguments_of(calls[c]);
      if (given == nullptr)
        continue;
      if (style.objects && given->is_string()) {
        auto object = read_object(given->get_ref<const std::string&>());
        if (!object) {
          object.error().cause =
            fmt::format("messages[{}].tool_calls[{}]: {}", i, c, object.error().cause);
          return tl::unexpected(std::move(object.error()));
        }
        *given = std::move(*object);
      } else if (!style.objects && given->is_object()) {
        std::string text;
        append_spaced(text, *given);
        *given = std::move(text);
      }
    }
  }
  return changed;
}

namespace tool_trial {

ordered_json tools() {
  return ordered_json::parse(R"([{"type": "function", "function": {"name": "shown_tool",
    "description": "x", "parameters": {"type": "object", "properties": {}}}}])");
}

ordered_json question() {
  return ordered_json::parse(R"([{"role": "user", "content": "x"}])");
}

ordered_json call(const call_style& style) {
  auto messages = question();
  messages.push_back(ordered_json::parse(R"({"role": "assistant", "tool_calls": [
    {"id": "call_0", "type": "function", "function": {"name": "called_tool",
     "arguments": "{\"called_with\": 1}"}}]})"));
  fit_content(messages.back(), style);
  return messages;
}

bool shows_tool(std::string_view rendered) {
  return rendered.find("shown_tool") != std::string_view::npos;
}

bool shows_arguments(std::string_view rendered) {
  return rendered.find(R"("called_with":)") != std::string_view::npos;
}

tool_syntax syntax_of(std::string_view rendered) {
  const auto contains = [&](std::string_view text) {
    return rendered.find(text) != std::string_view::npos;
  };
  if (contains("<｜tool▁call▁begin｜>"))
    return tool_syntax::deepseek;
  if (contains("<tool_call>"))
    return tool_syntax::hermes;
  if (contains(R"({"name": "called_tool", "parameters":)"))
    return tool_syntax::llama;
  return tool_syntax::none;
}

} // namespace tool_trial
} // namespace troupe::model
