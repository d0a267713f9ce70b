#include "troupe/http/answer_replay.hpp"

#include "openai_fixture.hpp"

#include <catch2/catch.hpp>

#include <random>

namespace troupe::http::openai_testing {

using schedule::finish_reason;
using schedule::request_log;

namespace {

/// A call in a log, and the first client's builder, fed with the same events.
struct served_call {
  request_log log{request_log::limits{}};
  std::string record;
  std::uint64_t id = (std::uint64_t{3} << call_bits) | 0x1f;
  json body;
  response_builder builder;
  std::string sent;

  served_call(json b, bool chat) : body(std::move(b)), builder(make(accept(chat))) {
    if (body.value("stream", false))
      builder.open(sent);
  }

  const schedule::logged_call& accept(bool chat) {
    schedule::accepted_call call;
    call.id = id;
    call.chat = chat;
    call.body = body.dump();
    call.seed = 7;
    call.created_ms = 1700000000123;
    call.first_request = kFirstId;
    const auto parsed = parse_ok(body, chat);
    call.num_choices = parsed.num_choices();
    call.keeps_scores = parsed.num_logprobs >= 0 || parsed.num_prompt_logprobs >= 0;
    log.accept(std::move(call), record);
    return logged();
  }
  response_builder make(const schedule::logged_call& call) {
    return std::move(rebuild(call, mini_model()).value());
  }
  const schedule::logged_call& logged() const { return *log.find(id); }

  /// As the gateway does: the log first, then the client.
  void feed(const schedule::token_event& event) {
    if (!log.append(event, 5, record))
      return;
    if (builder.on_event(event, sent).cancel)
      log.end_choice(event.request, 6, record);
  }

  /// The log as the next frontend reads it.
  request_log read_again() const {
    request_log again{request_log::limits{}};
    REQUIRE(again.apply(record));
    return again;
  }
};

std::vector<json> bodies() {
  const auto& c = golden()[0];
  const json text = {{"prompt", c.prompt}, {"max_tokens", 256}, {"return_token_ids", true}};
  auto with = [&](json more) {
    json b = text;
    b.update(more);
    return b;
  };
  return {text,
          with({{"stream", true}}),
          with({{"stream", true}, {"stream_options", {{"include_usage", true}}}}),
          with({{"logprobs", 2}}),
          with({{"stream", true}, {"logprobs", 1}}),
          with({{"echo", true}, {"logprobs", 1}}),
          with({{"prompt_logprobs", 1}}),
          with({{"stop", {"a"}}, {"stream", true}}),
          with({{"stop", {"the"}}})};
}

std::vector<schedule::token_event> golden_events(const json& body) {
  const auto& c = golden()[0];
  std::vector<schedule::token_event> events;
  const auto parsed = parse_ok(body, false);
  if (parsed.num_prompt_logprobs >= 0 || (parsed.echo && parsed.num_logprobs >= 0))
    for (std::uint32_t p = 1; p < c.prompt.size(); ++p)
      events.push_back(prompt_event(0, p, c.prompt[p], -0.125F * static_cast<float>(p)));
  auto generated = events_of(0, c.tokens, finish_reason::stop);
  for (auto& e : generated) {
    e.token.logprob = -0.01F * static_cast<float>(e.token.token);
    e.token.top_tokens = {e.token.token, 3};
    e.token.top_logprobs = {e.token.logprob, -3.5F};
  }
  events.insert(events.end(), generated.begin(), generated.end());
  return events;
}

} // namespace

TEST_CASE("an answer's id leads back to its call, and nothing else does") {
  for (const std::uint64_t call :
       {std::uint64_t{1}, (std::uint64_t{2} << call_bits) | 0xabcdef, ~std::uint64_t{0}}) {
    CHECK(call_of_answer(answer_id(call)) == call);
    CHECK(call_of_answer("chatcmpl-" + answer_id(call)) == call);
    CHECK(call_of_answer("cmpl-" + answer_id(call)) == call);
  }
  for (const char* none : {"", "-", "1", "1-", "-1", "x-1", "1-x", "1-1 ", "cmpl-", "1-1-1",
                           "1000000-1", "1-10000000000", "11111111111111111-1"})
    CHECK_FALSE(call_of_answer(none));
}

TEST_CASE("a client that comes back at any token gets the same bytes as one that stayed") {
  for (const auto& body : bodies()) {
    INFO(body.dump());
    const auto events = golden_events(body);
    for (std::size_t cut = 0; cut <= events.size(); ++cut) {
      served_call call(body, false);
      for (std::size_t i = 0; i < cut; ++i)
        call.feed(events[i]);
      // Another client, now or after the frontend was restarted.
      const auto again = call.read_again();
      const auto& logged = *again.find(call.id);
      auto late = std::move(rebuild(logged, mini_model()).value());
      std::string late_sent;
      if (body.value("stream", false))
        late.open(late_sent);
      replay(logged, late, late_sent);
      REQUIRE(late.done() == call.builder.done());
      for (std::size_t i = cut; i < events.size(); ++i) {
        late.on_event(events[i], late_sent);
        call.feed(events[i]);
      }
      REQUIRE(late.done());
      REQUIRE(late_sent == call.sent);
    }
  }
}

TEST_CASE("a resumed call asks for what is missing and for nothing that has ended") {
  const auto& c = golden()[0];
  served_call call({{"prompt", c.prompt}, {"n", 3}, {"max_tokens", 50}, {"seed", 9}}, false);
  call.feed(token_event(0, 0, 5));
  call.feed(token_event(0, 1, 6));
  call.feed(token_event(1, 0, 7, finish_reason::stop));
  const auto again = call.read_again();
  const auto& logged = *again.find(call.id);
  auto builder = std::move(rebuild(logged, mini_model()).value());
  std::string out;
  replay(logged, builder, out);
  const auto rest = requests_to_resume(logged, builder, schedule::time_point::max());
  REQUIRE(rest.size() == 2);
  CHECK(rest[0].id == kFirstId);
  CHECK(rest[0].generated == std::vector<std::int32_t>{5, 6});
  CHECK(rest[0].draw.seed == 9);
  CHECK(rest[0].resumed);
  CHECK(rest[1].id == kFirstId + 2);
  CHECK(rest[1].generated.empty());
  CHECK(rest[1].draw.seed == 11);
}

TEST_CASE("an answer can be read at any time in the shape that it has at the end") {
  for (const auto& body : bodies()) {
    INFO(body.dump());
    const auto events = golden_events(body);
    served_call call(body, false);
    std::size_t num_tokens = 0;
    for (const auto& event : events) {
      call.feed(event);
      const auto text = response_body(call.logged(), mini_model());
      REQUIRE(text);
      const auto answer = json::parse(*text);
      CHECK(answer.at("id") == "cmpl-3-1f");
      CHECK(answer.at("object") == "text_completion");
      const auto& choice = answer.at("choices").at(0);
      CHECK(choice.at("token_ids").size() >= num_tokens);
      num_tokens = choice.at("token_ids").size();
      const bool over = call.builder.done();
      CHECK(answer.at("status") == (over ? "completed" : "in_progress"));
      CHECK(choice.at("finish_reason").is_null() == !over);
      CHECK(answer.at("usage").at("completion_tokens") == num_tokens);
      if (over)
        break;
    }
    CHECK(num_tokens > 0);
    auto whole = json::parse(response_body(call.logged(), mini_model()).value());
    whole.erase("status");
    if (!body.value("stream", false))
      CHECK(whole == json::parse(call.sent));
  }
}

TEST_CASE("a failed answer can be read with its error and what it had brought") {
  served_call call({{"messages", json::array({{{"role", "user"}, {"content", "hello"}}})}}, true);
  call.feed(token_event(0, 0, golden()[0].tokens[0]));
  call.log.fail(call.id, error{error_code::deadline_exceeded, "too late", "", ""}, 9, call.record);
  const auto answer = json::parse(response_body(call.logged(), mini_model()).value());
  CHECK(answer.at("status") == "failed");
  CHECK(answer.at("object") == "chat.completion");
  CHECK(answer.at("error").at("troupe").at("code") == "deadline_exceeded");
  CHECK(answer.at("usage").at("completion_tokens") == 1);
}

TEST_CASE("a logged call that no longer reads the same is refused") {
  served_call call({{"prompt", golden()[0].prompt}}, false);
  auto other = mini_model();
  other.max_context = 4;
  CHECK_FALSE(rebuild(call.logged(), other));
}

} // namespace troupe::http::openai_testing
