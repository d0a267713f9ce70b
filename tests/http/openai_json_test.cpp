#include "troupe/http/openai_error.hpp"
#include "troupe/http/openai_fields.hpp"
#include "troupe/http/openai_json.hpp"
#include "troupe/model/json_shape.hpp"

#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>

#include <cmath>
#include <limits>
#include <random>

namespace troupe::http::openai_testing {

using nlohmann::json;

namespace {

std::string as_json(std::string_view text) {
  std::string out;
  append_json_string(out, text);
  return out;
}

std::string logprob_text(float value) {
  std::string out;
  append_json_logprob(out, value);
  return out;
}

} // namespace

TEST_CASE("strings are escaped as JSON wants it") {
  CHECK(as_json("") == R"("")");
  CHECK(as_json("plain text") == R"("plain text")");
  CHECK(as_json("a\"b\\c/") == R"("a\"b\\c/")");
  CHECK(as_json("\n\r\t\b\f") == R"("\n\r\t\b\f")");
  CHECK(as_json(std::string_view("\0\x01\x1f\x7f", 4)) == "\"\\u0000\\u0001\\u001f\x7f\"");
  CHECK(as_json("é｜😀") == "\"é｜😀\"");
  CHECK(as_json("a\xffz") == "\"a\xEF\xBF\xBDz\"");
  CHECK(as_json("\xe2\x82") == "\"\xEF\xBF\xBD\"");                 // cut character
  CHECK(as_json("\xed\xa0\x80").find('\xed') == std::string::npos); // surrogate
}

TEST_CASE("any bytes become valid JSON, and valid text survives unchanged") {
  std::mt19937 random(11);
  for (int round = 0; round < 3000; ++round) {
    std::string bytes(random() % 20, '\0');
    for (char& c : bytes)
      c = static_cast<char>(random() % 4 == 0 ? 0x80 + random() % 0x80 : random() % 0x80);
    const std::string text = as_json(bytes);
    REQUIRE(json::accept(text));
    std::string replaced;
    append_valid_utf8(replaced, bytes);
    REQUIRE(json::parse(text).get<std::string>() == replaced);
    REQUIRE(as_json(replaced) == text);
  }
}

TEST_CASE("log-probabilities read back exactly and stay finite") {
  CHECK(logprob_text(-0.5F) == "-0.5");
  CHECK(logprob_text(-std::numeric_limits<float>::infinity()) == "-9999.0");
  CHECK(logprob_text(std::nanf("")) == "-9999.0");
  CHECK(logprob_text(-123456.0F) == "-9999.0");
  std::mt19937 random(5);
  std::uniform_real_distribution<float> draw(-40.0F, 0.0F);
  for (int i = 0; i < 1000; ++i) {
    const float value = draw(random) * std::pow(10.0F, static_cast<float>(i % 8) - 6.0F);
    const json parsed = json::parse(logprob_text(value));
    REQUIRE(parsed.is_number());
    REQUIRE(parsed.get<float>() == value);
  }
}

TEST_CASE("nesting is bounded before anything is parsed") {
  const auto nested = [](std::size_t depth) {
    return R"({"a":)" + std::string(depth - 1, '[') + std::string(depth - 1, ']') + "}";
  };
  CHECK(parse_json_object(nested(model::max_json_depth)).has_value());
  CHECK_FALSE(parse_json_object(nested(model::max_json_depth + 1)).has_value());
  CHECK_FALSE(parse_json_object(std::string(5'000'000, '[')).has_value());
  // Brackets within strings do not count, also behind an escaped quote.
  CHECK(parse_json_object(R"({"a":"\"\\)" + std::string(500, '[') + "\"}").has_value());
}

TEST_CASE("errors have OpenAI's shape and the status of their code") {
  const auto reply_of = [](error_code code) {
    return error_response(fail(code, "cause \"x\"", "cure").value());
  };
  const std::vector<std::pair<error_code, int>> expected_status{
    {error_code::invalid_request, 400}, {error_code::not_found, 404},
    {error_code::too_large, 413},       {error_code::overloaded, 503},
    {error_code::unavailable, 503},     {error_code::resource_exhausted, 503},
    {error_code::peer_lost, 503},       {error_code::deadline_exceeded, 504},
    {error_code::internal, 500},        {error_code::io_failed, 500},
    {error_code::cancelled, 499}};
  for (const auto& [code, status] : expected_status) {
    const error_reply reply = reply_of(code);
    CHECK(reply.status == status);
    CHECK(reply.retry_after_s.has_value() == (status == 503));
    const json e = json::parse(reply.body).at("error");
    CHECK(e.at("message") == "cause \"x\". cure");
    CHECK(e.at("type").is_string());
    CHECK(e.at("param").is_null());
    CHECK(e.at("code").is_null());
    CHECK(e.at("troupe").at("code") == std::string(to_string(code)));
    CHECK(e.at("troupe").at("origin").get<std::string>().find('/') != std::string::npos);
  }
  const auto refused =
    refuse(error_code::not_found, "model", "\"x\" does not exist", "model_not_found").value();
  const json e = json::parse(error_response(refused).body).at("error");
  CHECK(e.at("message") == "model: \"x\" does not exist");
  CHECK(e.at("param") == "model");
  CHECK(e.at("code") == "model_not_found");
  // A prompt that is too long is a bad request; only bodies are 413.
  CHECK(error_response(refuse(error_code::too_large, "prompt", "x").value()).status == 400);
}

} // namespace troupe::http::openai_testing
