#include "troupe/http/openai_response.hpp"

#include "openai_fixture.hpp"

#include <catch2/catch.hpp>

#include <map>
#include <random>

namespace troupe::http::openai_testing {

using schedule::finish_reason;

namespace {

/// What a client puts together for one choice.
struct received {
  std::string text;
  std::string reasoning;
  std::string finish;
  std::vector<std::int32_t> token_ids;
  std::size_t num_logprobs = 0;

  bool operator==(const received&) const = default;
};

void add_logprobs(received& r, const json& logprobs) {
  if (!logprobs.is_null())
    r.num_logprobs +=
      logprobs.contains("content") ? logprobs["content"].size() : logprobs["tokens"].size();
}

std::map<int, received> from_stream(const std::string& out, json& usage) {
  std::map<int, received> choices;
  for (const std::string& frame : frames_of(out)) {
    if (frame == "[DONE]")
      continue;
    const json chunk = json::parse(frame);
    if (chunk["choices"].empty())
      usage = chunk["usage"];
    for (const json& c : chunk["choices"]) {
      received& r = choices[c["index"].get<int>()];
      const json& delta = c.contains("delta") ? c["delta"] : c;
      CHECK(r.finish.empty()); // nothing follows the end
      r.text += delta.value("content", delta.value("text", ""));
      r.reasoning += delta.value("reasoning", "");
      if (!c["finish_reason"].is_null())
        r.finish = c["finish_reason"];
      for (const json& id : c.value("token_ids", json::array()))
        r.token_ids.push_back(id);
      add_logprobs(r, c["logprobs"]);
    }
  }
  return choices;
}

std::map<int, received> from_body(const std::string& out, json& usage) {
  std::map<int, received> choices;
  const json body = json::parse(out);
  usage = body["usage"];
  for (const json& c : body["choices"]) {
    received& r = choices[c["index"].get<int>()];
    const json& message = c.contains("message") ? c["message"] : c;
    r.text = message.contains("content") ? message["content"] : message["text"];
    if (message.contains("reasoning") && message["reasoning"].is_string())
      r.reasoning = message["reasoning"];
    r.finish = c["finish_reason"];
    r.token_ids = c.value("token_ids", std::vector<std::int32_t>{});
    add_logprobs(r, c["logprobs"]);
  }
  return choices;
}

} // namespace

TEST_CASE("golden conversations give the golden text, streamed and whole") {
  for (const conversation& c : golden()) {
    const auto events = events_of(0, c.tokens, finish_reason::stop);
    auto text =
      builder_for({{"prompt", c.prompt}, {"max_tokens", 300}, {"return_token_ids", true}}, false);
    const json choice = json::parse(answer(text, events))["choices"][0];
    CHECK(choice["text"] == c.text);
    CHECK(choice["token_ids"] == json(c.tokens));

    auto chat = builder_for({{"messages", {{{"role", "user"}, {"content", "x"}}}}}, true);
    const json message = json::parse(answer(chat, events))["choices"][0]["message"];
    const auto tag = c.text.find("</think>");
    REQUIRE(tag != std::string::npos);
    CHECK(message["reasoning_content"] == c.text.substr(0, tag));
    CHECK(message["content"] == c.text.substr(tag + 8));
    const auto end = std::find(c.tokens.begin(), c.tokens.end(), 1023);
    CHECK(chat.usage().reasoning_tokens == static_cast<std::uint64_t>(end - c.tokens.begin()) + 1);
    CHECK(chat.usage().completion_tokens == c.tokens.size());
  }
}

TEST_CASE("a stream put together equals the whole answer, whatever the tokens", "[property]") {
  std::mt19937_64 random(77);
  const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random() % n); };
  std::size_t num_stopped = 0;
  for (int round = 0; round < 300; ++round) {
    const bool chat = below(2) == 0;
    json body = chat ? json{{"messages", {{{"role", "user"}, {"content", "x"}}}}}
                     : json{{"prompt", {{1, 2}, {3}}}, {"echo", below(2) == 0}};
    body["n"] = 1 + below(3);
    body["return_token_ids"] = true;
    body["skip_special_tokens"] = below(2) == 0;
    body["include_stop_str_in_output"] = below(2) == 0;
    if (below(2) == 0)
      body["stop"] = {"3,4", "1", "</think>2"};
    if (below(2) == 0)
      body["logprobs"] = chat ? json(true) : json(2);
    json streamed_body = body;
    streamed_body["stream"] = true;
    streamed_body["stream_options"] = {{"include_usage", true}};
    auto whole = builder_for(body, chat);
    auto stream = builder_for(streamed_body, chat);

    // Few kinds of tokens, so that tags, stop strings and cut characters come up often.
    const std::vector<std::int32_t> kinds{16, 17, 18, 19, 11, 198, 1020, 1022, 1023, 27, 14, 29};
    const std::uint32_t num_choices = whole.request().num_choices();
    std::vector<std::vector<schedule::token_event>> queues(num_choices);
    for (std::uint32_t c = 0; c < num_choices; ++c) {
      std::vector<std::int32_t> tokens;
      for (std::size_t i = 1 + below(25); i > 0; --i)
        tokens.push_back(below(3) == 0 ? static_cast<std::int32_t>(below(1024))
                                       : kinds[below(kinds.size())]);
      queues[c] = events_of(c, tokens, below(2) == 0 ? finish_reason::stop : finish_reason::length);
      std::reverse(queues[c].begin(), queues[c].end());
    }
    std::string whole_out;
    std::string stream_out;
    std::vector<std::uint64_t> num_taken(num_choices, 0);
    whole.open(whole_out);
    stream.open(stream_out);
    while (!whole.done()) {
      const auto c = static_cast<std::uint32_t>(below(num_choices)); // interleaved at random
      if (queues[c].empty() || whole.ended(c))
        continue;
      const auto a = whole.on_event(queues[c].back(), whole_out);
      const auto b = stream.on_event(queues[c].back(), stream_out);
      REQUIRE(a.cancel == b.cancel);
      REQUIRE(a.done == b.done);
      num_stopped += a.cancel;
      ++num_taken[c];
      queues[c].pop_back();
    }
    json whole_usage;
    json stream_usage;
    const auto whole_choices = from_body(whole_out, whole_usage);
    const auto stream_choices = from_stream(stream_out, stream_usage);
    REQUIRE(stream.done());
    REQUIRE(whole_choices == stream_choices);
    REQUIRE(whole_choices.size() == num_choices);
    REQUIRE(whole_usage == stream_usage);
    std::uint64_t sum = 0;
    for (std::uint32_t c = 0; c < num_choices; ++c) {
      REQUIRE(whole_choices.at(static_cast<int>(c)).token_ids.size() == num_taken[c]);
      sum += num_taken[c];
    }
    REQUIRE(whole_usage["completion_tokens"] == sum);
    REQUIRE(stream_out.ends_with("data: [DONE]\n\n"));
  }
  CHECK(num_stopped > 20); // stop strings did come up
}

} // namespace troupe::http::openai_testing
