#include "troupe/model/tool_call_parser.hpp"

#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>

#include <ostream>
#include <random>

namespace {

using troupe::model::json_scanner;
using troupe::model::tool_call_parser;
using troupe::model::tool_syntax;
using troupe::model::tool_text;

struct called {
  std::string name;
  std::string arguments;

  bool operator==(const called&) const = default;
};

/// What a client puts together.
struct outcome {
  std::string content;
  std::vector<called> calls;

  bool operator==(const outcome&) const = default;
};

std::ostream& operator<<(std::ostream& out, const outcome& o) {
  out << '\'' << o.content << '\'';
  for (const auto& c : o.calls)
    out << " " << c.name << "(" << c.arguments << ")";
  return out;
}

const std::vector<std::string> names = {"get_weather", "clock", "function"};

void add(outcome& o, const tool_text& more) {
  o.content += more.content;
  for (const auto& piece : more.calls) {
    REQUIRE(piece.index < o.calls.size() + (piece.name.empty() ? 0 : 1));
    if (!piece.name.empty()) {
      REQUIRE(piece.index == o.calls.size());
      o.calls.push_back({piece.name, {}});
    }
    o.calls[piece.index].arguments += piece.arguments;
  }
}

outcome run(tool_syntax syntax, std::string_view text, std::size_t piece = 1,
            std::uint32_t max_calls = 0) {
  tool_call_parser parser(syntax, names, max_calls);
  outcome o;
  for (std::size_t i = 0; i < text.size(); i += piece)
    add(o, parser.push(text.substr(i, piece)));
  add(o, parser.finish());
  CHECK(parser.num_calls() == o.calls.size());
  return o;
}

outcome deepseek(std::string_view text) {
  return run(tool_syntax::deepseek, text);
}
outcome hermes(std::string_view text) {
  return run(tool_syntax::hermes, text);
}
outcome llama(std::string_view text) {
  return run(tool_syntax::llama, text);
}

outcome plain(std::string_view text) {
  return {std::string(text), {}};
}

const std::string v3_call = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
                            "{\"city\": \"Paris\"}\n```<｜tool▁call▁end｜>";
const called paris = {"get_weather", R"({"city": "Paris"})"};
const called noon = {"clock", "{}"};

} // namespace

TEST_CASE("calls as DeepSeek V3, R1 and R1-0528 write them") {
  const std::string second =
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\n```json\n{}\n```<｜tool▁call▁end｜>";
  const auto list = [](const std::string& calls) {
    return "<｜tool▁calls▁begin｜>" + calls + "<｜tool▁calls▁end｜>";
  };
  CHECK(deepseek(list(v3_call)) == outcome{"", {paris}});
  CHECK(deepseek(list(v3_call + "\n" + second)) == outcome{"", {paris, noon}});
  CHECK(deepseek("\n\nLet me see.\n\n" + list(v3_call) + "\n")
        == outcome{"\n\nLet me see.", {paris}});
  CHECK(deepseek("\n\n" + list(v3_call) + " Done. ") == outcome{" Done. ", {paris}});
  CHECK(deepseek(list("\n" + v3_call) + "\n" + list(second)) == outcome{"", {paris, noon}});
  // Without the list around it, or without its end.
  CHECK(deepseek(v3_call) == outcome{"", {paris}});
  CHECK(deepseek("<｜tool▁calls▁begin｜>" + v3_call) == outcome{"", {paris}});
}

TEST_CASE("calls as DeepSeek V3.1 writes them") {
  const std::string call =
    R"(<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>)";
  const std::string other = "<｜tool▁call▁begin｜>clock<｜tool▁sep｜>{}<｜tool▁call▁end｜>";
  CHECK(deepseek("<｜tool▁calls▁begin｜>" + call + other + "<｜tool▁calls▁end｜>")
        == outcome{"", {paris, noon}});
  CHECK(deepseek("<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}<｜tool▁call▁end｜>")
        == outcome{"", {{"function", "{}"}}}); // a tool of that name
}

TEST_CASE("calls as Hermes and Qwen2.5 write them") {
  const std::string call =
    "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>";
  const std::string other = R"(<tool_call>{"arguments":{},"name":"clock"}</tool_call>)";
  CHECK(hermes(call) == outcome{"", {paris}});
  CHECK(hermes("Both.\n" + call + "\n" + other + "\n") == outcome{"Both.", {paris, noon}});
  CHECK(hermes(call + "\nwell?") == outcome{"\nwell?", {paris}});
  CHECK(hermes(R"(<tool_call>{"type":"function","id":7,"name":"clock","parameters":{},"id":[1]})"
               "</tool_call>")
        == outcome{"", {noon}});
  // The model stopped before the last word.
  CHECK(hermes(R"(<tool_call>{"name": "clock", "arguments": {}})") == outcome{"", {noon}});
  CHECK(hermes(R"(<tool_call>{"name": "clock", "arguments": {}}</tool_)") == outcome{"", {noon}});
}

TEST_CASE("calls as Llama 3.1 writes them") {
  const std::string call = R"({"name": "get_weather", "parameters": {"city": "Paris"}})";
  const std::string other = R"({"name": "clock", "parameters": {}})";
  CHECK(llama(call) == outcome{"", {paris}});
  CHECK(llama("\n " + call + "\n") == outcome{"", {paris}});
  CHECK(llama("<|python_tag|>" + call + "; " + other) == outcome{"", {paris, noon}});
  CHECK(llama(call + "\n" + other) == outcome{"", {paris, noon}});
  CHECK(llama(R"({"type": "function", "name": "clock", "parameters": {}})") == outcome{"", {noon}});
  CHECK(llama(call + "; so it is") == outcome{"; so it is", {paris}});
  // Only an answer that begins as a call is one.
  CHECK(llama("Call " + call) == plain("Call " + call));
  CHECK(llama("<|python_tag|>print(1)") == plain("<|python_tag|>print(1)"));
}

TEST_CASE("what only looks like a call is text, to the byte") {
  const auto v3_with = [](std::string_view name) {
    return "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>" + std::string(name)
           + "\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
  };
  for (const std::string& text :
       {std::string(), std::string(" \n "), std::string("a < b <｜tool"), v3_with("unknown"),
        v3_with(""), std::string("<｜tool▁calls▁begin｜>"),
        "<｜tool▁calls▁begin｜> x " + std::string("y"),
        std::string("<｜tool▁call▁begin｜>get_weather{}"), std::string("<｜tool▁calls▁end｜>"),
        std::string("<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>\n[1]<｜tool▁call▁end｜>"),
        std::string("<｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\n```python\n{}```"),
        std::string("<｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\n```json```json{}"),
        "<｜tool▁call▁begin｜>" + std::string(300, 'x'), std::string("<tool_call>")}) {
    INFO(text);
    CHECK(deepseek(text) == plain(text));
  }
  for (const std::string text :
       {"<tool_call>", "<tool_call>\n</tool_call>", "the <tool_call> tag",
        "<tool_call>{}</tool_call>",
        R"(<tool_call>{"name": "unknown", "arguments": {}}</tool_call>)",
        R"(<tool_call>{"name": "clock", "arguments": "{}"}</tool_call>)",
        R"(<tool_call>{"name": "clock", "arguments": []}</tool_call>)",
        R"(<tool_call>{"name": "clock"}</tool_call>)",
        R"(<tool_call>{"name": clock, "arguments": {}})",
        R"(<tool_call>{"name": ["clock"], "arguments": {}}</tool_call>)",
        R"(<tool_call>{"na\"name": "clock", "arguments": {}}</tool_call>)",
        R"(<tool_call>{"x": {"name": "clock"}, "arguments": {}}</tool_call>)",
        R"(<tool_call>{"name": "clock", "name": "clock", "arguments": {}}</tool_call>)",
        R"(<tool_call>[{"name": "clock", "arguments": {}}]</tool_call>)", "<tool_calls>{",
        "</tool_call>"}) {
    INFO(text);
    CHECK(hermes(text) == plain(text));
  }
  for (const std::string text :
       {R"({"name": "Paris", "parameters": {}})", R"({"name": "clock"})", R"({"city": "Paris"})",
        "{", R"({"name": "clock", "parameters": )", "{ }",
        R"([{"name": "clock", "parameters": {}}])", R"(<|python_tag|> x)", R"("name")"}) {
    INFO(text);
    CHECK(llama(text) == plain(text));
  }
  CHECK(run(tool_syntax::none, v3_call) == plain(v3_call));
}

TEST_CASE("a call behind what only looks like one is found") {
  CHECK(hermes(R"(<tool_call><tool_call>{"name": "clock", "arguments": {}}</tool_call>)")
        == outcome{"<tool_call>", {noon}});
  CHECK(hermes(R"(<tool_call>{"x": 1} <tool_call>{"name": "clock", "arguments": {}}</tool_call>)")
        == outcome{R"(<tool_call>{"x": 1})", {noon}});
  const std::string unknown =
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>no\n```json\n{}\n```<｜tool▁call▁end｜>";
  CHECK(deepseek("<｜tool▁calls▁begin｜>" + unknown + "\n" + v3_call + "<｜tool▁calls▁end｜>")
        == outcome{"<｜tool▁calls▁begin｜>" + unknown, {paris}});
  CHECK(
    deepseek("<<｜tool▁call▁begin｜><｜tool▁call▁begin｜>clock<｜tool▁sep｜>{}<｜tool▁call▁end｜>")
    == outcome{"<<｜tool▁call▁begin｜>", {noon}});
}

TEST_CASE("arguments come as they are written") {
  const std::string odd = R"({"a": [1, -2.5e+3, {"b": "}\"\\ </tool_call> \u00e9"}], "c": {}})";
  CHECK(hermes(R"(<tool_call>{"name": "clock", "arguments": )" + odd + "}</tool_call>")
        == outcome{"", {{"clock", odd}}});
  CHECK(llama(R"({"name": "clock", "parameters": )" + odd + "}") == outcome{"", {{"clock", odd}}});
  const std::string lines = "{\"code\": \"a\nb\"}"; // which models do write
  CHECK(deepseek("<｜tool▁call▁begin｜>clock<｜tool▁sep｜>" + lines + "<｜tool▁call▁end｜>")
        == outcome{"", {{"clock", lines}}});
}

TEST_CASE("arguments that are no JSON reach up to the end of the call") {
  CHECK(hermes("<tool_call>{\"name\": \"clock\", \"arguments\": {a: <b>}}\n</tool_call>c")
        == outcome{"c", {{"clock", "{a: <b>}}"}}});
  CHECK(deepseek("<｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\n```json\n{'a': `b`}\n```"
                 "<｜tool▁call▁end｜><｜tool▁calls▁end｜>c")
        == outcome{"c", {{"clock", "{'a': `b`}"}}});
  CHECK(llama(R"({"name": "clock", "parameters": {"a": nil}} and more)")
        == outcome{"", {{"clock", R"({"a": nil}} and more)"}}});
  CHECK(hermes(R"(<tool_call>{"name": "clock", "arguments": {"a": )")
        == outcome{"", {{"clock", R"({"a": )"}}});
  CHECK(hermes("<tool_call>{\"name\": \"clock\", \"arguments\": {a\n</tool_")
        == outcome{"", {{"clock", "{a\n</tool_"}}});
  // A call whose end is not as it should be has ended; nothing is lost.
  CHECK(hermes(R"(<tool_call>{"name": "clock", "arguments": {}} , x)") == outcome{" , x", {noon}});
  CHECK(hermes(R"(<tool_call>{"name": "clock", "arguments": {}, x)") == outcome{", x", {noon}});
  CHECK(deepseek("<｜tool▁call▁begin｜>clock<｜tool▁sep｜>{} ``` x") == outcome{" ``` x", {noon}});
}

TEST_CASE("what follows the last call that is wanted is left out") {
  tool_call_parser parser(tool_syntax::hermes, names, 1);
  const std::string call = R"(<tool_call>{"name": "clock", "arguments": {}}</tool_call>)";
  outcome o;
  add(o, parser.push("a" + call.substr(0, 40)));
  CHECK_FALSE(parser.ended());
  add(o, parser.push(call.substr(40) + call + "b"));
  CHECK(parser.ended());
  add(o, parser.push("c"));
  add(o, parser.finish());
  CHECK(o == outcome{"a", {noon}});
}

TEST_CASE("calls are told while they are written") {
  tool_call_parser parser(tool_syntax::hermes, names);
  CHECK(parser.push("<tool_call>\n{\"name\": \"get_weather\"").calls.empty());
  const auto& begun = parser.push(R"(, "arguments": {"ci)").calls;
  REQUIRE(begun.size() == 1);
  CHECK(begun[0].name == "get_weather");
  CHECK(begun[0].arguments == R"({"ci)");
  const auto& more = parser.push("ty\": \"");
  REQUIRE(more.calls.size() == 1);
  CHECK(more.calls[0].name.empty());
  CHECK(more.calls[0].arguments == "ty\": \"");
  CHECK(more.content.empty());
}

TEST_CASE("however an answer is cut, its calls are the same", "[property]") {
  const std::vector<std::string> pieces = {
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
    "function",
    "\n```json\n",
    "\n```",
    "get_weather",
    "clock\n",
    "<tool_call>",
    "</tool_call>",
    "<|python_tag|>",
    R"({"name": "clock", "arguments": )",
    R"({"name": "get_weather",)",
    R"( "parameters": )",
    R"("arguments": {"a": [1, "}")",
    "{}",
    "}",
    "{",
    "]",
    "\"",
    ",",
    ":",
    "<",
    " ",
    "\n",
    ";",
    "x",
    "é",
    R"("type": 3, )",
    R"("name": "clock")",
    "null",
    "-1e5",
    "`",
    "<tool_call>\n{\"name\": \"clock\", \"arguments\": {\"a\": \"b\"}}\n</tool_call>",
    v3_call,
    R"({"name": "clock", "parameters": {"q": [{}]}})"};
  std::mt19937 random(11);
  std::size_t num_calls = 0;
  std::size_t num_texts = 0;
  for (int round = 0; round < 20000; ++round) {
    const auto syntax = static_cast<tool_syntax>(1 + random() % 3);
    std::string text;
    for (auto n = random() % 12; n > 0; --n)
      text += pieces[random() % pieces.size()];
    const auto max_calls = random() % 3;
    const outcome whole = run(syntax, text, text.size() + 1, max_calls);
    INFO(text);
    REQUIRE(run(syntax, text, 1, max_calls) == whole);
    tool_call_parser parser(syntax, names, max_calls);
    outcome cut;
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t size = 1 + random() % 30;
      add(cut, parser.push(std::string_view(text).substr(at, size)));
      at += size;
    }
    add(cut, parser.finish());
    REQUIRE(cut == whole);
    if (whole.calls.empty())
      REQUIRE(whole.content == text);
    num_calls += whole.calls.size();
    num_texts += whole.calls.empty() ? 1 : 0;
  }
  CHECK(num_calls > 1500);
  CHECK(num_texts > 3000);
}

TEST_CASE("the scanner of JSON takes the objects that a parser takes", "[property]") {
  const std::vector<std::string> pieces = {
    "{",   "}",  "[",       "]",  ",",   ":",    "\"",      "\"a\"",
    "1",   "-",  "0",       ".5", "e+2", "true", "false",   "null",
    "\\n", "\\", "\\u00e9", " ",  "\n",  "tru",  "{\"a\":", "\"b\":[1,2]"};
  std::mt19937 random(3);
  std::size_t num_valid = 0;
  for (int round = 0; round < 200000; ++round) {
    std::string text = "{";
    for (auto n = random() % 8; n > 0; --n)
      text += pieces[random() % pieces.size()];
    text += "}";
    json_scanner scanner;
    auto last = json_scanner::mark::none;
    std::size_t taken = 0;
    while (taken < text.size() && last != json_scanner::mark::complete
           && last != json_scanner::mark::invalid)
      last = scanner.push(text[taken++]);
    const bool complete = last == json_scanner::mark::complete && taken == text.size();
    // The parser refuses line breaks within strings.
    std::string escaped;
    bool in_string = false;
    for (std::size_t i = 0; i < text.size(); ++i) {
      if (text[i] == '"')
        in_string = !in_string;
      if (in_string && text[i] == '\\' && i + 1 < text.size())
        escaped += text[i++];
      if (in_string && text[i] == '\n')
        escaped += "\\n";
      else
        escaped += text[i];
    }
    INFO(text);
    REQUIRE(complete == nlohmann::json::accept(escaped));
    num_valid += complete ? 1 : 0;
  }
  CHECK(num_valid > 1000);
}
