#include "troupe/http/openai_request.hpp"

#include "openai_fixture.hpp"

#include <catch2/catch.hpp>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <random>

namespace troupe::http::openai_testing {

namespace {

const char* kChat =
  R"({"model":"troupe-mini","messages":[{"role":"user","content":"What is 2 + 3?"}]})";

struct bad_body {
  std::string body;
  error_code code;
  std::vector<std::string> mentions; ///< the field, the value, the range
};

void check_refused(const bad_body& bad, bool chat) {
  INFO(bad.body.substr(0, 300));
  const auto r = chat ? parse_chat_request(bad.body, mini_model(), 1)
                      : parse_text_request(bad.body, mini_model(), 1);
  REQUIRE_FALSE(r.has_value());
  INFO(r.error().text());
  CHECK(r.error().code == bad.code);
  for (const std::string& word : bad.mentions)
    CHECK_THAT(r.error().cause, Catch::Contains(word));
  CHECK_FALSE(r.error().origin.empty());
  const error_reply reply = error_response(r.error());
  CHECK(reply.status == (bad.code == error_code::not_found ? 404 : 400));
  CHECK(json::parse(reply.body)["error"]["message"].get<std::string>().size() > 10);
}

/// A chat body with one more field.
std::string chat_with(const std::string& field) {
  return "{" + field + R"(,"messages":[{"role":"user","content":"What is 2 + 3?"}]})";
}

std::string text_with(const std::string& field) {
  return R"({"prompt":"hi",)" + field + "}";
}

constexpr auto kInvalid = error_code::invalid_request;

} // namespace

TEST_CASE("a plain chat gets every default") {
  const auto r = parse_ok(json::parse(kChat), true);
  CHECK(r.chat);
  REQUIRE(r.prompts.size() == 1);
  CHECK(r.prompts[0].tokens.front() == 1017);
  CHECK(std::count(r.prompts[0].tokens.begin(), r.prompts[0].tokens.end(), 1017) == 1);
  CHECK(r.prompts[0].num_added_tokens == 0);
  CHECK(r.prompts[0].max_tokens == 2048 - r.prompts[0].tokens.size());
  CHECK(r.n == 1);
  CHECK(r.draw.temperature == 0.6F);
  CHECK(r.draw.top_p == 0.95F);
  CHECK(r.draw.seed == 7);
  CHECK(r.stop_tokens == std::vector<std::int32_t>{1018});
  CHECK(r.num_logprobs == -1);
  CHECK(r.num_prompt_logprobs == -1);
  CHECK(r.split_reasoning);
  CHECK(r.include_reasoning);
  CHECK_FALSE(r.stream);
}

TEST_CASE("a plain completion gets every default") {
  const auto r = parse_ok({{"prompt", "hi"}}, false);
  CHECK_FALSE(r.chat);
  CHECK_FALSE(r.split_reasoning);
  REQUIRE(r.prompts.size() == 1);
  CHECK(r.prompts[0].text == "hi");
  CHECK(r.prompts[0].tokens.front() == 1017);
  CHECK(r.prompts[0].num_added_tokens == 1);
  CHECK(r.prompts[0].max_tokens == 16);
}

TEST_CASE("every field arrives") {
  const auto r = parse_ok(json::parse(R"({
    "model": "troupe-mini", "prompt": [[1, 2], [3]], "n": 2, "best_of": 2, "max_tokens": 40,
    "min_tokens": 5, "temperature": 1.5, "top_p": 0.5, "top_k": 20, "min_p": 0.1, "seed": -1,
    "stop": ["\n", "END"], "stop_token_ids": [9], "stream": true,
    "stream_options": {"include_usage": true}, "logprobs": 3, "echo": true, "ignore_eos": true,
    "return_token_ids": true, "return_tokens_as_token_ids": true, "skip_special_tokens": false,
    "include_stop_str_in_output": true, "include_reasoning": false})"),
                          false);
  REQUIRE(r.prompts.size() == 2);
  CHECK(r.prompts[0].tokens == std::vector<std::int32_t>{1, 2});
  CHECK_FALSE(r.prompts[0].text.has_value());
  CHECK(r.num_choices() == 4);
  CHECK(r.prompts[1].max_tokens == 40);
  CHECK(r.min_tokens == 5);
  CHECK(r.draw.temperature == 1.5F);
  CHECK(r.draw.top_p == 0.5F);
  CHECK(r.draw.top_k == 20);
  CHECK(r.draw.min_p == 0.1F);
  CHECK(r.draw.seed == UINT64_MAX);
  CHECK(r.stop == std::vector<std::string>{"\n", "END"});
  CHECK(r.stop_tokens == std::vector<std::int32_t>{9});
  CHECK((r.stream && r.include_usage && r.echo && r.return_token_ids && r.tokens_as_ids));
  CHECK((!r.skip_special_tokens && r.include_stop && !r.include_reasoning));
  CHECK(r.num_logprobs == 3);
}

TEST_CASE("good bodies are taken", "[table]") {
  const std::vector<std::pair<bool, std::string>> bodies{
    {true, kChat},
    {true, R"({"messages":[{"role":"user","content":"no model named"}]})"},
    {true, R"({"messages":[{"role":"developer","content":"a"},{"role":"user","content":"x"}]})"},
    {true, R"({"messages":[{"role":"user","content":[{"type":"text","text":"a"},"b"]}]})"},
    {true, R"({"messages":[{"role":"user","content":"x","name":"me","tool_calls":null}]})"},
    {true, chat_with(R"("max_tokens":null,"stop":null,"n":null,"seed":null,"stream":null)")},
    {true, chat_with(R"("temperature":null,"top_p":null,"stream_options":null,"logprobs":null)")},
    {true, chat_with(R"("max_tokens":16.0)")},
    {true, chat_with(R"("max_completion_tokens":16,"max_tokens":99999)")},
    {true, chat_with(R"("frequency_penalty":0,"presence_penalty":0.0,"logit_bias":{})")},
    {true, chat_with(R"("tools":[],"tool_choice":"auto","response_format":{"type":"text"})")},
    {true, chat_with(R"("user":"u","metadata":{"a":1},"store":false,"something_new":[1,{"a":2}])")},
    {true, chat_with(R"("logprobs":true,"top_logprobs":20)")},
    {true, chat_with(R"("top_k":-1,"seed":18446744073709551615,"temperature":2)")},
    {true, chat_with(R"("temperature":0,"top_p":1,"min_p":1)")},
    {true, chat_with(R"("prompt_logprobs":0)")},
    {true, chat_with(R"("chat_template_kwargs":{"thinking":true})")},
    {false, R"({"prompt":""})"},
    {false, R"({"prompt":["a","b"]})"},
    {false, R"({"prompt":[0,1023]})"},
    {false, R"({"prompt":[[0],"mixed is fine"]})"},
    {false, text_with(R"("max_tokens":0,"echo":true,"logprobs":5)")},
    {false, text_with(R"("stop":"x","best_of":1,"suffix":"")")},
    {false, text_with(R"("max_tokens":2045)")},
  };
  for (const auto& [chat, body] : bodies) {
    INFO(body);
    const auto r =
      chat ? parse_chat_request(body, mini_model(), 1) : parse_text_request(body, mini_model(), 1);
    if (!r)
      FAIL(r.error().text());
  }
}

TEST_CASE("bad bodies are refused by name", "[table]") {
  const std::vector<bad_body> both{
    {"", kInvalid, {"body", "empty"}},
    {"hello", kInvalid, {"not JSON"}},
    {R"({"prompt": )", kInvalid, {"not JSON"}},
    {"[]", kInvalid, {"a list of 0", "object is expected"}},
    {"42", kInvalid, {"42", "object"}},
    {"null", kInvalid, {"null", "object"}},
    {R"({"temperature": NaN})", kInvalid, {"not JSON"}},
    {R"({"temperature": 1e999})", kInvalid, {"not JSON", "1e999"}},
    {"{\"prompt\": \"\xff\xfe\"}", kInvalid, {"not JSON", "UTF-8"}},
    {R"({"prompt": "\ud800"})", kInvalid, {"not JSON", "surrogate"}},
    {std::string(100000, '['), kInvalid, {"nested 100000 levels", "64"}},
    {R"({"prompt":)" + std::string(65, '[') + std::string(65, ']') + "}", kInvalid, {"nested 66"}},
    {R"({"a":")" + std::string(200, '{'), kInvalid, {"not JSON"}},
  };
  for (const auto& bad : both) {
    check_refused(bad, true);
    check_refused(bad, false);
  }
}

TEST_CASE("bad fields are refused by name", "[table]") {
  const std::vector<bad_body> fields{
    {R"("model":"gpt-4")", error_code::not_found, {"model", "gpt-4", "troupe-mini"}},
    {R"("model":7)", kInvalid, {"model", "7", "string"}},
    {R"("n":0)", kInvalid, {"n: 0", "1 to 16"}},
    {R"("n":17)", kInvalid, {"n: 17", "1 to 16"}},
    {R"("n":1.5)", kInvalid, {"n: 1.5"}},
    {R"("n":true)", kInvalid, {"n: true", "an integer"}},
    {R"("best_of":3)", kInvalid, {"best_of: 3", "n, which is 1"}},
    {R"("max_tokens":-1)", kInvalid, {"max_tokens: -1", "1 to"}},
    {R"("max_tokens":0)", kInvalid, {"max_tokens: 0", "1 to"}},
    {R"("max_tokens":"16")", kInvalid, {"max_tokens", "\"16\"", "integer"}},
    {R"("max_tokens":99999999999999999999)", kInvalid, {"max_tokens", "range"}},
    {R"("max_tokens":1e300)", kInvalid, {"max_tokens", "range"}},
    {R"("max_tokens":3000)", kInvalid, {"max_tokens: 3000", "2048"}},
    {R"("max_completion_tokens":-5)", kInvalid, {"max_completion_tokens: -5"}},
    {R"("min_tokens":-1)", kInvalid, {"min_tokens: -1"}},
    {R"("min_tokens":9,"max_tokens":8)", kInvalid, {"min_tokens: 9", "0 to 8"}},
    {R"("temperature":-0.1)", kInvalid, {"temperature: -0.1", "0 to 2"}},
    {R"("temperature":2.1)", kInvalid, {"temperature: 2.1", "0 to 2"}},
    {R"("temperature":"hot")", kInvalid, {"temperature", "hot", "a number"}},
    {R"("top_p":0)", kInvalid, {"top_p: 0", "above 0 to 1"}},
    {R"("top_p":1.01)", kInvalid, {"top_p: 1.01"}},
    {R"("top_k":-2)", kInvalid, {"top_k: -2"}},
    {R"("min_p":1.5)", kInvalid, {"min_p: 1.5", "0 to 1"}},
    {R"("seed":1.5)", kInvalid, {"seed: 1.5"}},
    {R"("seed":1e30)", kInvalid, {"seed"}},
    {R"("stop":5)", kInvalid, {"stop: 5"}},
    {R"("stop":["a",5])", kInvalid, {"stop", "element 1", "5"}},
    {R"("stop":"")", kInvalid, {"stop", "0 bytes"}},
    {R"("stop":["1","2","3","4","5","6","7","8","9","a","b","c","d","e","f","g","h"])",
     kInvalid,
     {"stop: 17", "16"}},
    {R"("stop_token_ids":[1024])", kInvalid, {"stop_token_ids", "1024", "0 to 1023"}},
    {R"("stop_token_ids":["x"])", kInvalid, {"stop_token_ids", "element 0"}},
    {R"("stop_token_ids":3)", kInvalid, {"stop_token_ids: 3"}},
    {R"("stream":"yes")", kInvalid, {"stream", "yes", "true or false"}},
    {R"("stream":1)", kInvalid, {"stream: 1"}},
    {R"("stream_options":{"include_usage":true})", kInvalid, {"stream_options", "stream"}},
    {R"("stream":true,"stream_options":3)", kInvalid, {"stream_options: 3"}},
    {R"("stream":true,"stream_options":{"include_usage":3})",
     kInvalid,
     {"stream_options.include_usage: 3"}},
    {R"("prompt_logprobs":21)", kInvalid, {"prompt_logprobs: 21", "0 to 20"}},
    {R"("prompt_logprobs":1,"stream":true)", kInvalid, {"prompt_logprobs: 1", "stream"}},
    {R"("ignore_eos":0)", kInvalid, {"ignore_eos: 0"}},
    {R"("frequency_penalty":0.5)", kInvalid, {"frequency_penalty: 0.5", "not supported"}},
    {R"("presence_penalty":-1)", kInvalid, {"presence_penalty: -1", "not supported"}},
    {R"("logit_bias":{"5":100})", kInvalid, {"logit_bias", "not supported"}},
    {R"("tools":[{"type":"function","function":{"name":"f"}}])", kInvalid, {"tools: "}},
    {R"("tool_choice":"required")", kInvalid, {"tool_choice: \"required\""}},
    {R"("response_format":{"type":"json_object"})", kInvalid, {"response_format"}},
    {R"("use_beam_search":true)", kInvalid, {"use_beam_search"}},
  };
  for (bad_body bad : fields) {
    const std::string field = bad.body;
    bad.body = chat_with(field);
    check_refused(bad, true);
    bad.body = text_with(field);
    check_refused(bad, false);
  }
}

TEST_CASE("bad chats are refused by name", "[table]") {
  const std::string user = R"({"role":"user","content":"x"})";
  const std::vector<bad_body> bodies{
    {"{}", kInvalid, {"messages", "missing"}},
    {R"({"messages":null})", kInvalid, {"messages", "missing"}},
    {R"({"messages":"hi"})", kInvalid, {"messages", "hi", "list"}},
    {R"({"messages":[]})", kInvalid, {"messages", "empty"}},
    {R"({"messages":["hi"]})", kInvalid, {"messages[0]", "hi"}},
    {R"({"messages":[)" + user + R"(,{"role":"wizard","content":"x"}]})",
     kInvalid,
     {"messages[1].role", "wizard", "assistant"}},
    {R"({"messages":[{"role":"function","content":"x"}]})",
     kInvalid,
     {"messages[0].role", "function", "tool"}},
    {R"({"messages":[{"role":"user","content":"x","tool_calls":[{}]}]})",
     kInvalid,
     {"messages[0].tool_calls", "assistant"}},
    {R"({"messages":[{"role":"tool","content":"x","tool_call_id":5}]})",
     kInvalid,
     {"messages[0].tool_call_id: 5"}},
    {R"({"messages":[{"role":"user","content":"x","name":[]}]})", kInvalid, {"messages[0].name"}},
    {R"({"messages":[{"role":"assistant","tool_calls":5}]})",
     kInvalid,
     {"messages[0].tool_calls: 5"}},
    {R"({"messages":[{"role":"assistant","tool_calls":[{"function":{"name":"f"}}]}]})",
     kInvalid,
     {"messages[0].tool_calls[0].function.arguments", "missing"}},
    {R"({"messages":[{"role":"assistant","tool_calls":[{"type":"x","function":{}}]}]})",
     kInvalid,
     {"messages[0].tool_calls[0].type", "function"}},
    {chat_with(R"("tools":5)"), kInvalid, {"tools: 5", "list"}},
    {chat_with(R"("tools":[5])"), kInvalid, {"tools[0]: 5"}},
    {chat_with(R"("tools":[{"type":"mcp"}])"), kInvalid, {"tools[0].type: \"mcp\"", "function"}},
    {chat_with(R"("tools":[{"type":"function"}])"), kInvalid, {"tools[0].function", "missing"}},
    {chat_with(R"("tools":[{"function":{"name":""}}])"), kInvalid, {"tools[0].function.name"}},
    {chat_with(R"("tools":[{"function":{"name":"f","parameters":[]}}])"),
     kInvalid,
     {"tools[0].function.parameters", "object"}},
    {chat_with(R"("tools":[{"function":{"name":"f","description":1}}])"),
     kInvalid,
     {"tools[0].function.description: 1", "string"}},
    {chat_with(R"("tools":[{"function":{"name":"f"}}])"), kInvalid, {"tools", "chat template"}},
    {chat_with(R"("tool_choice":"required")"), kInvalid, {"tool_choice", "use \"auto\""}},
    {chat_with(R"("tool_choice":{"type":"function","function":{"name":"f"}})"),
     kInvalid,
     {"tool_choice", "use \"auto\""}},
    {chat_with(R"("tool_choice":"any")"), kInvalid, {"tool_choice: \"any\"", "none, auto"}},
    {chat_with(R"("parallel_tool_calls":1)"), kInvalid, {"parallel_tool_calls: 1"}},
    {R"({"messages":[{"content":"x"}]})", kInvalid, {"messages[0].role", "missing"}},
    {R"({"messages":[{"role":5,"content":"x"}]})", kInvalid, {"messages[0].role", "5"}},
    {R"({"messages":[{"role":"user"}]})", kInvalid, {"messages[0].content", "missing"}},
    {R"({"messages":[{"role":"user","content":5}]})", kInvalid, {"messages[0].content", "5"}},
    {R"({"messages":[{"role":"user","content":[{"type":"image_url"}]}]})",
     kInvalid,
     {"messages[0].content[0].type", "image_url"}},
    {R"({"messages":[{"role":"user","content":[{"type":"text"}]}]})",
     kInvalid,
     {"messages[0].content[0].text", "missing"}},
    {R"({"messages":[{"role":"user","content":[7]}]})", kInvalid, {"messages[0].content[0]", "7"}},
    {R"({"messages":[{"role":"assistant","content":"x","tool_calls":[{}]}]})",
     kInvalid,
     {"messages[0].tool_calls"}},
    {chat_with(R"("logprobs":3)"), kInvalid, {"logprobs: 3", "true or false"}},
    {chat_with(R"("top_logprobs":3)"), kInvalid, {"top_logprobs: 3", "logprobs"}},
    {chat_with(R"("logprobs":true,"top_logprobs":21)"), kInvalid, {"top_logprobs: 21", "0 to 20"}},
    {chat_with(R"("echo":true)"), kInvalid, {"echo"}},
    {chat_with(R"("chat_template_kwargs":5)"), kInvalid, {"chat_template_kwargs: 5"}},
    {chat_with(R"("chat_template":"x")"), kInvalid, {"chat_template"}},
    {json{{"messages", {{{"role", "user"}, {"content", std::string(9000, '7')}}}}}.dump(),
     error_code::too_large,
     {"messages", "2048", "tokens"}},
  };
  for (const auto& bad : bodies)
    check_refused(bad, true);
}

TEST_CASE("bad prompts are refused by name", "[table]") {
  const std::vector<bad_body> bodies{
    {"{}", kInvalid, {"prompt", "missing"}},
    {R"({"prompt":5})", kInvalid, {"prompt: 5"}},
    {R"({"prompt":{}})", kInvalid, {"prompt", "object"}},
    {R"({"prompt":[]})", kInvalid, {"prompt", "empty"}},
    {R"({"prompt":[[]]})", kInvalid, {"prompt", "no tokens"}},
    {R"({"prompt":[1,"a"]})", kInvalid, {"prompt", "element 1", "\"a\""}},
    {R"({"prompt":[1,1024]})", kInvalid, {"prompt", "1024", "index 1", "0 to 1023"}},
    {R"({"prompt":[-1]})", kInvalid, {"prompt", "-1"}},
    {R"({"prompt":[1.5]})", kInvalid, {"prompt", "1.5"}},
    {R"({"prompt":[99999999999]})", kInvalid, {"prompt", "99999999999"}},
    {R"({"prompt":["a",true]})", kInvalid, {"prompt[1]", "true"}},
    {R"({"prompt":[[1],[2000]]})", kInvalid, {"prompt[1]", "2000"}},
    {R"({"prompt":"","add_special_tokens":false})", kInvalid, {"prompt", "no tokens"}},
    {text_with(R"("logprobs":true)"), kInvalid, {"logprobs: true", "0 to 20"}},
    {text_with(R"("logprobs":21)"), kInvalid, {"logprobs: 21", "0 to 20"}},
    {text_with(R"("echo":true,"max_tokens":-1)"), kInvalid, {"max_tokens: -1", "0 to"}},
    {text_with(R"("suffix":"x")"), kInvalid, {"suffix"}},
    {json{{"prompt", std::vector<int>(2048, 5)}}.dump(),
     error_code::too_large,
     {"prompt", "has 2048 tokens", "context is 2048"}},
    {json{{"prompt", std::vector<std::string>(100, "a")}, {"n", 16}}.dump(),
     error_code::too_large,
     {"prompt", "100", "1024"}},
  };
  for (const auto& bad : bodies)
    check_refused(bad, false);
}

TEST_CASE("objects that would take seconds to read are refused") {
  std::string body = R"({"messages":[{"role":"user","content":"x"}],"metadata":{)";
  for (int i = 0; i < 1025; ++i)
    body += fmt::format("{}\"k{}\":[1,2]", i > 0 ? "," : "", i);
  check_refused({body + "}}", kInvalid, {"1025 members", "1024"}}, true);
}

TEST_CASE("developer turns become system turns and text parts are joined") {
  const auto r = parse_ok(json::parse(R"({"messages":[{"role":"developer","content":"a"},
    {"role":"user","content":[{"type":"text","text":"b"},{"type":"text","text":"c"}]}]})"),
                          true);
  CHECK(r.prompts[0].text == "<｜begin▁of▁sentence｜>a<｜User｜>b\nc<｜Assistant｜><think>\n");
}

TEST_CASE("each choice becomes a request of the scheduler") {
  auto r = parse_ok({{"prompt", {{1, 2}, {3}}},
                     {"n", 3},
                     {"seed", 10},
                     {"logprobs", 2},
                     {"echo", true},
                     {"max_tokens", 5},
                     {"stop_token_ids", {7}}},
                    false);
  const schedule::time_point deadline{std::chrono::seconds(9)};
  const auto requests = to_schedule(r, 50, deadline);
  REQUIRE(requests.size() == 6);
  for (std::size_t i = 0; i < 6; ++i) {
    CHECK(requests[i].id == 50 + i);
    CHECK(requests[i].draw.seed == 10 + i);
    CHECK(requests[i].prompt
          == (i < 3 ? std::vector<std::int32_t>{1, 2} : std::vector<std::int32_t>{3}));
    CHECK(requests[i].max_tokens == 5);
    CHECK(requests[i].num_logprobs == 2);
    CHECK(requests[i].num_prompt_logprobs == 2);
    CHECK(requests[i].stop_tokens == std::vector<std::int32_t>{1018, 7});
    CHECK(requests[i].deadline == deadline);
  }
  r.echo = false;
  CHECK(to_schedule(r, 0, deadline)[0].num_prompt_logprobs == -1);
  const auto scored = parse_ok({{"prompt", "hi"}, {"echo", true}, {"max_tokens", 0}}, false);
  CHECK(scored.score_only);
  CHECK(to_schedule(scored, 0, deadline)[0].max_tokens == 1);
}

TEST_CASE("mutated bodies never break the parser", "[fuzz]") {
  const std::vector<std::string> seeds{
    chat_with(R"("max_tokens":5,"stop":["a","b"],"logprobs":true,"top_logprobs":2,"seed":1)"),
    text_with(R"("n":2,"logprobs":1,"echo":true,"stop":"\n","temperature":0.5)"),
    R"({"prompt":[[1,2,3],[4]],"stream":true,"stream_options":{"include_usage":true}})",
  };
  const std::string alphabet = "\"{}[]:,-+.eE0123456789truefalsn \\u\xff\xc3\x80";
  std::mt19937_64 random(20240611);
  const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random() % n); };
  std::size_t num_taken = 0;
  std::size_t num_refused = 0;
  for (int round = 0; round < 6000; ++round) {
    std::string body = seeds[below(seeds.size())];
    for (std::size_t edits = 1 + below(4); edits > 0 && !body.empty(); --edits) {
      const std::size_t at = below(body.size());
      switch (below(4)) {
      case 0: body[at] = alphabet[below(alphabet.size())]; break;
      case 1: body.insert(at, 1, alphabet[below(alphabet.size())]); break;
      case 2: body.erase(at, 1 + below(3)); break;
      default: body.insert(at, body.substr(below(body.size()), 1 + below(12)));
      }
    }
    for (const bool chat : {true, false}) {
      const auto r = chat ? parse_chat_request(body, mini_model(), 1)
                          : parse_text_request(body, mini_model(), 1);
      if (r) {
        ++num_taken;
        REQUIRE(r->num_choices() >= 1);
        for (const auto& p : r->prompts)
          REQUIRE(
            (p.max_tokens >= 1 && !p.tokens.empty() && p.tokens.size() + p.max_tokens <= 2048));
        REQUIRE((r->n >= 1 && r->n <= 16 && r->draw.temperature >= 0 && r->draw.temperature <= 2));
      } else {
        ++num_refused;
        const auto reply = error_response(r.error());
        REQUIRE((reply.status == 400 || reply.status == 404));
        REQUIRE(json::accept(reply.body));
      }
    }
  }
  CHECK(num_taken > 200); // both ways are exercised
  CHECK(num_refused > 2000);
}

} // namespace troupe::http::openai_testing
