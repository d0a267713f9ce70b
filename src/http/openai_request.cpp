#include "troupe/http/openai_request.hpp"

#include "troupe/http/openai_fields.hpp"
#include "troupe/http/openai_messages.hpp"
#include "troupe/http/openai_tools.hpp"
#include "troupe/model/chat_template.hpp"
#include "troupe/model/text_stream.hpp"
#include "troupe/model/tokenizer.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <span>

namespace troupe::http {

namespace {

constexpr std::int64_t kMaxChoicesPerPrompt = 16;
constexpr std::int64_t kMaxReportedLogprobs = 20;
constexpr std::size_t kMaxStopStrings = 16;
constexpr std::size_t kMaxStopBytes = 1024;
constexpr std::uint32_t kDefaultTextTokens = 16; // OpenAI's default for /v1/completions
constexpr float kGreedyBelow = 1e-5F; // such temperatures overflow the logits: they mean greedy

/// A field that asks for what we cannot do, and the values that ask for nothing.
struct unsupported_field {
  const char* name;
  const char* neutral; ///< JSON list of harmless values; null always is
};

constexpr unsupported_field kUnsupported[] = {
  {"frequency_penalty", "[0]"},
  {"presence_penalty", "[0]"},
  {"repetition_penalty", "[1]"},
  {"length_penalty", "[1]"},
  {"logit_bias", "[{}]"},
  {"functions", "[[]]"},
  {"function_call", R"(["none", "auto"])"},
  {"response_format", R"([{"type": "text"}])"},
  {"modalities", R"([["text"]])"},
  {"audio", "[]"},
  {"prediction", "[]"},
  {"web_search_options", "[]"},
  {"suffix", R"([""])"},
  {"use_beam_search", "[false]"},
  {"bad_words", "[[]]"},
  {"allowed_token_ids", "[]"},
  {"logits_processors", "[[]]"},
  {"truncate_prompt_tokens", "[]"},
  {"prompt_embeds", "[]"},
  {"structured_outputs", "[]"},
  {"guided_json", "[]"},
  {"guided_regex", "[]"},
  {"guided_choice", "[]"},
  {"guided_grammar", "[]"},
  {"chat_template", "[]"},
  {"continue_final_message", "[false]"},
  {"add_generation_prompt", "[true]"},
};

/// The same, of what only chats can do.
constexpr unsupported_field kUnsupportedOfText[] = {
  {"tools", "[[]]"},
  {"tool_choice", R"(["none", "auto"])"},
};

void refuse_unsupported(field_reader& fields, std::span<const unsupported_field> list) {
  for (const auto& [name, neutral] : list) {
    const json* value = fields.find(name);
    if (!value)
      continue;
    const json harmless = json::parse(neutral);
    if (std::find(harmless.begin(), harmless.end(), *value) == harmless.end())
      fields.refuse_field(name, show(*value) + " is not supported (leave the field out)");
  }
}

void read_sampling(field_reader& fields, const serving_model& served, std::uint64_t random_seed,
                   schedule::sampling& draw) {
  draw = served.defaults;
  draw.temperature =
    static_cast<float>(fields.number("temperature", 0.0, 2.0).value_or(draw.temperature));
  if (draw.temperature < kGreedyBelow)
    draw.temperature = 0.0F;
  draw.top_p = static_cast<float>(fields.number("top_p", 0.0, 1.0, true).value_or(draw.top_p));
  draw.min_p = static_cast<float>(fields.number("min_p", 0.0, 1.0).value_or(draw.min_p));
  constexpr std::int64_t most = std::numeric_limits<std::int32_t>::max();
  const auto top_k = fields.integer("top_k", -1, most).value_or(draw.top_k);
  draw.top_k = static_cast<std::int32_t>(std::max<std::int64_t>(top_k, 0));
  draw.seed = random_seed;
  if (const json* seed = fields.find("seed"); seed && seed->is_number_unsigned())
    draw.seed = seed->get<std::uint64_t>(); // also the upper half, which is no int64
  else if (const auto n = fields.integer("seed", std::numeric_limits<std::int64_t>::min(),
                                         std::numeric_limits<std::int64_t>::max()))
    draw.seed = static_cast<std::uint64_t>(*n);
}

void read_stop(field_reader& fields, const serving_model& served, completion_request& r) {
  if (const json* stop = fields.find("stop")) {
    const json list = stop->is_string() ? json::array({*stop}) : *stop;
    if (!list.is_array()) {
      fields.refuse_field("stop", show(*stop) + " is neither a string nor a list of strings");
      return;
    }
    if (list.size() > kMaxStopStrings)
      fields.refuse_field(
        "stop", fmt::format("{} strings (allowed: up to {})", list.size(), kMaxStopStrings));
    for (std::size_t i = 0; i < list.size() && !fields.failed(); ++i) {
      if (!list[i].is_string())
        fields.refuse_field("stop",
                            fmt::format("element {} is {}, not a string", i, show(list[i])));
      else if (const auto size = list[i].get_ref<const std::string&>().size();
               size == 0 || size > kMaxStopBytes)
        fields.refuse_field(
          "stop", fmt::format("string {} has {} bytes (allowed: 1 to {})", i, size, kMaxStopBytes));
      else
        r.stop.push_back(list[i].get<std::string>());
    }
  }
  if (!fields.boolean("ignore_eos", false))
    r.stop_tokens = served.eos_tokens;
  r.stop_token_ids = fields.token_ids("stop_token_ids", served.vocab_size);
  r.stop_tokens.insert(r.stop_tokens.end(), r.stop_token_ids.begin(), r.stop_token_ids.end());
}

void read_stream(field_reader& fields, completion_request& r) {
  r.stream = fields.boolean("stream", false);
  const json* options = fields.find("stream_options");
  if (!options)
    return;
  if (!options->is_object())
    return fields.refuse_field("stream_options", show(*options) + " is not an object");
  if (!r.stream)
    return fields.refuse_field("stream_options", "only allowed with \"stream\": true");
  field_reader inner(*options, "stream_options.");
  r.include_usage = inner.boolean("include_usage", false);
  if (inner.boolean("continuous_usage_stats", false))
    inner.refuse_field("continuous_usage_stats", "true is not supported (leave the field out)");
  if (inner.failed())
    fields.note(inner.failure().value());
}

void read_logprobs(field_reader& fields, completion_request& r) {
  if (r.chat) {
    const bool wanted = fields.boolean("logprobs", false);
    const auto best = fields.integer("top_logprobs", 0, kMaxReportedLogprobs);
    if (best.value_or(0) > 0 && !wanted)
      fields.refuse_field("top_logprobs",
                          fmt::format("{} is only allowed with \"logprobs\": true", *best));
    if (wanted)
      r.num_logprobs = static_cast<std::int32_t>(best.value_or(0));
  } else {
    r.num_logprobs =
      static_cast<std::int32_t>(fields.integer("logprobs", 0, kMaxReportedLogprobs).value_or(-1));
  }
  r.num_prompt_logprobs = static_cast<std::int32_t>(
    fields.integer("prompt_logprobs", 0, kMaxReportedLogprobs).value_or(-1));
  if (r.stream && r.num_prompt_logprobs >= 0)
    fields.refuse_field("prompt_logprobs", fmt::format("{} is not allowed with \"stream\": true",
                                                       r.num_prompt_logprobs));
}

void read_output(field_reader& fields, completion_request& r) {
  r.echo = fields.boolean("echo", false);
  if (r.chat && r.echo)
    fields.refuse_field("echo", "true is not supported for chats");
  r.skip_special_tokens = fields.boolean("skip_special_tokens", true);
  r.include_stop = fields.boolean("include_stop_str_in_output", false);
  r.return_token_ids = fields.boolean("return_token_ids", false);
  r.tokens_as_ids = fields.boolean("return_tokens_as_token_ids", false);
  r.include_reasoning = fields.boolean("include_reasoning", true);
}

void read_counts(field_reader& fields, completion_request& r) {
  r.n = static_cast<std::uint32_t>(fields.integer("n", 1, kMaxChoicesPerPrompt).value_or(1));
  const auto best_of = fields.integer("best_of", 1, std::numeric_limits<std::int32_t>::max());
  if (best_of && *best_of != r.n)
    fields.refuse_field(
      "best_of", fmt::format("{} is not supported (allowed: n, which is {})", *best_of, r.n));
}

/// Settles how many tokens each prompt may get, once the prompts are known.
void read_max_tokens(field_reader& fields, const serving_model& served, completion_request& r) {
  constexpr std::int64_t most = std::numeric_limits<std::int32_t>::max();
  const char* name = fields.find("max_completion_tokens") ? "max_completion_tokens" : "max_tokens";
  const auto asked = fields.integer(name, r.echo ? 0 : 1, most);
  const auto min_tokens = fields.integer("min_tokens", 0, most).value_or(0);
  r.min_tokens = static_cast<std::uint32_t>(min_tokens);
  r.score_only = asked == 0;
  for (std::size_t i = 0; i < r.prompts.size() && !fields.failed(); ++i) {
    prompt_input& prompt = r.prompts[i];
    const auto size = static_cast<std::int64_t>(prompt.tokens.size());
    const std::int64_t room = static_cast<std::int64_t>(served.max_context) - size;
    const std::string field = r.chat                 ? "messages"
                              : r.prompts.size() > 1 ? fmt::format("prompt[{}]", i)
                                                     : "prompt";
    if (size == 0)
      fields.refuse_field(field, "the prompt has no tokens, at least one is expected");
    else if (room < 1)
      fields.refuse_field(field,
                          fmt::format("the prompt has {} tokens, but the model's context is {} "
                                      "tokens (allowed: 1 to {})",
                                      size, served.max_context, served.max_context - 1),
                          error_code::too_large, "context_length_exceeded");
    else if (asked && *asked > room)
      fields.refuse_field(name,
                          fmt::format("{} is too large: the model's context is {} tokens and the "
                                      "prompt has {} (allowed: {} to {})",
                                      *asked, served.max_context, size, r.echo ? 0 : 1, room),
                          error_code::invalid_request, "context_length_exceeded");
    const std::int64_t fallback = r.chat ? room : std::min<std::int64_t>(kDefaultTextTokens, room);
    // A request that only scores its prompt still draws one token, which nobody sees.
    prompt.max_tokens =
      static_cast<std::uint32_t>(std::max<std::int64_t>(asked.value_or(fallback), 1));
    if (min_tokens > asked.value_or(fallback))
      fields.refuse_field("min_tokens", fmt::format("{} is more than {} (allowed: 0 to {})",
                                                    min_tokens, name, asked.value_or(fallback)));
  }
}

void check_num_choices(field_reader& fields, std::size_t num_prompts, const serving_model& served,
                       const completion_request& r) {
  if (num_prompts * r.n > served.max_choices)
    fields.refuse_field("prompt",
                        fmt::format("{} prompts times n = {} are too many (allowed: {} in all)",
                                    num_prompts, r.n, served.max_choices),
                        error_code::too_large);
}

prompt_input token_prompt(field_reader& fields, const std::string& name, const json& list,
                          const serving_model& served) {
  prompt_input prompt;
  if (const auto fault = read_token_ids(list, served.vocab_size, prompt.tokens))
    fields.refuse_field(name, *fault);
  return prompt;
}

void read_prompts(field_reader& fields, const serving_model& served, completion_request& r) {
  const bool add_special_tokens = fields.boolean("add_special_tokens", true);
  const json* prompt = fields.find("prompt");
  if (!prompt)
    return fields.refuse_field("prompt", "missing, a string or a list of token ids is expected");
  if (prompt->is_string()) {
    check_num_choices(fields, 1, served, r);
    r.prompts.push_back(text_prompt(fields, "prompt", prompt->get_ref<const std::string&>(), served,
                                    add_special_tokens));
    return;
  }
  if (!prompt->is_array())
    return fields.refuse_field(
      "prompt", show(*prompt) + " is neither a string nor a list of strings or token ids");
  if (prompt->empty())
    return fields.refuse_field("prompt", "the list is empty, at least one element is expected");
  if (prompt->front().is_number()) {
    check_num_choices(fields, 1, served, r);
    r.prompts.push_back(token_prompt(fields, "prompt", *prompt, served));
    return;
  }
  check_num_choices(fields, prompt->size(), served, r);
  for (std::size_t i = 0; i < prompt->size() && !fields.failed(); ++i) {
    const json& element = (*prompt)[i];
    const std::string name = fmt::format("prompt[{}]", i);
    if (element.is_string())
      r.prompts.push_back(text_prompt(fields, name, element.get_ref<const std::string&>(), served,
                                      add_special_tokens));
    else if (element.is_array())
      r.prompts.push_back(token_prompt(fields, name, element, served));
    else
      fields.refuse_field(name, show(element) + " is neither a string nor a list of token ids");
  }
}

answered<completion_request> parse_request(std::string_view body, const serving_model& served,
                                           std::uint64_t random_seed, bool chat,
                                           std::optional<std::int64_t> unix_s) {
  const auto object = parse_json_object(body);
  if (!object)
    return tl::unexpected<refusal>(object.error());
  field_reader fields(*object);
  completion_request r;
  r.chat = chat;
  check_model_name(fields, served);
  refuse_unsupported(fields, kUnsupported);
  if (!chat)
    refuse_unsupported(fields, kUnsupportedOfText);
  read_counts(fields, r);
  read_sampling(fields, served, random_seed, r.draw);
  read_stop(fields, served, r);
  read_stream(fields, r);
  read_logprobs(fields, r);
  read_output(fields, r);
  // The tokenizer is the expensive part: nothing is encoded for a request that is refused anyway.
  if (!fields.failed() && chat) {
    const bool add_special_tokens = fields.boolean("add_special_tokens", false);
    const tool_request tools = read_tools(fields, served);
    r.prompts.push_back(chat_prompt(fields, served, tools, true, add_special_tokens, unix_s));
    if (!fields.failed()) {
      const auto start = model::reasoning_after(*r.prompts.front().text);
      r.split_reasoning = served.tokenizer->added_token("</think>").has_value()
                          && start != model::reasoning_start::closed;
      r.reasoning_open = start == model::reasoning_start::open;
      r.tool_names = tools.names;
      r.max_calls = tools.parallel ? 0 : 1;
      r.calls_as = tools.names.empty() ? model::tool_syntax::none : served.chat->calls_as();
    }
  } else if (!fields.failed()) {
    read_prompts(fields, served, r);
  }
  if (!fields.failed())
    read_max_tokens(fields, served, r);
  if (fields.failed())
    return fields.failure();
  return r;
}

} // namespace

answered<completion_request> parse_chat_request(std::string_view body, const serving_model& served,
                                                std::uint64_t random_seed,
                                                std::optional<std::int64_t> unix_s) {
  return parse_request(body, served, random_seed, true, unix_s);
}

answered<completion_request> parse_text_request(std::string_view body, const serving_model& served,
                                                std::uint64_t random_seed) {
  return parse_request(body, served, random_seed, false, {});
}

std::vector<schedule::request> to_schedule(const completion_request& r,
                                           schedule::request_id first_id,
                                           schedule::time_point deadline) {
  std::vector<schedule::request> requests;
  requests.reserve(r.num_choices());
  for (const prompt_input& prompt : r.prompts) {
    for (std::uint32_t i = 0; i < r.n; ++i) {
      schedule::request q;
      const auto choice = static_cast<std::uint64_t>(requests.size());
      q.id = first_id + choice;
      q.prompt = prompt.tokens;
      q.draw = r.draw;
      q.draw.seed += choice;
      q.max_tokens = prompt.max_tokens;
      q.min_tokens = r.min_tokens;
      q.stop_tokens = r.stop_tokens;
      q.num_logprobs = r.num_logprobs;
      q.num_prompt_logprobs =
        std::max(r.num_prompt_logprobs, r.echo ? r.num_logprobs : std::int32_t{-1});
      q.deadline = deadline;
      requests.push_back(std::move(q));
    }
  }
  return requests;
}

} // namespace troupe::http
