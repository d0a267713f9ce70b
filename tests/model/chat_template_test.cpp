#include "troupe/model/chat_template.hpp"
#include "troupe/model/tokenizer.hpp"

#include "temporary_directory.hpp"

#include <catch2/catch.hpp>

#include <filesystem>
#include <fstream>
#include <random>

namespace {

using nlohmann::json;
using nlohmann::ordered_json;
using troupe::error_code;
using troupe::model::chat_renderer;
using troupe::model::chat_template;

const std::string mini_dir = TROUPE_SOURCE_DIR "/configs/models/troupe-mini";

const ordered_json& golden() {
  static const ordered_json cases = [] {
    std::ifstream in(TROUPE_SOURCE_DIR "/tests/data/text/chat_template_cases.json");
    return ordered_json::parse(in);
  }();
  return cases;
}

/// Rendered text, or the cause of the error.
std::string render(std::string_view source, const ordered_json& context = ordered_json::object()) {
  const auto parsed = chat_template::parse(source);
  if (!parsed)
    return parsed.error().cause;
  const auto text = parsed->render(context);
  return text ? *text : text.error().cause;
}

bool mentions(const std::string& text, std::string_view part) {
  return text.find(part) != std::string::npos;
}

/// A model's directory with the files given.
class model_dir {
public:
  model_dir(std::initializer_list<std::pair<const char*, std::string>> files) {
    for (const auto& [name, content] : files)
      directory_.write(name, content);
  }
  const std::filesystem::path& path() const { return directory_.path(); }

private:
  troupe::testing::temporary_directory directory_;
};

} // namespace

TEST_CASE("chat templates render as jinja2 does with the settings of transformers") {
  const auto& cases = golden()["cases"];
  REQUIRE(cases.size() > 150);
  for (const auto& c : cases) {
    const std::string name = c[0];
    const std::string source = golden()["templates"][name];
    INFO(name << ", " << c[1].get<std::string>() << ": " << source);
    const auto parsed = chat_template::parse(source);
    if (!parsed) {
      INFO(parsed.error().cause);
      CHECK(c[2].is_null());
      CHECK(parsed.error().code == error_code::invalid_model);
      continue;
    }
    const auto text = parsed->render(golden()["contexts"][c[1].get<std::string>()]);
    if (!text) {
      INFO(text.error().cause);
      CHECK(c[2].is_null());
      CHECK(text.error().code == error_code::invalid_request);
      continue;
    }
    REQUIRE(c[2].is_string());
    CHECK(*text == c[2].get<std::string>());
  }
}

TEST_CASE("the chat template of troupe-mini gives DeepSeek-R1's prompts") {
  const auto renderer = chat_renderer::load(mini_dir);
  REQUIRE(renderer);
  const auto chat = [&](const ordered_json& messages, bool prompt) {
    return renderer->render_chat(messages, nullptr, prompt).value();
  };
  const ordered_json one = {{{"role", "user"}, {"content", "Hi"}}};
  CHECK(chat(one, true) == "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>\n");
  CHECK(chat(one, false) == "<｜begin▁of▁sentence｜><｜User｜>Hi");
  const ordered_json three = {{{"role", "system"}, {"content", "Be brief."}},
                              {{"role", "user"}, {"content", "1"}},
                              {{"role", "assistant"}, {"content", "<think>\nx</think>\n\n2"}},
                              {{"role", "user"}, {"content", "3"}}};
  CHECK(chat(three, true)
        == "<｜begin▁of▁sentence｜>Be brief.<｜User｜>1<｜Assistant｜>2<｜end▁of▁sentence｜>"
           "<｜User｜>3<｜Assistant｜><think>\n");
}

TEST_CASE("prompts of the golden conversations come out of template and tokenizer") {
  const auto renderer = chat_renderer::load(mini_dir);
  const auto tokens = troupe::model::tokenizer::load(mini_dir);
  REQUIRE(renderer);
  REQUIRE(tokens);
  std::ifstream in(mini_dir + "/golden.json");
  for (const auto& conversation : json::parse(in)) {
    const ordered_json messages = {
      {{"role", "user"}, {"content", conversation["question"].get<std::string>()}}};
    const auto text = renderer->render_chat(messages, nullptr, true);
    REQUIRE(text);
    CHECK(tokens->encode(*text).value() == conversation["prompt"].get<std::vector<int>>());
  }
}

TEST_CASE("chat_renderer finds the template where Hugging Face puts it") {
  const ordered_json hi = {{{"role", "user"}, {"content", "Hi"}}};
  const auto chat = [&](const model_dir& dir) -> std::string {
    const auto renderer = chat_renderer::load(dir.path());
    if (!renderer)
      return std::string(to_string(renderer.error().code)) + ": " + renderer.error().cause;
    return renderer->render_chat(hi, nullptr, false).value();
  };
  const std::string source = R"({{ bos_token }}{{ messages[0].content }})";
  const auto config = [](const ordered_json& extra) {
    ordered_json all = {{"bos_token", {{"content", "<b>"}}}};
    all.update(extra);
    return all.dump();
  };
  CHECK(chat(model_dir{{"tokenizer_config.json", config({{"chat_template", source}})}}) == "<b>Hi");
  const ordered_json several = {{{"name", "tool_use"}, {"template", "no"}},
                                {{"name", "default"}, {"template", source}}};
  CHECK(chat(model_dir{{"tokenizer_config.json", config({{"chat_template", several}})}})
        == "<b>Hi");
  CHECK(chat(model_dir{{"tokenizer_config.json", config({{"chat_template", "old"}})},
                       {"chat_template.jinja", source + "!\n"}})
        == "<b>Hi!");
  CHECK(mentions(chat(model_dir{{"tokenizer_config.json", config(ordered_json::object())}}),
                 "not_found"));
  CHECK(mentions(chat(model_dir{{"tokenizer_config.json", "{"}}), "is not a JSON object"));
  CHECK(mentions(chat(model_dir{{"tokenizer_config.json", config({{"chat_template", 5}})}}),
                 "tokenizer_config.json: chat_template"));
  CHECK(
    mentions(chat(model_dir{{"chat_template.jinja", "\n{{ x"}}), "chat_template.jinja, line 2"));
}

TEST_CASE("chat_renderer refuses what is no conversation") {
  const auto renderer = chat_renderer::load(mini_dir);
  REQUIRE(renderer);
  const auto refused = [&](const ordered_json& messages) {
    const auto text = renderer->render_chat(messages, nullptr, true);
    REQUIRE_FALSE(text);
    CHECK(text.error().code == error_code::invalid_request);
    return text.error().cause;
  };
  refused(ordered_json::array());
  refused("x");
  refused(ordered_json::object());
  CHECK(mentions(refused({{{"role", "user"}, {"content", "a"}}, 5}), "messages[1]"));
  CHECK(mentions(refused({{{"content", "a"}}}), "messages[0]"));
  CHECK(mentions(refused({{{"role", "user"}}}), "content")); // the template trips over it
  CHECK(mentions(refused({{{"role", "user"}, {"content", "\xFF"}}}), "UTF-8"));
  // Deep enough to overflow the stack of whatever walks it recursively.
  const std::size_t levels = 200'000;
  CHECK(mentions(
    refused(ordered_json::parse(R"([{"role": "user", "content": )" + std::string(levels, '[')
                                + std::string(levels, ']') + "}]")),
    "nested"));
}

TEST_CASE("extra variables reach the template") {
  const model_dir dir{
    {"chat_template.jinja", "{{ thinking }}{{ tools|length }}{{ add_generation_prompt }}"}};
  const auto renderer = chat_renderer::load(dir.path());
  REQUIRE(renderer);
  const ordered_json hi = {{{"role", "user"}, {"content", "Hi"}}};
  CHECK(renderer->render_chat(hi, ordered_json::array({1, 2}), true, {{"thinking", false}}).value()
        == "False2True");
}

TEST_CASE("raise_exception refuses the request with the template's own words") {
  const auto parsed = chat_template::parse("{{ raise_exception('roles must ' ~ 'alternate') }}");
  REQUIRE(parsed);
  const auto text = parsed->render(json::object());
  REQUIRE_FALSE(text);
  CHECK(text.error().code == error_code::invalid_request);
  CHECK(text.error().cause == "roles must alternate");
}

TEST_CASE("mistakes in a template are reported with their line") {
  const std::vector<std::pair<const char*, const char*>> cases = {
    {"a\nb{% include 'x' %}", "line 2: the statement 'include' is not supported"},
    {"\n\n{{ x|wordwrap }}", "line 3: the filter 'wordwrap' is not supported"},
    {"{{ x is escaped }}", "line 1: the test 'escaped' is not supported"},
    {"{% if a %}\n{% for x in y %}\n{% endif %}", "line 3: the statement 'endif'"},
    {"{% if a %}", "{% endif %} is missing"},
    {"\n{# never closed", "line 2: a comment"},
    {"{{ 'abc }}", "a string is not closed"},
    {"{{ (1 }}", "unexpected '}'"},
    {"{{ 1 2 }}", "}} expected, not '2'"},
    {"{% set 5 = x %}", "a variable expected"},
    {"{{ $ }}", "unexpected character '$'"},
    {"{{ 99999999999999999999 }}", "too large"},
    {"{% raw %}x", "{% endraw %}"},
    {"{{ f(**x) }}", "** arguments"},
  };
  for (const auto& [source, message] : cases) {
    INFO(source);
    const auto parsed = chat_template::parse(source, "file");
    REQUIRE_FALSE(parsed);
    INFO(parsed.error().cause);
    CHECK(parsed.error().code == error_code::invalid_model);
    CHECK(mentions(parsed.error().cause, message));
    CHECK(parsed.error().cause.find("file, line ") == 0);
  }
  CHECK(mentions(render("\n\n{{ a.b }}"), "line 3"));
  CHECK_FALSE(chat_template::parse("\xFF"));
}

TEST_CASE("keys keep their order in JSON") {
  const ordered_json context = {{"d", {{"zeta", 1}, {"alpha", {{"y", 2}, {"x", 1.0}}}}}};
  CHECK(render("{{ d|tojson }}", context) == R"({"zeta": 1, "alpha": {"y": 2, "x": 1.0}})");
}

TEST_CASE("no template runs or grows without end") {
  const auto fails = [](std::string_view source) {
    const std::string result = render(source);
    INFO(source.substr(0, 200) << " -> " << result.substr(0, 200));
    CHECK(result.size() < 1000);
    CHECK((mentions(result, "too much work") || mentions(result, "too deep")
           || mentions(result, "nested") || mentions(result, "grows over")
           || mentions(result, "range is longer")));
  };
  const std::string loops = "{% for a in range(99999) %}{% for b in range(99999) %}"
                            "{% endfor %}{% endfor %}";
  fails(loops);
  fails("{{ range(999999999)|list }}");
  fails("{{ 'a' * 99999999999 }}");
  fails("{{ [1] * 99999999999 }}");
  fails("{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}"
        "{% set ns.s = ns.s ~ ns.s %}{% endfor %}");
  fails(
    "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = [ns.l] %}{% endfor %}");
  fails("{% set ns = namespace(f='a') %}{% for i in range(9999) %}"
        "{% set ns.f = [ns.f].index %}{% endfor %}");
  fails("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}");
  fails("{% macro f(n) %}{{ caller(n) }}{% endmacro %}{% macro g(n) %}{% call(k) f(n) %}{{ g(k) }}"
        "{% endcall %}{% endmacro %}{{ g(1) }}");
  fails("{{ " + std::string(5000, '(') + "1" + std::string(5000, ')') + " }}");
  fails("{{ " + std::string(5000, '-') + "1 }}");
  fails("{{ " + std::string(5000, '[') + std::string(5000, ']') + " }}");
  std::string nested;
  std::string sum = "{{ 1";
  std::string chain = "{{ a";
  std::string nots = "{{ ";
  for (int i = 0; i < 5000; ++i) {
    nested += "{% if 1 %}";
    sum += " + 1";
    chain += ".a";
    nots += "not ";
  }
  fails(nested);
  fails(sum + " }}");
  fails(chain + " }}");
  fails(nots + "1 }}");
}

TEST_CASE("templates that are damaged fail in an orderly way") {
  std::vector<std::string> sources;
  for (const auto& [name, source] : golden()["templates"].items())
    sources.push_back(source);
  const auto& context = golden()["contexts"]["features"];
  std::mt19937 random(13);
  const std::vector<std::string> pieces = {
    "{%",   "%}",     "{{",  "}}",         "{#",   "-",      "(", ")", "[",     "]",
    "|",    "'",      "if ", "for ",       " in ", "set ",   "~", ".", "endif", " is ",
    "not ", "[::-1]", "**",  "namespace(", "loop", "macro ", "*", "9", "\n",    "é"};
  int num_rendered = 0;
  int num_failed = 0;
  for (int i = 0; i < 4000; ++i) {
    std::string source = sources[random() % sources.size()];
    const auto num_changes = 1 + random() % 3;
    for (std::uint32_t k = 0; k < num_changes; ++k) {
      const std::size_t at = source.empty() ? 0 : random() % source.size();
      switch (random() % 4) {
      case 0: source.insert(at, pieces[random() % pieces.size()]); break;
      case 1: source.erase(at, 1 + random() % 8); break;
      case 2:
        source.insert(at, source.substr(random() % (source.size() + 1), random() % 20));
        break;
      default: source.insert(at, 1, static_cast<char>(random() % 128)); break;
      }
    }
    const auto parsed = chat_template::parse(source);
    if (!parsed) {
      CHECK(parsed.error().code == error_code::invalid_model);
      ++num_failed;
      continue;
    }
    const auto text = parsed->render(context);
    if (!text)
      CHECK(text.error().code == error_code::invalid_request);
    num_rendered += text ? 1 : 0;
  }
  CHECK(num_rendered > 200);
  CHECK(num_failed > 200);
}
