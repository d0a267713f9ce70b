#include "troupe/http/openai_response.hpp"

#include "openai_fixture.hpp"

#include <catch2/catch.hpp>

#include <limits>

namespace troupe::http::openai_testing {

using schedule::finish_reason;

namespace {

// Tokens of troupe-mini: 15 + d is the digit d, 11 a comma, 1023 </think>, 1018 end of text.
constexpr std::int32_t kThinkEnd = 1023;
constexpr std::int32_t kEos = 1018;
const std::vector<std::int32_t> kThought{20, 18, kThinkEnd, 16, kEos}; // "53", then "1"

json chat_body() {
  return {{"messages", {{{"role", "user"}, {"content", "x"}}}}};
}

json with(json body, const json& more) {
  body.update(more);
  return body;
}

schedule::token_event scored(schedule::token_event e, float logprob, std::vector<std::int32_t> best,
                             std::vector<float> logprobs) {
  e.token.logprob = logprob;
  e.token.top_tokens = std::move(best);
  e.token.top_logprobs = std::move(logprobs);
  return e;
}

} // namespace

TEST_CASE("a streamed chat, byte for byte") {
  auto b = builder_for(
    with(chat_body(), {{"stream", true}, {"stream_options", {{"include_usage", true}}}}), true);
  const auto prompt = b.request().prompts[0].tokens.size();
  const auto frames = frames_of(answer(b, events_of(0, kThought, finish_reason::stop)));
  const std::string head = R"({"id":"chatcmpl-1","object":"chat.completion.chunk",)"
                           R"("created":1700000000,"model":"troupe-mini","choices":[)";
  const auto chunk = [&](const std::string& delta, const std::string& finish) {
    return head + R"({"index":0,"delta":)" + delta + R"(,"logprobs":null,"finish_reason":)" + finish
           + R"(}],"usage":null})";
  };
  const std::vector<std::string> expected_frames{
    chunk(R"({"role":"assistant","content":""})", "null"),
    chunk(R"({"reasoning":"5","reasoning_content":"5"})", "null"),
    chunk(R"({"reasoning":"3","reasoning_content":"3"})", "null"),
    chunk(R"({"content":"1"})", "null"),
    chunk("{}", R"("stop","stop_reason":null)"),
    head + R"(],"usage":{"prompt_tokens":)" + std::to_string(prompt)
      + R"(,"completion_tokens":5,"total_tokens":)" + std::to_string(prompt + 5)
      + R"(,"completion_tokens_details":{"reasoning_tokens":3}}})",
    "[DONE]"};
  CHECK(frames == expected_frames);
  CHECK(b.done());
}

TEST_CASE("a whole chat") {
  auto b = builder_for(chat_body(), true);
  const auto prompt = b.request().prompts[0].tokens.size();
  CHECK(json::parse(answer(b, events_of(0, kThought, finish_reason::stop)))
        == json({{"id", "chatcmpl-1"},
                 {"object", "chat.completion"},
                 {"created", 1700000000},
                 {"model", "troupe-mini"},
                 {"choices",
                  {{{"index", 0},
                    {"message",
                     {{"role", "assistant"},
                      {"content", "1"},
                      {"refusal", nullptr},
                      {"reasoning", "53"},
                      {"reasoning_content", "53"},
                      {"tool_calls", json::array()}}},
                    {"logprobs", nullptr},
                    {"finish_reason", "stop"},
                    {"stop_reason", nullptr}}}},
                 {"usage",
                  {{"prompt_tokens", prompt},
                   {"completion_tokens", 5},
                   {"total_tokens", prompt + 5},
                   {"completion_tokens_details", {{"reasoning_tokens", 3}}}}}}));
}

TEST_CASE("a streamed completion, byte for byte") {
  auto b = builder_for({{"prompt", {1, 2}}, {"stream", true}, {"return_token_ids", true}}, false);
  const auto frames = frames_of(answer(b, events_of(0, {20, 18}, finish_reason::length)));
  const std::string head = R"({"id":"cmpl-1","object":"text_completion","created":1700000000,)"
                           R"("model":"troupe-mini","choices":[{"index":0,"text":)";
  CHECK(
    frames
    == std::vector<std::string>{
      head
        + R"("5","logprobs":null,"finish_reason":null,"token_ids":[20],)"
          R"("prompt_token_ids":[1,2]}]})",
      head
        + R"("3","logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":[18]}]})",
      "[DONE]"});
}

TEST_CASE("whole completions keep tags and come in the order of their index") {
  auto b = builder_for({{"prompt", {{1}, {2, 3}}}, {"n", 2}, {"return_token_ids", true}}, false);
  std::string out;
  b.open(out);
  // Choices end in another order than they are numbered.
  for (const std::uint32_t c : {3U, 1U, 0U, 2U}) {
    CHECK(out.empty());
    CHECK_FALSE(b.ended(c));
    const std::vector<std::int32_t> tokens{15 + static_cast<std::int32_t>(c), kThinkEnd, kEos};
    for (const auto& e : events_of(c, tokens, finish_reason::stop))
      b.on_event(e, out);
    CHECK(b.ended(c));
  }
  const json body = json::parse(out);
  REQUIRE(body["choices"].size() == 4);
  for (int c = 0; c < 4; ++c) {
    const json& choice = body["choices"][static_cast<std::size_t>(c)];
    CHECK(choice["index"] == c);
    CHECK(choice["text"] == std::to_string(c) + "</think>");
    CHECK(choice["finish_reason"] == "stop");
    CHECK(choice["token_ids"] == json({15 + c, kThinkEnd, kEos}));
    CHECK(choice["prompt_token_ids"] == (c < 2 ? json::array({1}) : json::array({2, 3})));
  }
  CHECK(body["object"] == "text_completion");
  CHECK(body["usage"]["prompt_tokens"] == 3);
  CHECK(body["usage"]["completion_tokens"] == 12);
  CHECK(body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0);
}

TEST_CASE("logprobs of completions, with the echoed prompt in front") {
  const json body = {{"prompt", {16, 17}}, {"echo", true}, {"logprobs", 2}, {"max_tokens", 2}};
  const std::vector<schedule::token_event> events{
    scored(prompt_event(0, 1, 17, 0), -1.5F, {18, 17}, {-0.25F, -1.5F}),
    scored(token_event(0, 0, 20), -0.5F, {20, 21}, {-0.5F, -2.0F}),
    scored(token_event(0, 1, kEos, finish_reason::stop), -3.0F, {21, 22},
           {-1.0F, -std::numeric_limits<float>::infinity()})};
  const json logprobs = {{"tokens", {"1", "2", "5", "<｜end▁of▁sentence｜>"}},
                         {"text_offset", {0, 1, 2, 3}},
                         {"token_logprobs", {nullptr, -1.5, -0.5, -3.0}},
                         {"top_logprobs",
                          {nullptr,
                           {{"2", -1.5}, {"3", -0.25}},
                           {{"5", -0.5}, {"6", -2.0}},
                           {{"<｜end▁of▁sentence｜>", -3.0}, {"6", -1.0}, {"7", -9999.0}}}}};
  auto whole = builder_for(body, false);
  const json choice = json::parse(answer(whole, events))["choices"][0];
  CHECK(choice["text"] == "125");
  CHECK(choice["logprobs"] == logprobs);

  auto stream = builder_for(with(body, {{"stream", true}}), false);
  json joined;
  std::string text;
  for (const std::string& frame : frames_of(answer(stream, events))) {
    if (frame == "[DONE]")
      continue;
    const json part = json::parse(frame)["choices"][0];
    text += part["text"].get<std::string>();
    for (const auto& [name, list] : part["logprobs"].items())
      for (const json& element : list)
        joined[name].push_back(element);
  }
  CHECK(text == "125");
  CHECK(joined == logprobs);
}

TEST_CASE("logprobs of chats") {
  auto b = builder_for(
    with(chat_body(), {{"logprobs", true}, {"top_logprobs", 1}, {"return_token_ids", true}}), true);
  std::vector<schedule::token_event> events{
    scored(token_event(0, 0, kThinkEnd), -0.5F, {20, 21}, {-0.25F, -2.0F}),
    scored(token_event(0, 1, 20), -0.125F, {20, 21}, {-0.125F, -2.0F})};
  events.back().finish = finish_reason::length;
  const json body = json::parse(answer(b, events));
  const json five = {{"token", "5"}, {"logprob", -0.125}, {"bytes", {53}}};
  CHECK(body["choices"][0]["logprobs"]
        == json({{"content",
                  {{{"token", "</think>"},
                    {"logprob", -0.5},
                    {"bytes", {60, 47, 116, 104, 105, 110, 107, 62}},
                    {"top_logprobs", {{{"token", "5"}, {"logprob", -0.25}, {"bytes", {53}}}}}},
                   {{"token", "5"},
                    {"logprob", -0.125},
                    {"bytes", {53}},
                    {"top_logprobs", json::array({five})}}}}}));
  CHECK(body["choices"][0]["token_ids"] == json({kThinkEnd, 20}));
  CHECK(body["prompt_token_ids"] == json(b.request().prompts[0].tokens));

  // Without top_logprobs the list is empty, and in a stream each chunk has its own tokens.
  auto stream = builder_for(
    with(chat_body(), {{"logprobs", true}, {"stream", true}, {"return_token_ids", true}}), true);
  const auto frames = frames_of(answer(stream, events));
  REQUIRE(frames.size() == 4);
  CHECK(json::parse(frames[0])["prompt_token_ids"] == json(b.request().prompts[0].tokens));
  const json first = json::parse(frames[1])["choices"][0];
  CHECK(first["delta"] == json::object());
  CHECK(first["logprobs"]["content"].size() == 1);
  CHECK(first["logprobs"]["content"][0]["top_logprobs"] == json::array());
  CHECK(first["token_ids"] == json({kThinkEnd}));
}

TEST_CASE("tokens can be named by their ids") {
  auto b =
    builder_for({{"prompt", {16}}, {"logprobs", 1}, {"return_tokens_as_token_ids", true}}, false);
  const json logprobs =
    json::parse(answer(b, {scored(token_event(0, 0, 20, finish_reason::length), -0.5F, {21},
                                  {-0.25F})}))["choices"][0]["logprobs"];
  CHECK(logprobs["tokens"] == json({"token_id:20"}));
  CHECK(logprobs["top_logprobs"][0] == json({{"token_id:20", -0.5}, {"token_id:21", -0.25}}));
}

TEST_CASE("prompt_logprobs have vLLM's shape") {
  const std::vector<schedule::token_event> events{
    scored(prompt_event(0, 1, 17, 0), -1.5F, {18, 17}, {-0.25F, -1.5F}),
    scored(prompt_event(0, 2, 19, 0), -4.0F, {18, 17}, {-0.25F, -1.5F}),
    token_event(0, 0, 20, finish_reason::length)};
  const json lists = json::parse(R"([null,
    {"17":{"logprob":-1.5,"rank":2,"decoded_token":"2"},
     "18":{"logprob":-0.25,"rank":1,"decoded_token":"3"}},
    {"19":{"logprob":-4,"rank":null,"decoded_token":"4"},
     "18":{"logprob":-0.25,"rank":1,"decoded_token":"3"},
     "17":{"logprob":-1.5,"rank":2,"decoded_token":"2"}}])");
  auto text = builder_for({{"prompt", {16, 17, 19}}, {"prompt_logprobs", 2}}, false);
  const json body = json::parse(answer(text, events));
  CHECK(body["choices"][0]["prompt_logprobs"] == lists);
  CHECK(body["choices"][0]["text"] == "5");

  auto chat = builder_for(with(chat_body(), {{"prompt_logprobs", 0}}), true);
  std::vector<schedule::token_event> chat_events;
  const auto prompt = chat.request().prompts[0].tokens;
  for (std::uint32_t i = 1; i < prompt.size(); ++i)
    chat_events.push_back(prompt_event(0, i, prompt[i], -0.75F));
  chat_events.push_back(token_event(0, 0, 20, finish_reason::length));
  const json scores = json::parse(answer(chat, chat_events))["prompt_logprobs"];
  REQUIRE(scores.size() == prompt.size());
  CHECK(scores[0].is_null());
  CHECK(scores[1][std::to_string(prompt[1])]["logprob"] == -0.75);
}

TEST_CASE("echo without logprobs shows the prompt as it was written") {
  for (const bool streamed : {false, true}) {
    auto b = builder_for({{"prompt", "12"}, {"echo", true}, {"stream", streamed}}, false);
    const std::string out = answer(b, events_of(0, {18, kEos}, finish_reason::stop));
    if (streamed)
      CHECK(json::parse(frames_of(out)[0])["choices"][0]["text"] == "123");
    else
      CHECK(json::parse(out)["choices"][0]["text"] == "123");
  }
  // The BOS that the tokenizer adds is a token of the logprobs but not of the text.
  auto b = builder_for({{"prompt", "12"}, {"echo", true}, {"logprobs", 0}}, false);
  const auto& prompt = b.request().prompts[0].tokens;
  std::vector<schedule::token_event> events;
  for (std::uint32_t i = 1; i < prompt.size(); ++i)
    events.push_back(prompt_event(0, i, prompt[i], -1.0F));
  events.push_back(token_event(0, 0, 18, finish_reason::length));
  const json choice = json::parse(answer(b, events))["choices"][0];
  CHECK(choice["logprobs"]["text_offset"].front() == 0);
  CHECK(choice["logprobs"]["text_offset"][1] == 0);
  CHECK(choice["logprobs"]["text_offset"].back() == 2);
  CHECK(choice["logprobs"]["tokens"].size() == prompt.size() + 1);
}

TEST_CASE("max_tokens 0 scores the prompt and shows no token") {
  auto b =
    builder_for({{"prompt", {16, 17}}, {"echo", true}, {"logprobs", 0}, {"max_tokens", 0}}, false);
  const json body = json::parse(
    answer(b, {prompt_event(0, 1, 17, -1.5F), token_event(0, 0, 20, finish_reason::length)}));
  CHECK(body["choices"][0]["text"] == "12");
  CHECK(body["choices"][0]["logprobs"]["tokens"].size() == 2);
  CHECK(body["choices"][0]["finish_reason"] == "length");
  CHECK(body["usage"]["completion_tokens"] == 0);
}

TEST_CASE("a stop string across tokens ends the text and asks to cancel") {
  const auto run = [](const json& more) {
    const json body = {{"prompt", {1}}, {"stop", {"3,4"}}, {"return_token_ids", true}};
    auto b = builder_for(with(body, more), false);
    std::string out;
    b.open(out);
    std::vector<bool> cancels;
    std::uint32_t i = 0;
    for (const std::int32_t token : {17, 18, 11, 19, 20, 21}) // 2 3 , 4 5 6
      cancels.push_back(b.on_event(token_event(0, i++, token), out).cancel);
    CHECK(cancels == std::vector<bool>{false, false, false, true, false, false});
    CHECK(b.done());
    CHECK(b.usage().completion_tokens == 4);
    // The scheduler's own end comes late and changes nothing.
    const std::string before = out;
    b.on_event(token_event(0, i, kEos, finish_reason::cancelled), out);
    CHECK(out == before);
    return out;
  };
  const json choice = json::parse(run(json::object()))["choices"][0];
  CHECK(choice["text"] == "2");
  CHECK(choice["finish_reason"] == "stop");
  CHECK(choice["stop_reason"] == "3,4");
  CHECK(choice["token_ids"] == json({17, 18, 11, 19}));
  CHECK(json::parse(run({{"include_stop_str_in_output", true}}))["choices"][0]["text"] == "23,4");
  std::string text;
  for (const std::string& frame : frames_of(run({{"stream", true}})))
    if (frame != "[DONE]")
      text += json::parse(frame)["choices"][0]["text"].get<std::string>();
  CHECK(text == "2");
}

TEST_CASE("what was held back for a stop string is released at the end") {
  auto b = builder_for({{"prompt", {1}}, {"stop", "3,4"}}, false);
  const json body = json::parse(answer(b, events_of(0, {17, 18, 11}, finish_reason::length)));
  CHECK(body["choices"][0]["text"] == "23,");
  CHECK(body["choices"][0]["finish_reason"] == "length");
}

TEST_CASE("a stop token is told, and shown only where asked for") {
  for (const bool shown : {false, true}) {
    auto b = builder_for(
      {{"prompt", {1}}, {"stop_token_ids", {20}}, {"include_stop_str_in_output", shown}}, false);
    const json choice =
      json::parse(answer(b, events_of(0, {17, 20}, finish_reason::stop)))["choices"][0];
    CHECK(choice["text"] == (shown ? "25" : "2"));
    CHECK(choice["stop_reason"] == 20);
  }
}

TEST_CASE("special tokens and reasoning are shown or left out as asked") {
  const std::vector<std::int32_t> tokens{17, 1020, 18};
  auto hidden = builder_for({{"prompt", {1}}}, false);
  CHECK(
    json::parse(answer(hidden, events_of(0, tokens, finish_reason::length)))["choices"][0]["text"]
    == "23");
  auto shown = builder_for({{"prompt", {1}}, {"skip_special_tokens", false}}, false);
  CHECK(
    json::parse(answer(shown, events_of(0, tokens, finish_reason::length)))["choices"][0]["text"]
    == "2<｜User｜>3");
  auto whole = builder_for(with(chat_body(), {{"include_reasoning", false}}), true);
  const json message = json::parse(
    answer(whole, events_of(0, kThought, finish_reason::stop)))["choices"][0]["message"];
  CHECK(message["reasoning"].is_null());
  CHECK(message["content"] == "1");
  CHECK(whole.usage().reasoning_tokens == 3);
  auto stream =
    builder_for(with(chat_body(), {{"include_reasoning", false}, {"stream", true}}), true);
  const std::string out = answer(stream, events_of(0, kThought, finish_reason::stop));
  CHECK(out.find("reasoning") == std::string::npos);
  CHECK(frames_of(out).size() == 4); // role, "1", end, [DONE]
}

TEST_CASE("a cancelled request ends with abort") {
  auto b = builder_for({{"prompt", {1}}}, false);
  schedule::token_event gone;
  gone.request = kFirstId;
  gone.finish = finish_reason::cancelled;
  const json body = json::parse(answer(b, {token_event(0, 0, 17), gone}));
  CHECK(body["choices"][0]["finish_reason"] == "abort");
  CHECK(body["choices"][0]["text"] == "2");
  CHECK(body["usage"]["completion_tokens"] == 1);
}

TEST_CASE("an error in the middle of a stream is sent and ends it") {
  auto b = builder_for({{"prompt", {1}}, {"n", 2}, {"stream", true}}, false);
  std::string out = answer(b, {token_event(0, 0, 17)});
  b.fail(fail(error_code::deadline_exceeded, "the request took more than 5 s").value(), out);
  CHECK(b.done());
  CHECK(b.ended(1));
  const auto frames = frames_of(out);
  REQUIRE(frames.size() == 3);
  const json e = json::parse(frames[1])["error"];
  CHECK(e["message"] == "the request took more than 5 s");
  CHECK(e["troupe"]["code"] == "deadline_exceeded");
  CHECK(frames[2] == "[DONE]");
  const std::string before = out;
  CHECK(b.on_event(token_event(1, 0, 17), out).done);
  b.fail(fail(error_code::internal, "again").value(), out);
  CHECK(out == before);

  // A whole answer says nothing by itself: its status line is still to be written.
  auto whole = builder_for({{"prompt", {1}}}, false);
  std::string nothing;
  schedule::token_event failed;
  failed.request = kFirstId;
  failed.finish = finish_reason::failed;
  CHECK(whole.on_event(failed, nothing).done);
  CHECK(nothing.empty());
  CHECK(whole.done());
}

TEST_CASE("events of other requests are ignored") {
  auto b = builder_for({{"prompt", {1}}, {"stream", true}}, false);
  std::string out;
  schedule::token_event stranger = token_event(1, 0, 17);
  b.on_event(stranger, out);
  stranger.request = kFirstId - 1;
  b.on_event(stranger, out);
  CHECK(out.empty());
  CHECK(b.usage().completion_tokens == 0);
}

} // namespace troupe::http::openai_testing
