#include "troupe/model/normalizer.hpp"
#include "troupe/model/text_stream.hpp"
#include "troupe/model/tokenizer.hpp"
#include "troupe/model/unicode_properties.hpp"

#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <ctime>
#include <fstream>

namespace {

using nlohmann::json;
using troupe::error_code;
using troupe::model::text_stream;
using troupe::model::tokenizer;

using ids_type = std::vector<std::int32_t>;

const std::string data_dir = TROUPE_SOURCE_DIR "/tests/data/text/";
const std::vector<std::string> families = {"deepseek_v3", "deepseek_llm", "llama3", "qwen2"};

json read_json(const std::string& path) {
  std::ifstream in(path);
  REQUIRE(in);
  return json::parse(in);
}

tokenizer load(const std::string& family) {
  auto loaded = tokenizer::load(data_dir + family);
  if (!loaded)
    FAIL(loaded.error().text());
  return std::move(*loaded);
}

json file_of(const std::string& family) {
  return read_json(data_dir + family + "/tokenizer.json");
}

ids_type encode(const tokenizer& t, std::string_view text,
                troupe::model::encode_options options = {}) {
  auto ids = t.encode(text, options);
  if (!ids)
    FAIL(ids.error().text());
  return *ids;
}

std::string stream_of(const tokenizer& t, const ids_type& ids, bool skip_special) {
  text_stream stream(t, {.skip_special = skip_special});
  std::string text;
  for (const std::int32_t id : ids)
    text += stream.push(id).content;
  return text + stream.finish().content;
}

std::string cause_of(const json& changed, const std::string& config = "") {
  const auto parsed = tokenizer::parse(changed.dump(), config, "dir");
  REQUIRE_FALSE(parsed);
  CHECK(parsed.error().code == error_code::invalid_model);
  return parsed.error().cause;
}

std::string repeated(std::string_view piece, std::size_t bytes) {
  std::string text;
  while (text.size() < bytes)
    text += piece;
  return text;
}

/// Processor seconds that encoding takes: the least of three, so that other load counts little.
double seconds_to_encode(const tokenizer& t, const std::string& text) {
  double best = 1e9;
  for (int i = 0; i < 3; ++i) {
    const std::clock_t began = std::clock();
    REQUIRE(t.encode(text));
    best = std::min(best, static_cast<double>(std::clock() - began) / CLOCKS_PER_SEC);
  }
  return best;
}

} // namespace

TEST_CASE("every family of tokenizers gives what Hugging Face's tokenizers gives") {
  const json golden = read_json(data_dir + "family_cases.json");
  REQUIRE(golden.size() == 5);
  for (const auto& [family, cases] : golden.items()) {
    const tokenizer t = load(family);
    REQUIRE(cases["encode"].size() >= 250);
    for (const json& c : cases["encode"]) {
      const std::string text = c[0];
      INFO(family << ": " << json(text).dump(-1, ' ', true));
      const ids_type ids = c[1];
      CHECK(encode(t, text) == ids);
      CHECK(encode(t, text, {.parse_special = false}) == (c[2].is_null() ? ids : ids_type(c[2])));
      // DeepSeek's BOS comes from tokenizer_config.json and not from the post-processor.
      if (family == "llama3")
        CHECK(encode(t, text, {.add_bos = t.adds_bos()}) == ids_type(c[3]));
      else
        CHECK(c[3].is_null());
    }
    for (const json& c : cases["decode"]) {
      const ids_type ids = c[0];
      INFO(family << ": " << c[0].dump());
      const std::string text = c[1];
      const std::string visible = c[2].is_null() ? text : c[2].get<std::string>();
      CHECK(t.decode(ids, false).value() == text);
      CHECK(t.decode(ids, true).value() == visible);
      CHECK(stream_of(t, ids, false) == text);
      CHECK(stream_of(t, ids, true) == visible);
    }
  }
}

TEST_CASE("BOS comes from the config where that says so, else from the post-processor") {
  CHECK(load("deepseek_v3").adds_bos());
  const tokenizer llama = load("llama3");
  CHECK(llama.adds_bos());
  CHECK(llama.bos_id() == llama.added_token("<|begin_of_text|>"));
  CHECK_FALSE(load("qwen2").adds_bos());
  CHECK_FALSE(load("qwen2").bos_id());

  const std::string file = file_of("llama3").dump();
  const auto without = tokenizer::parse(file, R"({"add_bos_token": false})", "dir");
  CHECK_FALSE(without.value().adds_bos());
  CHECK(without.value().bos_id() == llama.bos_id());
  CHECK(tokenizer::parse(file, "", "dir").value().adds_bos());
}

TEST_CASE("DeepSeek LLM's added tokens for bytes decode to those bytes") {
  const tokenizer t = load("deepseek_llm");
  const ids_type ids = encode(t, "für");
  REQUIRE(ids.size() == 3);
  CHECK(ids[1] == t.added_token("ü"));
  CHECK(t.token_bytes(ids[1]) == "\xFC");
  CHECK(t.decode(ids, false).value() == "f\uFFFDr");
}

TEST_CASE("the tokenizer reader names what it does not support") {
  const json v3 = file_of("deepseek_v3");
  const json llama = file_of("llama3");
  const auto names = [](json file, const char* pointer, const json& v, std::string_view part) {
    file[json::json_pointer(pointer)] = v;
    const std::string cause = cause_of(file);
    INFO(cause);
    CHECK(cause.find("dir/tokenizer.json: ") == 0);
    CHECK(cause.find(part) != std::string::npos);
  };
  names(v3, "/normalizer/normalizers/0", {{"type", "Lowercase"}}, "normalizer.normalizers[0] is");
  names(v3, "/normalizer", {{"type", "NFKC"}}, "normalizer is");
  names(v3, "/normalizer", "NFC", "normalizer");
  names(v3, "/normalizer/normalizers/0", v3["normalizer"], "normalizer.normalizers[0]");
  names(v3, "/decoder", nullptr, "decoder is missing");
  names(v3, "/decoder/type", "Metaspace", "decoder is");
  names(v3, "/post_processor", {{"type", "BertProcessing"}}, "post_processor is");
  names(llama, "/post_processor/processors", 5, "post_processor.processors");
  names(llama, "/post_processor/processors/1/single/0", {{"Sequence", {{"id", "A"}}}},
        "post_processor.processors[1].single");
  names(llama, "/post_processor/processors/1/single/2", {{"Sequence", {{"id", "A"}}}},
        "post_processor.processors[1].single");
  names(llama, "/post_processor/processors/1/special_tokens", json::object(),
        "special_tokens[\"<|begin_of_text|>\"].ids");
  names(llama, "/post_processor/processors/1/special_tokens/<|begin_of_text|>/ids/0", 90000,
        "adds the token 90000");
  names(llama, "/pre_tokenizer/pretokenizers/1/add_prefix_space", true, "pretokenizers[1]");
  names(llama, "/pre_tokenizer/pretokenizers/1/use_regex", 5, "pretokenizers[1]");
  names(llama, "/pre_tokenizer/pretokenizers/0/pattern", {{"Regex", "\\w+"}}, "\\w");
}

TEST_CASE("a pattern may be a plain string") {
  json file = file_of("qwen2");
  file["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {{"String", "a+b"}};
  const auto t = tokenizer::parse(file.dump(), "", "dir");
  REQUIRE(t);
  CHECK(t->decode(encode(*t, "xa+bx"), false).value() == "xa+bx");
}

TEST_CASE("characters are those of regular expressions and of Python") {
  using namespace troupe::model;
  for (const char32_t c :
       {U'a', U'_', U'٣', U'中', U'Ⅳ', U'\u0301', U'\u200D', U'ⓐ', U'\U0001E4D0'})
    CHECK(is_word(c));
  for (const char32_t c : {U' ', U'-', U'½', U'。', U'🙂', U'\u200B', U'\U0001D2C0'})
    CHECK_FALSE(is_word(c));
  CHECK(is_white_space(0x3000));
  CHECK_FALSE(is_white_space(0x180E));
  CHECK_FALSE(is_white_space(0x1C)); // Python's strip would take it, \s does not
  CHECK(is_digit(U'²'));
  CHECK_FALSE(is_digit(U'½'));
  CHECK(is_alphanumeric(U'½'));
  CHECK_FALSE(is_alphabetic(U'½'));
  CHECK(is_printable(U'中'));
  CHECK_FALSE(is_printable(0x200B));
  CHECK_FALSE(is_printable(0xA0));
  CHECK(upper_of(U'é') == U'É');
  CHECK(lower_of(U'Ж') == U'ж');
  CHECK_FALSE(upper_of(U'ß'));
  CHECK_FALSE(lower_of(U'Σ'));
}

TEST_CASE("NFC composes, orders marks and knows Unicode 9") {
  const auto nfc = [](std::string_view text) {
    std::string buffer;
    return std::string(troupe::model::normalize_nfc(text, buffer));
  };
  CHECK(nfc("caf\u0065\u0301") == "café");
  CHECK(nfc("q\u0307\u0323") == "q\u0323\u0307");
  CHECK(nfc("\u1112\u1161\u11AB") == "한");
  CHECK(nfc("\u212B\u2126\uF900") == "ÅΩ豈");
  CHECK(nfc("\u0344") == "\u0308\u0301");
  CHECK(nfc("\u0958") == "\u0915\u093C");         // excluded from composition
  CHECK(nfc("a\u0316\u0301") == "\u00E1\u0316");  // the mark between does not block
  CHECK(nfc("e\u1ACB\u0301") == "e\u1ACB\u0301"); // assigned in Unicode 14: like a letter
  CHECK(nfc("\U00011935\U00011930") == "\U00011935\U00011930");
  CHECK(nfc("\U00011938") == "\U00011938");
  CHECK(nfc("plain \u02FF") == "plain \u02FF");
  CHECK(nfc("").empty());
  const std::string nul("a\0e\u0301", 5);
  CHECK(nfc(nul) == std::string("a\0é", 4));
}

TEST_CASE("NFC composes syllables with trailing consonants and with nothing below them") {
  std::string buffer;
  const auto utf8 = [](std::initializer_list<char32_t> code_points) {
    std::string text;
    for (const char32_t c : code_points)
      troupe::model::append_utf8(text, c);
    return text;
  };
  for (char32_t syllable = 0xAC00; syllable < 0xD7A4; syllable += 28)
    for (char32_t t = 0; t < 30; ++t) {
      const auto text = utf8({syllable, 0x11A7 + t, U'a'});
      const auto wanted = t > 0 && t < 28 ? utf8({syllable + t, U'a'}) : text;
      REQUIRE(troupe::model::normalize_nfc(text, buffer) == wanted);
    }
  CHECK(troupe::model::normalize_nfc("\u1100\u1161\u11A7\u11A8", buffer) == "\uAC00\u11A7\u11A8");
}

TEST_CASE("encoding takes time in proportion to the text, whatever the text") {
  // 100 KB of one piece: quadratic work would take sixteen times as long for four times the
  // text, and minutes altogether.
  const std::vector<std::string> pieces = {"a",
                                           "中",
                                           "🙂",
                                           " ",
                                           "\n",
                                           " \n",
                                           "1",
                                           "'",
                                           "<｜",
                                           "\u0316\u0301",
                                           "\t",
                                           "\u1112\u1161\u11AB",
                                           "  a",
                                           "e\u0301",
                                           std::string(1, '\0')};
  for (const std::string& family : families) {
    const tokenizer t = load(family);
    for (const std::string& piece : pieces) {
      for (const char* end : {"", "中"}) {
        INFO(family << ": " << json(piece).dump(-1, ' ', true) << " and " << end);
        const double few = seconds_to_encode(t, repeated(piece, 25'000) + end);
        const double many = seconds_to_encode(t, repeated(piece, 100'000) + end);
        CHECK(many < 10 * few + 0.02);
      }
    }
  }
}

TEST_CASE("a megabyte of mixed text is encoded in no time") {
  const std::string text = repeated(
    "The year 2024: don't panic! 人工智能是计算机科学。 Größe läßt 🙂👍🏽 "
    "<vector>\n\n"
    "안녕하세요 Привет, мир  e\u0301\u0323 ```json\r\n{\"a\": 1}```\t",
    1'000'000);
  for (const std::string& family : families) {
    INFO(family);
    const tokenizer t = load(family);
    CHECK(seconds_to_encode(t, text) < 5); // a tenth of that without sanitizers
    if (family != "deepseek_llm" && family != "qwen2")
      CHECK(t.decode(encode(t, text), false).value() == text);
  }
}
