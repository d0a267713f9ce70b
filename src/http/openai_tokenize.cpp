#include "troupe/http/openai_tokenize.hpp"

#include "troupe/http/openai_choice.hpp"
#include "troupe/http/openai_fields.hpp"
#include "troupe/http/openai_json.hpp"
#include "troupe/http/openai_messages.hpp"
#include "troupe/http/openai_tools.hpp"
#include "troupe/model/tokenizer.hpp"

#include <fmt/format.h>

#include <iterator>

namespace troupe::http {

namespace {

prompt_input read_input(field_reader& fields, const serving_model& served) {
  const bool open_answer = fields.boolean("add_generation_prompt", true);
  const bool has_prompt = fields.find("prompt") != nullptr;
  if (has_prompt && fields.find("messages"))
    fields.refuse_field("messages", "not allowed together with prompt");
  const bool add_special_tokens = fields.boolean("add_special_tokens", has_prompt);
  if (has_prompt) {
    const auto text = fields.text("prompt");
    return fields.failed() ? prompt_input{}
                           : text_prompt(fields, "prompt", *text, served, add_special_tokens);
  }
  if (!fields.find("messages"))
    fields.refuse_field("prompt", "missing, prompt or messages is expected");
  return fields.failed() ? prompt_input{}
                         : chat_prompt(fields, served, read_tools(fields, served), open_answer,
                                       add_special_tokens);
}

void append_model(std::string& out, const serving_model& served, std::int64_t started_s) {
  out += R"({"id":)";
  append_json_string(out, served.name);
  fmt::format_to(std::back_inserter(out),
                 R"(,"object":"model","created":{},"owned_by":"troupe","root":)", started_s);
  append_json_string(out, served.name);
  fmt::format_to(std::back_inserter(out), R"(,"parent":null,"max_model_len":{}}})",
                 served.max_context);
}

} // namespace

answered<std::string> tokenize(std::string_view body, const serving_model& served) {
  const auto object = parse_json_object(body);
  if (!object)
    return tl::unexpected<refusal>(object.error());
  field_reader fields(*object);
  check_model_name(fields, served);
  const bool with_strings = fields.boolean("return_token_strs", false);
  const prompt_input input = read_input(fields, served);
  if (fields.failed())
    return fields.failure();
  std::string out = fmt::format(R"({{"count":{},"max_model_len":{},"tokens":)", input.tokens.size(),
                                served.max_context);
  append_ids(out, input.tokens);
  out += R"(,"token_strs":)";
  if (with_strings) {
    for (std::size_t i = 0; i < input.tokens.size(); ++i) {
      out += i == 0 ? '[' : ',';
      append_json_string(out, served.tokenizer->token_bytes(input.tokens[i]));
    }
    out += input.tokens.empty() ? "[]" : "]";
  } else {
    out += "null";
  }
  return out + '}';
}

answered<std::string> detokenize(std::string_view body, const serving_model& served) {
  const auto object = parse_json_object(body);
  if (!object)
    return tl::unexpected<refusal>(object.error());
  field_reader fields(*object);
  check_model_name(fields, served);
  if (!fields.find("tokens"))
    fields.refuse_field("tokens", "missing, a list of token ids is expected");
  const auto tokens = fields.token_ids("tokens", served.tokenizer->vocab_size());
  std::string out = R"({"prompt":)";
  if (!fields.failed()) {
    if (const auto text = served.tokenizer->decode(tokens, false))
      append_json_string(out, *text);
    else
      fields.refuse_field("tokens", text.error().cause, text.error().code);
  }
  if (fields.failed())
    return fields.failure();
  return out + '}';
}

std::string models_body(const serving_model& served, std::int64_t started_s) {
  std::string out = R"({"object":"list","data":[)";
  append_model(out, served, started_s);
  return out + "]}";
}

answered<std::string> model_body(std::string_view name, const serving_model& served,
                                 std::int64_t started_s) {
  if (name != served.name)
    return refuse(error_code::not_found, "model",
                  fmt::format("\"{}\" does not exist (served: \"{}\")", name, served.name),
                  "model_not_found");
  std::string out;
  append_model(out, served, started_s);
  return out;
}

} // namespace troupe::http
