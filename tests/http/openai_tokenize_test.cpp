#include "troupe/http/openai_tokenize.hpp"

#include "openai_fixture.hpp"

#include <catch2/catch.hpp>

namespace troupe::http::openai_testing {

namespace {

json tokenize_ok(const json& body) {
  const auto r = tokenize(body.dump(), mini_model());
  if (!r)
    throw std::runtime_error(r.error().text());
  return json::parse(*r);
}

} // namespace

TEST_CASE("tokenize gives ids, their number and the context") {
  const std::string question = "What is 2 + 3?";
  json expected_tokens = encode(question);
  CHECK(tokenize_ok({{"prompt", question}, {"add_special_tokens", false}})
        == json{{"count", expected_tokens.size()},
                {"max_model_len", 2048},
                {"tokens", expected_tokens},
                {"token_strs", nullptr}});
  expected_tokens.insert(expected_tokens.begin(), 1017);
  CHECK(tokenize_ok({{"prompt", question}})["tokens"] == expected_tokens);
  const json named = tokenize_ok({{"prompt", ""}, {"return_token_strs", true}});
  CHECK(named["token_strs"] == json::array({"<｜begin▁of▁sentence｜>"}));
}

TEST_CASE("tokenize renders conversations as a chat would be") {
  const json messages = {{{"role", "user"}, {"content", "What is 2 + 3?"}}};
  const auto chat = parse_ok({{"messages", messages}}, true);
  const json open = tokenize_ok({{"messages", messages}, {"model", "troupe-mini"}});
  CHECK(open["tokens"] == json(chat.prompts[0].tokens));
  const json closed = tokenize_ok({{"messages", messages}, {"add_generation_prompt", false}});
  CHECK(closed["count"] < open["count"]);
}

TEST_CASE("detokenize is the way back") {
  for (const conversation& c : golden()) {
    const auto r = detokenize(json{{"tokens", c.prompt}}.dump(), mini_model());
    REQUIRE(r.has_value());
    const json again =
      tokenize_ok({{"prompt", json::parse(*r)["prompt"]}, {"add_special_tokens", false}});
    CHECK(again["tokens"] == json(c.prompt));
  }
  CHECK(*detokenize(R"({"tokens":[]})", mini_model()) == R"({"prompt":""})");
}

TEST_CASE("wrong bodies of tokenize and detokenize are refused by name", "[table]") {
  const std::vector<std::pair<std::string, std::string>> bad_tokenize{
    {"{}", "prompt"},
    {R"({"prompt":5})", "prompt"},
    {R"({"prompt":"x","model":"y"})", "model"},
    {R"({"messages":[]})", "messages"},
    {R"({"prompt":"x","messages":[]})", "messages"},
    {R"({"prompt":"x","add_special_tokens":2})", "add_special_tokens"}};
  for (const auto& [body, param] : bad_tokenize) {
    INFO(body);
    const auto r = tokenize(body, mini_model());
    REQUIRE_FALSE(r.has_value());
    CHECK(r.error().param == param);
  }
  const std::vector<std::pair<std::string, std::string>> bad_detokenize{
    {"{}", "missing"},
    {R"({"tokens":"x"})", "\"x\""},
    {R"({"tokens":[1024]})", "1024"},
    {R"({"tokens":[-1]})", "-1"},
    {R"({"tokens":[1.5]})", "1.5"}};
  for (const auto& [body, word] : bad_detokenize) {
    INFO(body);
    const auto r = detokenize(body, mini_model());
    REQUIRE_FALSE(r.has_value());
    CHECK(r.error().param == "tokens");
    CHECK_THAT(r.error().cause, Catch::Contains(word));
  }
}

TEST_CASE("the model is listed") {
  const json one = {{"id", "troupe-mini"},  {"object", "model"},     {"created", 9},
                    {"owned_by", "troupe"}, {"root", "troupe-mini"}, {"parent", nullptr},
                    {"max_model_len", 2048}};
  CHECK(json::parse(models_body(mini_model(), 9)) == json{{"object", "list"}, {"data", {one}}});
  CHECK(json::parse(*model_body("troupe-mini", mini_model(), 9)) == one);
  const auto other = model_body("gpt\xff", mini_model(), 9);
  REQUIRE_FALSE(other.has_value());
  CHECK(error_response(other.error()).status == 404);
  CHECK(json::accept(error_response(other.error()).body));
}

} // namespace troupe::http::openai_testing
