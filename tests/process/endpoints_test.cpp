#include "streams.hpp"

#include "troupe/http/sse.hpp"

#include <cmath>
#include <set>

#include <catch2/catch.hpp>
#include <fmt/format.h>

using namespace troupe::process_tests;

namespace {

constexpr double logprob_tolerance = 5e-4;

/// Posts a request that streams and returns its events but for the closing [DONE].
std::vector<json> stream(const cluster& c, std::string_view path, json body) {
  body["stream"] = true;
  auto answer = c.post(path, body.dump());
  INFO(body.dump() << " -> " << answer.body);
  REQUIRE(answer.status == 200);
  CHECK(answer.header("Content-Type") == "text/event-stream");
  troupe::http::sse_parser parser;
  auto events = parser.feed(answer.body);
  REQUIRE(events);
  REQUIRE(!events->empty());
  REQUIRE(events->back().data == "[DONE]");
  events->pop_back();
  std::vector<json> result;
  for (const auto& event : *events) {
    result.push_back(json::parse(event.data, nullptr, false));
    REQUIRE(result.back().is_object());
  }
  return result;
}

json chat_request(const conversation& talk) {
  return {{"model", "troupe-mini"},
          {"messages", {{{"role", "user"}, {"content", talk.question}}}},
          {"temperature", 0}};
}

std::string trimmed(const std::string& text) {
  auto begin = text.find_first_not_of(" \n");
  return begin == std::string::npos ? ""
                                    : text.substr(begin, text.find_last_not_of(" \n") + 1 - begin);
}

/// The reasoning and the answer of a golden text, which has both with the tag in between.
void check_split(const conversation& talk, const std::string& reasoning,
                 const std::string& content) {
  auto tag = talk.text.find("</think>");
  REQUIRE(tag != std::string::npos);
  CHECK(trimmed(reasoning) == trimmed(talk.text.substr(0, tag)));
  CHECK(trimmed(content) == talk.answer);
}

} // namespace

TEST_CASE("chats answer in whole and in pieces, with the reasoning told apart") {
  cluster c("single.yaml");
  for (std::size_t i : {0, 5, 17}) {
    const auto& talk = golden()[i];
    INFO(talk.question);
    auto whole = c.post_json("/v1/chat/completions", chat_request(talk));
    CHECK(whole.at("object") == "chat.completion");
    CHECK(whole.at("model") == "troupe-mini");
    const auto& message = whole.at("choices").at(0).at("message");
    CHECK(message.at("role") == "assistant");
    CHECK(message.at("reasoning") == message.at("reasoning_content"));
    check_split(talk, message.at("reasoning"), message.at("content"));
    CHECK(whole.at("choices").at(0).at("finish_reason") == "stop");
    CHECK(whole.at("usage").at("prompt_tokens") == talk.prompt.size());
    CHECK(whole.at("usage").at("completion_tokens") == talk.tokens.size());
    CHECK(whole.at("usage").at("total_tokens") == talk.prompt.size() + talk.tokens.size());

    std::string reasoning;
    std::string content;
    std::string finish;
    auto request = chat_request(talk);
    request["stream_options"] = {{"include_usage", true}};
    auto chunks = stream(c, "/v1/chat/completions", request);
    REQUIRE(chunks.size() > 3);
    CHECK(chunks.front().at("choices").at(0).at("delta").at("role") == "assistant");
    CHECK(chunks.back().at("choices").empty());
    CHECK(chunks.back().at("usage") == whole.at("usage"));
    chunks.pop_back();
    for (const auto& chunk : chunks) {
      CHECK(chunk.at("object") == "chat.completion.chunk");
      CHECK(chunk.at("id") == chunks.front().at("id"));
      CHECK(chunk.at("usage").is_null());
      const auto& choice = chunk.at("choices").at(0);
      reasoning += choice.at("delta").value("reasoning", "");
      content += choice.at("delta").value("content", "");
      finish += choice.at("finish_reason").is_string() ? choice.at("finish_reason") : json("");
    }
    CHECK(reasoning == message.at("reasoning"));
    CHECK(content == message.at("content"));
    CHECK(finish == "stop");
  }
  auto no_reasoning = chat_request(golden()[0]);
  no_reasoning["include_reasoning"] = false;
  auto answer = c.post_json("/v1/chat/completions", no_reasoning);
  CHECK(answer.at("choices").at(0).at("message").at("reasoning").is_null());
  CHECK(trimmed(answer.at("choices").at(0).at("message").at("content")) == golden()[0].answer);
  c.end();
}

TEST_CASE("logprobs are the golden ones, of the answer and of an echoed prompt") {
  cluster c("local.yaml");
  for (std::size_t i : {0, 9, 33}) {
    const auto& talk = golden()[i];
    INFO(talk.question);
    auto answer = c.post_json("/v1/completions", {{"prompt", talk.prompt},
                                                  {"temperature", 0},
                                                  {"max_tokens", 40},
                                                  {"logprobs", 5},
                                                  {"return_tokens_as_token_ids", true}});
    const auto& got = answer.at("choices").at(0).at("logprobs");
    auto count = std::min<std::size_t>({40, talk.top_logprobs.size(), talk.tokens.size()});
    REQUIRE(got.at("tokens").size() == std::min<std::size_t>(40, talk.tokens.size()));
    for (std::size_t t = 0; t < count; ++t) {
      CHECK(got.at("tokens").at(t) == fmt::format("token_id:{}", talk.tokens[t]));
      const auto& top = got.at("top_logprobs").at(t);
      for (const auto& [token, expected] :
           talk.top_logprobs.at(t).get<std::vector<std::pair<int, double>>>()) {
        auto key = fmt::format("token_id:{}", token);
        INFO("position " << t << ", token " << token << ": " << top.dump());
        REQUIRE(top.contains(key));
        CHECK(std::abs(top.at(key).get<double>() - expected) < logprob_tolerance);
      }
    }
    auto echoed =
      c.post_json("/v1/completions",
                  {{"prompt", talk.prompt}, {"max_tokens", 0}, {"echo", true}, {"logprobs", 0}});
    const auto& scores = echoed.at("choices").at(0).at("logprobs").at("token_logprobs");
    REQUIRE(scores.size() == talk.prompt.size());
    CHECK(scores.at(0).is_null());
    for (std::size_t t = 1; t < scores.size(); ++t) {
      INFO("prompt position " << t);
      CHECK(std::abs(scores.at(t).get<double>() - talk.prompt_logprobs.at(t - 1))
            < logprob_tolerance);
    }
  }
  auto chat = chat_request(golden()[0]);
  chat["logprobs"] = true;
  chat["top_logprobs"] = 2;
  chat["max_tokens"] = 3;
  auto answer = c.post_json("/v1/chat/completions", chat);
  const auto& content = answer.at("choices").at(0).at("logprobs").at("content");
  REQUIRE(content.size() == 3);
  for (const auto& entry : content) {
    CHECK(entry.at("top_logprobs").size() == 2);
    CHECK(entry.at("token") == entry.at("top_logprobs").at(0).at("token"));
    CHECK(entry.at("bytes").is_array());
    CHECK(entry.at("logprob") <= 0);
  }
  c.end();
}

TEST_CASE("the options of completions do what they say") {
  cluster c("single.yaml");
  const auto& talk = golden()[0]; // "Count from 53 to 65."
  json base{{"prompt", talk.prompt}, {"temperature", 0}, {"max_tokens", 256}};
  auto with = [&](const json& more) {
    auto request = base;
    request.update(more);
    return c.post_json("/v1/completions", request);
  };

  auto plain = with({{"return_token_ids", true}}).at("choices").at(0);
  CHECK(plain.at("text") == talk.text);
  CHECK(plain.at("token_ids") == talk.tokens);
  CHECK(plain.at("prompt_token_ids") == talk.prompt);
  CHECK(plain.at("finish_reason") == "stop");

  auto twice = with({{"n", 2}}).at("choices");
  REQUIRE(twice.size() == 2);
  for (std::size_t i = 0; i < 2; ++i) {
    CHECK(twice[i].at("index") == i);
    CHECK(twice[i].at("text") == talk.text);
  }

  auto stopped = with({{"stop", {"57", "never"}}}).at("choices").at(0);
  CHECK(stopped.at("text") == talk.text.substr(0, talk.text.find("57")));
  CHECK(stopped.at("finish_reason") == "stop");
  CHECK(stopped.at("stop_reason") == "57");
  auto kept = with({{"stop", "57"}, {"include_stop_str_in_output", true}}).at("choices").at(0);
  CHECK(kept.at("text") == talk.text.substr(0, talk.text.find("57") + 2));

  auto cut = with({{"max_tokens", 7}, {"return_token_ids", true}}).at("choices").at(0);
  CHECK(cut.at("token_ids")
        == std::vector<std::int32_t>(talk.tokens.begin(), talk.tokens.begin() + 7));
  CHECK(cut.at("finish_reason") == "length");

  auto longer =
    with(
      {{"ignore_eos", true}, {"max_tokens", talk.tokens.size() + 20}, {"return_token_ids", true}})
      .at("choices")
      .at(0);
  CHECK(longer.at("token_ids").size() == talk.tokens.size() + 20);
  CHECK(longer.at("finish_reason") == "length");
  auto at_least =
    with({{"min_tokens", talk.tokens.size() + 5}, {"return_token_ids", true}}).at("choices").at(0);
  CHECK(at_least.at("token_ids").size() >= talk.tokens.size() + 5);

  auto echoed =
    with({{"prompt", "Count from 53"}, {"echo", true}, {"max_tokens", 2}}).at("choices").at(0);
  CHECK(echoed.at("text").get<std::string>().starts_with("Count from 53"));

  auto two_prompts = with({{"prompt", {talk.prompt, golden()[9].prompt}}}).at("choices");
  REQUIRE(two_prompts.size() == 2);
  CHECK(two_prompts[0].at("text") == talk.text);
  CHECK(two_prompts[1].at("text") == golden()[9].text);

  // Drawn at random: the same seed gives the same answer, alone and beside others, and another
  // seed another one. The prompt is nonsense, so that no continuation is likely.
  auto draw = [&](std::uint64_t seed, int n = 1) {
    auto answer = with({{"prompt", {500, 3, 741, 12}},
                        {"temperature", 2.0},
                        {"top_p", 1.0},
                        {"seed", seed},
                        {"n", n},
                        {"max_tokens", 200},
                        {"ignore_eos", true},
                        {"return_token_ids", true}});
    std::vector<json> answers;
    for (const auto& choice : answer.at("choices"))
      answers.push_back(choice.at("token_ids"));
    return answers;
  };
  auto drawn = draw(41);
  std::set<json> different(drawn.begin(), drawn.end());
  {
    golden_load load(c.endpoint(), 12);
    CHECK(draw(41) == drawn);
    for (std::uint64_t seed = 42; seed < 46; ++seed)
      different.insert(draw(seed).front());
    auto choices = draw(41, 3); // choice i is drawn with seed + i
    CHECK(choices.front() == drawn.front());
    CHECK(std::set<json>(choices.begin(), choices.end()).size() == 3);
    load.finish();
    CHECK(load.problems().empty());
  }
  CHECK(different.size() == 5);

  auto chunks = stream(c, "/v1/completions",
                       {{"prompt", talk.prompt},
                        {"temperature", 0},
                        {"max_tokens", 9},
                        {"stream_options", {{"include_usage", true}}}});
  CHECK(chunks.back().at("usage").at("completion_tokens") == 9);
  CHECK(chunks.back().at("choices").empty());
  c.end();
}

TEST_CASE("the service's other endpoints answer") {
  cluster c("local.yaml");
  const auto& talk = golden()[0];

  auto models = json::parse(c.get("/v1/models").body);
  REQUIRE(models.at("data").size() == 1);
  CHECK(models.at("data").at(0).at("id") == "troupe-mini");
  CHECK(models.at("data").at(0).at("max_model_len") == 2048);
  CHECK(json::parse(c.get("/v1/models/troupe-mini").body).at("id") == "troupe-mini");
  CHECK(c.get("/v1/models/other").status == 404);

  auto tokens =
    c.post_json("/tokenize", {{"messages", {{{"role", "user"}, {"content", talk.question}}}}});
  CHECK(tokens.at("tokens") == talk.prompt);
  CHECK(tokens.at("count") == talk.prompt.size());
  auto text = c.post_json("/tokenize", {{"prompt", talk.text}, {"add_special_tokens", false}});
  auto answer_tokens = talk.tokens;
  answer_tokens.pop_back(); // the end of the text
  CHECK(c.post_json("/detokenize", {{"tokens", answer_tokens}}).at("prompt") == talk.text);
  CHECK(c.post_json("/detokenize", {{"tokens", text.at("tokens")}}).at("prompt") == talk.text);

  CHECK(c.get("/health").status == 200);
  CHECK(json::parse(c.get("/version").body).at("version").is_string());
  CHECK(c.get("/").body.starts_with("<!doctype html>"));

  auto status = c.status();
  CHECK(status.at("cluster") == c.name());
  CHECK(status.at("endpoint") == c.endpoint());
  std::set<std::string> actors;
  std::set<int> pids{status.at("controller").at("pid"), status.at("frontend").at("pid")};
  for (const auto& node : status.at("nodes")) {
    pids.insert(node.at("pid").get<int>());
    for (const auto& worker : node.at("workers")) {
      pids.insert(worker.at("pid").get<int>());
      for (const auto& actor : worker.at("actors"))
        actors.insert(actor.at("kind"));
    }
  }
  CHECK(actors == std::set<std::string>{"stage", "expert_group"});
  CHECK(pids.size() == 7);
  CHECK(pids.count(0) == 0);

  auto before = c.metrics();
  auto got = stream_completion(c.endpoint(), golden_request(talk));
  CHECK(got.difference(talk) == "");
  auto after = c.metrics();
  CHECK(after.at("troupe_generated_tokens_total") - before.at("troupe_generated_tokens_total")
        == static_cast<double>(talk.tokens.size()));
  CHECK(after.at("troupe_prompt_tokens_total") - before.at("troupe_prompt_tokens_total")
        == static_cast<double>(talk.prompt.size()));
  CHECK(after.at("troupe_time_to_first_token_seconds_count")
        == before.at("troupe_time_to_first_token_seconds_count") + 1);
  CHECK(after.at("troupe_frontend_resident_bytes") > 1e6);
  CHECK(after.at("troupe_replica_serving{replica=\"0\"}") == 1);
  c.end();
}
