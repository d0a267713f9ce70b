#include "troupe/http/answer_replay.hpp"

#include "openai_fixture.hpp"
#include "temporary_directory.hpp"

#include <catch2/catch.hpp>

#include <filesystem>
#include <iterator>
#include <memory>
#include <random>

namespace troupe::http::openai_testing {

using nlohmann::ordered_json;
using schedule::finish_reason;

namespace {

const std::string data_dir = TROUPE_SOURCE_DIR "/tests/data/text/";

std::string read_text(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  REQUIRE(in);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

/// Writes calls as DeepSeek-R1's first template does: only where the content is none.
const std::string only_without_content =
  "{% for m in messages %}{% if m['content'] is none %}"
  "{{ m['tool_calls'][0]['function']['arguments'] }}{% else %}{{ m['content'] + '|' }}"
  "{% endif %}{% endfor %}";

/// troupe-mini with the chat template of a family.
class family {
public:
  explicit family(const std::string& name) : served_(mini_model()) {
    const testing::temporary_directory dir;
    dir.write("chat_template.jinja", name == "only_without_content" ? only_without_content
                                     : name == "dated"
                                       ? "{{ strftime_now('%d %b %Y') }}{{ messages[0].content }}"
                                       : read_text(data_dir + "templates/" + name + ".jinja"));
    dir.write("tokenizer_config.json", R"({"bos_token": "<bos>"})");
    auto loaded = model::chat_renderer::load(dir.path());
    if (!loaded)
      FAIL(loaded.error().text());
    chat_ = std::make_unique<model::chat_renderer>(std::move(*loaded));
    served_.chat = chat_.get();
    served_.max_context = 100'000;
  }
  const serving_model& served() const { return served_; }

private:
  std::unique_ptr<model::chat_renderer> chat_;
  serving_model served_;
};

const json tools =
  json::parse(R"([{"type": "function", "function": {"name": "get_weather", "parameters": {}}},
                  {"type": "function", "function": {"name": "clock", "parameters": {}}}])");

json ask(const json& more = json::object()) {
  json body = {{"messages", {{{"role", "user"}, {"content", "Paris?"}}}}, {"tools", tools}};
  body.update(more);
  return body;
}

response_builder builder_of(const family& f, const json& body) {
  auto r = parse_chat_request(body.dump(), f.served(), 7);
  if (!r)
    FAIL(r.error().text());
  return response_builder(std::move(*r), mini_tokenizer(),
                          {"3-1f", "troupe-mini", 1700000000, kFirstId});
}

json choice_of(const family& f, const json& body, std::string_view text,
               finish_reason finish = finish_reason::stop) {
  auto b = builder_of(f, body);
  auto tokens = encode(text);
  if (finish == finish_reason::stop)
    tokens.push_back(1018);
  return json::parse(answer(b, events_of(0, tokens, finish)))["choices"][0];
}

json call_json(const std::string& id, const std::string& name, const std::string& arguments) {
  return {
    {"id", id}, {"type", "function"}, {"function", {{"name", name}, {"arguments", arguments}}}};
}

const std::string hermes_call =
  "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>";
const std::string hermes_clock =
  "\n<tool_call>\n{\"name\": \"clock\", \"arguments\": {}}\n</tool_call>";
const std::string deepseek_call =
  "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
  "{\"city\": \"Paris\"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
const std::string paris = R"({"city": "Paris"})";

} // namespace

TEST_CASE("chats with tools reach the template as transformers hands them over") {
  const auto golden = ordered_json::parse(read_text(data_dir + "tool_cases.json"));
  REQUIRE(golden["cases"].size() == 50);
  std::string name;
  std::unique_ptr<family> current;
  for (const auto& c : golden["cases"]) {
    if (c[0] != name) {
      name = c[0];
      current = std::make_unique<family>(name);
    }
    INFO(name << ": " << c[1].dump());
    const auto r = parse_chat_request(c[1].dump(), current->served(), 7);
    if (!r) {
      INFO(r.error().text());
      CHECK(c[2].is_null());
      CHECK(error_response(r.error()).status == 400);
      continue;
    }
    REQUIRE(c[2].is_string());
    CHECK(r->prompts[0].text == c[2].get<std::string>());
  }
}

TEST_CASE("what a template does with tools is learnt from it") {
  using model::tool_syntax;
  const auto check = [](const char* name, bool takes, tool_syntax syntax) {
    INFO(name);
    const family f(name);
    CHECK(f.served().chat->takes_tools() == takes);
    CHECK(f.served().chat->calls_as() == syntax);
  };
  check("deepseek_r1", false, tool_syntax::deepseek);
  check("deepseek_r1_tools", true, tool_syntax::deepseek);
  check("deepseek_v3_1", true, tool_syntax::deepseek);
  check("llama3_1", true, tool_syntax::llama);
  check("qwen2_5", true, tool_syntax::hermes);
  check("deepseek_llm", false, tool_syntax::none);
  CHECK_FALSE(mini_chat().takes_tools());
}

TEST_CASE("calls have the content and the arguments that a template can write") {
  const auto prompt_of = [](const char* name, const json& content, const json& arguments) {
    auto call = call_json("c", "get_weather", "");
    call["function"]["arguments"] = arguments;
    json turn = {{"role", "assistant"}, {"tool_calls", json::array({call})}};
    if (content != "absent")
      turn["content"] = content;
    const json body = {{"messages", json::array({{{"role", "user"}, {"content", "x"}}, turn})}};
    const auto r = parse_chat_request(body.dump(), family(name).served(), 7);
    return r ? *r->prompts[0].text : r.error().cause + " " + r.error().cure;
  };
  const json object = json::parse(R"({"city": "Paris", "days": [1, {"é": null}]})");
  const std::string text = R"({"city": "Paris", "days": [1, {"é": null}]})";
  for (const json& content : {json(), json(""), json("absent")}) {
    CHECK(prompt_of("only_without_content", content, text) == "x|" + text);
    CHECK(prompt_of("only_without_content", content, object) == "x|" + text);
    CHECK_THAT(prompt_of("qwen2_5", content, text), Catch::Contains(text + "}\n</tool_call>"));
    CHECK_THAT(prompt_of("qwen2_5", content, object), Catch::Contains(text + "}\n</tool_call>"));
  }
  CHECK_THAT(prompt_of("qwen2_5", nullptr, ""), Catch::Contains("{}}\n</tool_call>"));
  for (const char* bad : {"{", "[]", "Paris", "{}{}"}) {
    CHECK_THAT(prompt_of("qwen2_5", nullptr, bad),
               Catch::Contains("messages[1].tool_calls[0]") && Catch::Contains("JSON object"));
    CHECK(prompt_of("only_without_content", nullptr, bad) == std::string("x|") + bad);
  }
}

TEST_CASE("a prompt with the date is the same whenever it is read again") {
  const family f("dated");
  schedule::logged_call call;
  call.what.chat = true;
  call.what.body = R"({"messages":[{"role":"user","content":"x"}]})";
  call.what.created_ms = 1'000'000'000'999;
  call.choices.resize(1);
  const auto again = rebuild(call, f.served());
  REQUIRE(again);
  const auto first = parse_chat_request(call.what.body, f.served(), 7, 1'000'000'000);
  CHECK(again->request().prompts[0].text == first->prompts[0].text);
  CHECK_THAT(*first->prompts[0].text, Catch::Contains("2001"));
  CHECK_THAT(*parse_chat_request(call.what.body, f.served(), 7)->prompts[0].text,
             !Catch::Contains("2001"));
}

TEST_CASE("a call in each family's form") {
  const json wanted = json::array({call_json("call_3-1f-0-0", "get_weather", paris)});
  const auto check = [&](const char* name, const std::string& text) {
    INFO(name);
    const auto choice = choice_of(family(name), ask(), text);
    CHECK(choice["message"]["tool_calls"] == wanted);
    CHECK(choice["message"]["content"].is_null());
    CHECK(choice["finish_reason"] == "tool_calls");
  };
  check("qwen2_5", hermes_call);
  check("llama3_1", R"({"name": "get_weather", "parameters": {"city": "Paris"}})");
  check("deepseek_v3_1", R"(<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>)"
                           + paris + "<｜tool▁call▁end｜><｜tool▁calls▁end｜>");
  check("deepseek_r1_tools", "Hm.</think>\n\n" + deepseek_call);
}

TEST_CASE("reasoning, text and calls are told apart") {
  const auto choice = choice_of(family("deepseek_r1_tools"), ask(),
                                deepseek_call + "?</think>\n\nLet me see.\n" + deepseek_call);
  CHECK(choice["message"]["reasoning_content"] == deepseek_call + "?");
  CHECK(choice["message"]["content"] == "\n\nLet me see.");
  CHECK(choice["message"]["tool_calls"].size() == 1);
}

TEST_CASE("after a tool's answer the model need not think") {
  const family f("deepseek_r1_tools");
  auto body = ask();
  body["messages"].push_back({{"role", "assistant"},
                              {"content", nullptr},
                              {"tool_calls", json::array({call_json("c", "get_weather", paris)})}});
  body["messages"].push_back({{"role", "tool"}, {"content", "18"}, {"tool_call_id", "c"}});
  CHECK(choice_of(f, body, "It is 18.")["message"]["content"] == "It is 18.");
  CHECK(choice_of(f, body, deepseek_call)["message"]["tool_calls"].size() == 1);
  const auto thought = choice_of(f, body, "<think>\nhm</think>18");
  CHECK(thought["message"]["reasoning_content"] == "\nhm");
  CHECK(thought["message"]["content"] == "18");
}

TEST_CASE("what is no call of a tool that was given is text") {
  const family f("qwen2_5");
  const auto text_of = [&](const json& body, const std::string& text) {
    const auto choice = choice_of(f, body, text);
    CHECK(choice["message"]["tool_calls"].empty());
    CHECK(choice["finish_reason"] == "stop");
    return choice["message"]["content"].get<std::string>();
  };
  CHECK(text_of(ask({{"tool_choice", "none"}}), hermes_call) == hermes_call);
  CHECK(text_of(ask({{"tools", json::array({tools[1]})}}), hermes_call) == hermes_call);
  auto body = ask();
  body.erase("tools");
  CHECK(text_of(body, hermes_call) == hermes_call);
  CHECK(text_of(ask(), "<tool_call> is a tag") == "<tool_call> is a tag");
}

TEST_CASE("calls that are cut short, stopped or unwanted") {
  const family f("qwen2_5");
  const auto cut = choice_of(f, ask(), hermes_call.substr(0, 55), finish_reason::length);
  CHECK(cut["finish_reason"] == "length");
  CHECK(cut["message"]["tool_calls"][0]["function"]["arguments"] == R"({"city)");
  CHECK(choice_of(f, ask({{"stop", {"</tool_call>"}}}), hermes_call)["finish_reason"]
        == "tool_calls");

  auto one = builder_of(f, ask({{"parallel_tool_calls", false}}));
  std::string out;
  const auto events = events_of(0, encode(hermes_call + hermes_clock), finish_reason::none);
  std::size_t num_taken = 0;
  for (const auto& e : events) {
    const auto step = one.on_event(e, out);
    ++num_taken;
    CHECK(step.cancel == step.done);
    if (step.done)
      break;
  }
  CHECK(one.done());
  CHECK(num_taken < events.size());
  const auto choice = json::parse(out)["choices"][0];
  CHECK(choice["message"]["tool_calls"].size() == 1);
  CHECK(choice["finish_reason"] == "tool_calls");
}

TEST_CASE("calls stream as OpenAI streams them") {
  auto b = builder_of(family("qwen2_5"), ask({{"stream", true}}));
  std::vector<std::int32_t> tokens;
  std::vector<schedule::token_event> events;
  for (const std::string_view part :
       {"So:\n", "<tool_call>\n", "{\"name\": \"get_weather\", \"arguments\": {\"ci", "ty\": 1}}",
        "\n</tool_call>", "\n<tool_call>{\"name\": \"clock\", \"arguments\": {",
        "}}</tool_call>"}) {
    const auto more = encode(part);
    tokens.insert(tokens.end(), more.begin(), more.end());
  }
  tokens.push_back(1018);
  std::vector<json> deltas;
  std::string finish;
  for (const auto& frame : frames_of(answer(b, events_of(0, tokens, finish_reason::stop)))) {
    if (frame == "[DONE]")
      continue;
    const auto choice = json::parse(frame)["choices"][0];
    deltas.push_back(choice["delta"]);
    if (!choice["finish_reason"].is_null())
      finish = choice["finish_reason"];
  }
  CHECK(finish == "tool_calls");
  CHECK(deltas.front() == json{{"role", "assistant"}, {"content", ""}});
  CHECK(deltas.back() == json::object());
  json calls = json::array();
  std::string content;
  for (const auto& delta : deltas) {
    content += delta.value("content", "");
    for (const auto& call : delta.value("tool_calls", json::array())) {
      const auto index = call["index"].get<std::size_t>();
      if (index == calls.size()) {
        calls.push_back(call);
        CHECK(call["type"] == "function");
        continue;
      }
      REQUIRE(index + 1 == calls.size());
      CHECK_FALSE(call.contains("id"));
      CHECK_FALSE(call["function"].contains("name"));
      auto& arguments = calls[index]["function"]["arguments"];
      arguments = arguments.get<std::string>() + call["function"]["arguments"].get<std::string>();
    }
  }
  CHECK(content == "So:");
  REQUIRE(calls.size() == 2);
  CHECK(calls[0]["id"] == "call_3-1f-0-0");
  CHECK(calls[0]["function"] == json{{"name", "get_weather"}, {"arguments", R"({"city": 1})"}});
  CHECK(calls[1]["id"] == "call_3-1f-0-1");
  CHECK(calls[1]["function"] == json{{"name", "clock"}, {"arguments", "{}"}});
}

TEST_CASE("answers with calls are the same to the byte for who comes back at any token") {
  const family f("deepseek_r1_tools");
  for (const bool stream : {true, false}) {
    const auto body = ask({{"stream", stream}, {"n", 2}});
    schedule::request_log log{schedule::request_log::limits{}};
    std::string record;
    schedule::accepted_call call;
    call.id = (std::uint64_t{3} << call_bits) | 0x1f;
    call.chat = true;
    call.body = body.dump();
    call.seed = 7;
    call.first_request = kFirstId;
    call.num_choices = 2;
    const auto id = call.id;
    log.accept(std::move(call), record);
    const auto builder = [&] {
      auto b = rebuild(*log.find(id), f.served());
      if (!b)
        FAIL(b.error().text());
      return std::move(*b);
    };
    auto events = events_of(0, encode("a</think>" + deepseek_call + "<｜tool▁calls▁begin｜>x"),
                            finish_reason::stop);
    const auto more = events_of(1, encode("b</think>c\n" + deepseek_call), finish_reason::stop);
    events.insert(events.end(), more.begin(), more.end());
    std::string sent;
    auto first = builder();
    if (stream)
      first.open(sent);
    std::vector<std::string> came_back; // one for each cut
    for (std::size_t cut = 0; cut <= events.size(); ++cut) {
      auto late = builder();
      std::string late_sent;
      if (stream)
        late.open(late_sent);
      replay(*log.find(id), late, late_sent);
      for (std::size_t i = cut; i < events.size(); ++i)
        late.on_event(events[i], late_sent);
      REQUIRE(late.done());
      came_back.push_back(std::move(late_sent));
      if (cut == events.size())
        break;
      log.append(events[cut], 5, record);
      first.on_event(events[cut], sent);
    }
    REQUIRE(first.done());
    for (const auto& late_sent : came_back)
      REQUIRE(late_sent == sent);
    CHECK_THAT(sent, Catch::Contains("call_3-1f-1-0"));
  }
}

} // namespace troupe::http::openai_testing
