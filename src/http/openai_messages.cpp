#include "troupe/http/openai_messages.hpp"

#include "troupe/http/openai_tools.hpp"
#include "troupe/model/chat_template.hpp"
#include "troupe/model/tokenizer.hpp"

#include <fmt/format.h>

#include <array>

namespace troupe::http {

namespace {

std::string read_parts(field_reader& fields, const json& parts, const std::string& where) {
  std::string text;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const json& part = parts[i];
    const std::string at = fmt::format("{}[{}]", where, i);
    if (i > 0)
      text += '\n';
    if (part.is_string()) {
      text += part.get_ref<const std::string&>();
      continue;
    }
    if (!part.is_object()) {
      fields.refuse_field(at, show(part) + " is not a text part");
      return {};
    }
    const auto type = part.find("type");
    if (type != part.end() && *type != "text") {
      fields.refuse_field(at + ".type", show(*type) + " is not supported (allowed: \"text\")");
      return {};
    }
    const auto content = part.find("text");
    if (content == part.end() || !content->is_string()) {
      fields.refuse_field(at + ".text", content == part.end()
                                          ? "missing, a string is expected"
                                          : show(*content) + " is not a string");
      return {};
    }
    text += content->get_ref<const std::string&>();
  }
  return text;
}

std::string read_role(field_reader& fields, const json& message, const std::string& where) {
  constexpr std::array<std::string_view, 4> known{"system", "user", "assistant", "tool"};
  const auto role = message.find("role");
  if (role == message.end()) {
    fields.refuse_field(where + ".role", "missing");
    return {};
  }
  if (role->is_string()) {
    const auto& name = role->get_ref<const std::string&>();
    if (name == "developer")
      return "system";
    for (const std::string_view k : known)
      if (name == k)
        return name;
  }
  fields.refuse_field(where + ".role",
                      show(*role)
                        + " is unknown (allowed: system, developer, user, assistant, tool)");
  return {};
}

/// Copies a field that has to be a string, unless it is absent.
void copy_text(field_reader& fields, const json& message, const char* name,
               const std::string& where, json& turn) {
  const auto value = message.find(name);
  if (value == message.end() || value->is_null())
    return;
  if (!value->is_string())
    fields.refuse_field(fmt::format("{}.{}", where, name), show(*value) + " is not a string");
  turn[name] = *value;
}

json read_message(field_reader& fields, const json& message, const std::string& where) {
  json turn;
  if (!message.is_object()) {
    fields.refuse_field(where, show(message) + " is not an object with role and content");
    return turn;
  }
  turn["role"] = read_role(fields, message, where);
  const bool is_assistant = turn["role"] == "assistant";
  const auto calls = message.find("tool_calls");
  const bool has_calls = calls != message.end() && !calls->is_null() && !calls->empty();
  if (has_calls && !is_assistant)
    fields.refuse_field(where + ".tool_calls", "only the assistant calls tools");
  const auto content = message.find("content");
  if (has_calls && (content == message.end() || content->is_null()))
    turn["content"] = nullptr;
  else if (content == message.end() || content->is_null())
    fields.refuse_field(where + ".content",
                        "missing, a string or a list of text parts is expected");
  else if (content->is_string())
    turn["content"] = content->get_ref<const std::string&>();
  else if (content->is_array())
    turn["content"] = read_parts(fields, *content, where + ".content");
  else
    fields.refuse_field(where + ".content",
                        show(*content) + " is neither a string nor a list of text parts");
  copy_text(fields, message, "name", where, turn);
  if (is_assistant)
    copy_text(fields, message, "reasoning_content", where, turn);
  if (turn["role"] == "tool")
    copy_text(fields, message, "tool_call_id", where, turn);
  // An empty list, which clients send back, is none: templates ask whether there is a list.
  if (has_calls)
    turn["tool_calls"] = read_calls(fields, *calls, where + ".tool_calls");
  return turn;
}

} // namespace

void check_model_name(field_reader& fields, const serving_model& served) {
  const auto name = fields.text("model");
  if (name && *name != served.name)
    fields.refuse_field("model",
                        fmt::format("{} does not exist (served: \"{}\")", show(*name), served.name),
                        error_code::not_found, "model_not_found");
}

json read_messages(field_reader& fields) {
  auto turns = json::array();
  const json* messages = fields.find("messages");
  if (!messages) {
    fields.refuse_field("messages", "missing, a list of messages is expected");
  } else if (!messages->is_array()) {
    fields.refuse_field("messages", show(*messages) + " is not a list of messages");
  } else if (messages->empty()) {
    fields.refuse_field("messages", "the list is empty, at least one message is expected");
  } else {
    for (std::size_t i = 0; i < messages->size() && !fields.failed(); ++i)
      turns.push_back(read_message(fields, (*messages)[i], fmt::format("messages[{}]", i)));
  }
  return turns;
}

prompt_input text_prompt(field_reader& fields, const std::string& name, const std::string& text,
                         const serving_model& served, bool add_special_tokens) {
  prompt_input prompt;
  model::encode_options options;
  options.add_bos = add_special_tokens && served.tokenizer->adds_bos();
  auto tokens = served.tokenizer->encode(text, options);
  if (!tokens) {
    fields.refuse_field(name, tokens.error().cause, tokens.error().code);
    return prompt;
  }
  prompt.tokens = std::move(*tokens);
  prompt.text = text;
  prompt.num_added_tokens = options.add_bos ? 1 : 0;
  return prompt;
}

prompt_input chat_prompt(field_reader& fields, const serving_model& served,
                         const tool_request& tools, bool open_answer, bool add_special_tokens,
                         std::optional<std::int64_t> unix_s) {
  const auto turns = read_messages(fields);
  json extra;
  if (const json* given = fields.find("chat_template_kwargs")) {
    if (given->is_object())
      extra = *given;
    else
      fields.refuse_field("chat_template_kwargs", show(*given) + " is not an object");
  }
  if (!served.chat)
    fields.refuse_field("messages", "the model has no chat template, use /v1/completions");
  if (fields.failed())
    return {};
  const auto text = served.chat->render_chat(turns, tools.shown, open_answer, extra, unix_s);
  if (!text) {
    fields.refuse_field("messages", text.error().cause, text.error().code);
    return {};
  }
  return text_prompt(fields, "messages", *text, served, add_special_tokens);
}

} // namespace troupe::http
