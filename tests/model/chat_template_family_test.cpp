#include "troupe/model/chat_template.hpp"

#include "temporary_directory.hpp"

#include <catch2/catch.hpp>

#include <filesystem>
#include <fstream>
#include <iterator>

namespace {

using nlohmann::ordered_json;
using troupe::error_code;
using troupe::model::chat_renderer;
using troupe::model::chat_template;

const std::string data_dir = TROUPE_SOURCE_DIR "/tests/data/text/";

std::string read_text(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  REQUIRE(in);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
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

const ordered_json hi = {{{"role", "user"}, {"content", "Hi"}}};

} // namespace

TEST_CASE("templates like those of every family render as transformers renders them") {
  const auto golden = ordered_json::parse(read_text(data_dir + "template_cases.json"));
  const auto& cases = golden["cases"];
  REQUIRE(cases.size() > 500);
  std::string name;
  std::optional<chat_template> current;
  for (const auto& c : cases) {
    if (c[0] != name) {
      name = c[0];
      auto parsed =
        chat_template::parse(read_text(data_dir + "templates/" + name + ".jinja"), name);
      if (!parsed)
        FAIL(parsed.error().text());
      current = std::move(*parsed);
    }
    INFO(name << ": " << c[1].get<std::string>());
    const auto text = current->render(golden["contexts"][c[1].get<std::string>()]);
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

TEST_CASE("what a template uses and is not supported fails when it is loaded") {
  const std::vector<std::pair<const char*, const char*>> cases = {
    {"\n{{ x.zfill(3) }}", "line 2: the method 'zfill' is not supported"},
    {"{{ 'a {}'.format(x) }}", "line 1: the method 'format' is not supported"},
    {"{% if false %}\n\n{{ m.content.encode() }}{% endif %}", "line 3: the method 'encode'"},
    {"{{ '%s' % x }}", "line 1: formatting a string with %"},
    {"{{ x|map('wordwrap')|list }}", "line 1: the filter 'wordwrap' is not supported"},
    {"{{ x|select('escaped')|list }}", "line 1: the test 'escaped' is not supported"},
    {"{{ x|rejectattr('a', 'nosuch')|list }}", "line 1: the test 'nosuch' is not supported"},
    {"{{ x|groupby('a') }}", "the filter 'groupby' is not supported"},
    {"{{ x|format(1) }}", "the filter 'format' is not supported"},
    {"{% set j = joiner(',') %}", "line 1: the function 'joiner' is not supported"},
    {"{{ cycler(1, 2) }}", "the function 'cycler' is not supported"},
    {"{% for a in b %}{{ loop.changed(a) }}{% endfor %}", "'loop.changed' is not supported"},
    {"{% for a in b recursive %}{% endfor %}", "recursive loops are not supported"},
    {"{% for a in b %}{{ loop(a.c) }}{% endfor %}", "recursive loops are not supported"},
    {"{{ x.__class__ }}", "the attribute '__class__' is not supported"},
    {"{% do x.append(1) %}", "the statement 'do' is not supported"},
    {"{% import 'x' as y %}", "the statement 'import' is not supported"},
    {"{% extends 'x' %}", "the statement 'extends' is not supported"},
    {"{% block x %}{% endblock %}", "the statement 'block' is not supported"},
    {"{% trans %}x{% endtrans %}", "the statement 'trans' is not supported"},
    {"{% autoescape true %}{% endautoescape %}", "the statement 'autoescape' is not supported"},
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
}

TEST_CASE("methods that templates do use are no such mistakes") {
  CHECK(render("{% for a in [1, 2] %}{{ loop.cycle('x', 'y') }}{% endfor %}") == "xy");
  CHECK(render("{{ 'a,b'.split(',')|map('upper')|join }}") == "AB");
  CHECK(render("{{ [1, 0, 2]|select|list }}{{ [1, 2]|reject('odd')|list }}") == "[1, 2][2]");
  CHECK(render("{{ none|map('upper')|list }}{{ none|select|list }}") == "[][]");
  // A list that the template may not change fails only where it is changed, as in the sandbox.
  CHECK(render("{% if x is defined %}{{ x.append(1) }}{% endif %}ok") == "ok");
}

TEST_CASE("case and kind of characters outside of ASCII are as in Python") {
  CHECK(render("{{ 'éÀ ж Ǆ'|upper }} {{ 'ÉÀ Ж'.lower() }} {{ 'élan ÔTÉ'.title() }}")
        == "ÉÀ Ж Ǆ éà ж Élan Ôté");
  CHECK(render("{{ 'élan-ôTÉ'|title }} {{ 'éLAN'|capitalize }}") == "Élan-Ôté Élan");
  CHECK(render("{{ '٣²'.isdigit() }}{{ '½'.isdigit() }}{{ 'é中'.isalpha() }}{{ 'é½'.isalnum() }}")
        == "TrueFalseTrueTrue");
  CHECK(render("{{ 'é' is lower }}{{ 'É' is upper }}{{ '中' is lower }}{{ 'aÉ' is lower }}")
        == "TrueTrueFalseFalse");
  CHECK(render("{{ ['é\\u200b\\xa0\\x85\\U000e0001', \"a'b\"] }}")
        == R"(['é\u200b\xa0\x85\U000e0001', "a'b"])");
  // What needs rules of several characters is an error and not another text.
  CHECK(mentions(render("{{ 'straße'|upper }}"), "case of 'ß' is not supported"));
  CHECK(mentions(render("{{ 'ΟΔΟΣ'|lower }}"), "case of 'Σ' is not supported"));
}

TEST_CASE("numbers that do not fit are refused") {
  const ordered_json context = {{"x", 18446744073709551615ULL}};
  CHECK(mentions(render("{{ x }}", context), "18446744073709551615"));
  CHECK(mentions(render("{{ x }}", context), "beyond 64 bits"));
}

TEST_CASE("conversations with tools take the template that is made for them") {
  const ordered_json tools = {{{"type", "function"}}};
  const auto both = [&](const troupe::testing::temporary_directory& dir) -> std::string {
    const auto renderer = chat_renderer::load(dir.path());
    if (!renderer)
      return renderer.error().cause;
    return renderer->render_chat(hi, nullptr, false).value() + "|"
           + renderer->render_chat(hi, tools, false).value() + "|"
           + renderer->render_chat(hi, nullptr, false, {{"tools", tools}}).value();
  };
  const troupe::testing::temporary_directory list;
  const auto config = [](const ordered_json& templates) {
    return ordered_json{{"chat_template", templates}}.dump();
  };
  const ordered_json standard = {{"name", "default"}, {"template", "plain"}};
  list.write("tokenizer_config.json",
             config({standard,
                     {{"name", "tool_use"}, {"template", "{{ tools|length }} tools"}},
                     {{"name", "rag"}, {"template", "{{ no"}}}));
  CHECK(both(list) == "plain|1 tools|1 tools");
  list.write("tokenizer_config.json", config(ordered_json::array({standard})));
  CHECK(both(list) == "plain|plain|plain");
  list.write("tokenizer_config.json",
             config({standard, {{"name", "tool_use"}, {"template", "{{ x.zfill(1) }}"}}}));
  CHECK(mentions(both(list), "\"tool_use\", line 1: the method 'zfill'"));
  list.write("tokenizer_config.json",
             config(ordered_json::array({{{"name", "tool_use"}, {"template", "x"}}})));
  CHECK(mentions(both(list), "a template named \"default\""));
  // Files come before what tokenizer_config.json says.
  list.write("chat_template.jinja", "file");
  CHECK(both(list) == "file|file|file");
  list.write("additional_chat_templates/tool_use.jinja", "tools of a file");
  CHECK(both(list) == "file|tools of a file|tools of a file");
}

TEST_CASE("special tokens of the config reach the template") {
  const troupe::testing::temporary_directory dir;
  dir.write("tokenizer_config.json", R"({"bos_token": {"content": "<b>"}, "eos_token": "</e>",
    "unk_token": null, "pad_token": {"content": "<p>"},
    "chat_template": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token is defined }}"})");
  CHECK(chat_renderer::load(dir.path()).value().render_chat(hi, nullptr, false).value()
        == "<b></e><p>False");
}
