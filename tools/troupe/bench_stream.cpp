#include "bench_stream.hpp"

#include "troupe/http/client.hpp"
#include "troupe/http/sse.hpp"

#include <optional>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace troupe::tools::bench {

using namespace std::chrono_literals;
using nlohmann::json;

namespace {

constexpr http::client_timeouts stream_timeouts{5s, 60s};

constexpr auto prompt_text =
  "The harbour lay still before the morning wind, and the boats had not yet gone out. Seven "
  "fishermen sat on the wall and counted what the night had brought: 12 crates of herring, 3 of "
  "mackerel, one torn net. Who would mend it, asked the youngest, and how long would it take? The "
  "eldest laughed and said that a net is mended one knot after another, and that nobody had ever "
  "found a quicker way. So they began, and by the time the sun stood over the lighthouse they had "
  "tied 240 knots, drunk two pots of coffee and told each other every story that they knew.";

/// The message of an error that the frontend answered with.
std::string message_of(const std::string& body) {
  auto answer = json::parse(body, nullptr, false);
  if (answer.is_object() && answer.contains("error") && answer["error"].is_object())
    return answer["error"].value("message", body);
  return body;
}

} // namespace

double milliseconds(steady::duration d) {
  return std::chrono::duration<double, std::milli>(d).count();
}

expected<raw_stream> stream(const stream_request& what) {
  json body{{"prompt", what.prompt}, {"max_tokens", what.max_tokens},
            {"temperature", 0},      {"ignore_eos", true},
            {"stream", true},        {"return_token_ids", true}};
  http::client_request request{
    "POST", what.endpoint + "/v1/completions", {{"Content-Type", "application/json"}}, body.dump()};
  raw_stream result;
  result.events.reserve(what.max_tokens + 4);
  http::sse_parser parser;
  std::optional<error> failed;
  auto on_piece = [&](std::string_view piece) {
    auto now = steady::now();
    auto events = parser.feed(piece);
    if (!events) {
      failed = events.error();
      return false;
    }
    for (auto& event : *events)
      result.events.emplace_back(now, std::move(event.data));
    return true;
  };
  result.sent = steady::now();
  auto answer = http::fetch_stream(request, stream_timeouts, on_piece);
  if (failed)
    return tl::unexpected(*failed);
  if (!answer)
    return tl::unexpected(answer.error());
  if (answer->status != 200)
    return fail(error_code::invalid_request,
                fmt::format("{} answered with status {}: {}", what.endpoint, answer->status,
                            message_of(answer->body)));
  return result;
}

expected<stream_record> read(const raw_stream& raw, unsigned max_tokens) {
  stream_record result;
  result.sent = raw.sent;
  result.times.reserve(max_tokens);
  result.tokens.reserve(max_tokens);
  for (const auto& [time, data] : raw.events) {
    if (data == "[DONE]")
      continue;
    auto chunk = json::parse(data, nullptr, false);
    if (!chunk.is_object() || chunk.contains("error"))
      return fail(error_code::peer_lost, "a stream broke off: " + message_of(data));
    for (const auto& choice : chunk.value("choices", json::array())) {
      auto tokens = choice.find("token_ids");
      if (tokens == choice.end() || !tokens->is_array())
        continue;
      for (const auto& token : *tokens) {
        if (!token.is_number_integer())
          return fail(error_code::peer_lost, "not a token: " + token.dump());
        result.tokens.push_back(token.get<std::int32_t>());
        result.times.push_back(time);
      }
    }
  }
  if (result.tokens.size() != max_tokens)
    return fail(error_code::peer_lost, fmt::format("a stream ended after {} of {} tokens",
                                                   result.tokens.size(), max_tokens));
  return result;
}

expected<prompt_maker> prompt_maker::make(const std::string& endpoint) {
  json body{{"prompt", prompt_text}, {"add_special_tokens", false}};
  auto answer = http::fetch(
    {"POST", endpoint + "/tokenize", {{"Content-Type", "application/json"}}, body.dump()}, 5000ms);
  if (!answer)
    return tl::unexpected(answer.error());
  auto told = json::parse(answer->body, nullptr, false);
  if (answer->status != 200 || !told.is_object() || !told.contains("tokens")
      || !told["tokens"].is_array() || told["tokens"].empty())
    return fail(error_code::internal,
                fmt::format("{}/tokenize answered with status {}: {}", endpoint, answer->status,
                            message_of(answer->body)));
  prompt_maker result;
  for (const auto& token : told["tokens"])
    if (token.is_number_integer())
      result.text_.push_back(token.get<std::int32_t>());
  return result;
}

std::vector<std::int32_t> prompt_maker::prompt(std::size_t num_tokens, std::size_t offset) const {
  std::vector<std::int32_t> result;
  result.reserve(num_tokens);
  for (std::size_t i = 0; i < num_tokens; ++i)
    result.push_back(text_[(offset + i) % text_.size()]);
  return result;
}

} // namespace troupe::tools::bench
