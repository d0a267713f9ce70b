#include "troupe/http/answer_replay.hpp"

#include "troupe/model/tokenizer.hpp"

#include <charconv>

#include <fmt/format.h>

namespace troupe::http {

namespace {

std::optional<std::uint64_t> read_hex(std::string_view text) {
  std::uint64_t value = 0;
  const auto [end, failed] = std::from_chars(text.data(), text.data() + text.size(), value, 16);
  if (failed != std::errc{} || end != text.data() + text.size())
    return std::nullopt;
  return value;
}

const char* word_for(schedule::call_state state) {
  switch (state) {
  case schedule::call_state::in_progress: return "in_progress";
  case schedule::call_state::completed: return "completed";
  case schedule::call_state::failed: return "failed";
  }
  return "unknown";
}

} // namespace

std::string answer_id(std::uint64_t call) {
  return fmt::format("{:x}-{:x}", call >> call_bits, call & ((std::uint64_t{1} << call_bits) - 1));
}

std::optional<std::uint64_t> call_of_answer(std::string_view id) {
  for (const std::string_view prefix : {"chatcmpl-", "cmpl-"})
    if (id.starts_with(prefix)) {
      id.remove_prefix(prefix.size());
      break;
    }
  const auto dash = id.find('-');
  if (dash == std::string_view::npos)
    return std::nullopt;
  const auto incarnation = read_hex(id.substr(0, dash));
  const auto number = read_hex(id.substr(dash + 1));
  if (!incarnation || !number || *incarnation >> (64 - call_bits) != 0 || *number >> call_bits != 0)
    return std::nullopt;
  return *incarnation << call_bits | *number;
}

answered<response_builder> rebuild(const schedule::logged_call& call, const serving_model& served,
                                   std::optional<bool> stream) {
  auto parsed = call.what.chat ? parse_chat_request(call.what.body, served, call.what.seed,
                                                    call.what.created_ms / 1000)
                               : parse_text_request(call.what.body, served, call.what.seed);
  if (!parsed)
    return tl::unexpected<refusal>(parsed.error());
  if (parsed->num_choices() != call.choices.size())
    return tl::unexpected<refusal>(
      refusal{fail(error_code::internal, "a logged request reads differently now").value()});
  if (stream)
    parsed->stream = *stream;
  answer_identity identity;
  identity.id = answer_id(call.what.id);
  identity.model = served.name;
  identity.created_s = call.what.created_ms / 1000;
  identity.first_id = call.what.first_request;
  return response_builder(std::move(*parsed), *served.tokenizer, std::move(identity));
}

void replay(const schedule::logged_call& call, response_builder& builder, std::string& out) {
  schedule::token_event event;
  for (std::uint32_t c = 0; c < call.choices.size(); ++c) {
    const auto& choice = call.choices[c];
    event.request = call.what.first_request + c;
    event.has_token = true;
    event.finish = schedule::finish_reason::none;
    event.is_prompt = true;
    for (const auto& [position, token] : choice.prompt_scores) {
      event.token_index = position;
      event.token = token;
      builder.on_event(event, out);
    }
    event.is_prompt = false;
    event.token = {};
    const auto num_tokens = static_cast<std::uint32_t>(choice.tokens.size());
    for (event.token_index = 0; event.token_index < num_tokens; ++event.token_index) {
      if (!choice.scores.empty())
        event.token = choice.scores[event.token_index];
      event.token.token = choice.tokens[event.token_index];
      if (event.token_index + 1 == num_tokens && !choice.finished_bare)
        event.finish = choice.finish;
      builder.on_event(event, out);
    }
    if (choice.finished_bare) {
      event.has_token = false;
      event.token = {};
      event.finish = choice.finish;
      builder.on_event(event, out);
    }
  }
}

std::vector<schedule::request> requests_to_resume(const schedule::logged_call& call,
                                                  const response_builder& builder,
                                                  schedule::time_point deadline) {
  auto all = to_schedule(builder.request(), call.what.first_request, deadline);
  std::vector<schedule::request> rest;
  for (std::uint32_t c = 0; c < call.choices.size(); ++c) {
    if (builder.ended(c))
      continue;
    all[c].generated = call.choices[c].tokens;
    all[c].resumed = true;
    rest.push_back(std::move(all[c]));
  }
  return rest;
}

answered<std::string> response_body(const schedule::logged_call& call,
                                    const serving_model& served) {
  auto builder = rebuild(call, served, false);
  if (!builder)
    return tl::unexpected<refusal>(builder.error());
  std::string answer;
  replay(call, *builder, answer);
  if (!builder->done())
    builder->write_so_far(answer);
  auto body = fmt::format(R"({{"status":"{}",)", word_for(call.state));
  if (call.state == schedule::call_state::failed) {
    const auto reply = error_response(call.why).body; // {"error":{...}}
    body.append(reply, 1, reply.size() - 2);
    body += ',';
  }
  return body.append(answer, 1);
}

} // namespace troupe::http
