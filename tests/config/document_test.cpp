#include <catch2/catch.hpp>

#include <chrono>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "troupe/config/cluster_config.hpp"
#include "troupe/config/document.hpp"

namespace config = troupe::config;

namespace {

std::string refusal_of(const std::string& text) {
  const auto read = config::read_document(text);
  REQUIRE(!read);
  return std::to_string(read.error().at.line) + ":" + std::to_string(read.error().at.column) + ": "
         + read.error().what;
}

std::string repeat(const std::string& what, int times) {
  std::string result;
  for (int i = 0; i < times; ++i)
    result += what;
  return result;
}

} // namespace

TEST_CASE("a document remembers kinds, styles, duplicates and positions") {
  const auto read = config::read_document("a: 1\nb: '1'\nc: [x, {y: }]\na: 2\n");
  REQUIRE(read);
  const config::value& root = **read;
  REQUIRE(root.kind == config::value_kind::map);
  REQUIRE(root.entries.size() == 4);
  CHECK(root.entries[3].key == "a");
  CHECK(root.entries[3].at == config::position{4, 1});
  CHECK(root.find("a")->content->text == "1");
  CHECK(root.find("a")->content->style == config::scalar_style::plain);
  CHECK(root.find("b")->content->style == config::scalar_style::quoted);
  const config::value& list = *root.find("c")->content;
  REQUIRE(list.kind == config::value_kind::list);
  CHECK(list.items[0]->at == config::position{3, 5});
  REQUIRE(list.items[1]->entries.size() == 1);
  CHECK(list.items[1]->entries[0].content->kind == config::value_kind::nothing);
  CHECK(list.items[1]->entries[0].content->at == config::position{3, 9});
  CHECK(root.num_values == 8);
}

TEST_CASE("aliases stand for what they name") {
  const auto read = config::read_document("a: &x [p, q]\nb: *x\n");
  REQUIRE(read);
  CHECK((*read)->find("b")->content == (*read)->find("a")->content);
  CHECK((*read)->num_values == 7);
}

TEST_CASE("an empty document is nothing") {
  for (const std::string text : {"", "\n", "# only a comment\n", "---\n"}) {
    const auto read = config::read_document(text);
    REQUIRE(read);
    CHECK((*read)->kind == config::value_kind::nothing);
  }
}

TEST_CASE("broken YAML is refused where it breaks") {
  CHECK(refusal_of("a: 1\nb: [1, 2\nc: 3\n").starts_with("3:2: "));
  CHECK(refusal_of("a: \"x\nb: 1\nc: 2") == "1:4: this quoted text is never closed");
  CHECK(refusal_of("a: 'x'\nb: 'y\n\n") == "2:4: this quoted text is never closed");
  CHECK(refusal_of("a:\n\tb: 1\n") == "2:3: illegal map value; indent with spaces, not tabs");
  CHECK(refusal_of("a: 1\n  b: 2\n")
        == "2:4: illegal map value; check indentation, brackets and "
           "quotes here and in the line before");
  CHECK(refusal_of("a: *nowhere\n").starts_with("1:4: "));
  CHECK(refusal_of("a: 1\n---\nb: 2\n")
        == "2:1: a second YAML document starts here; keep one document a file");
  CHECK(refusal_of("[a]: 1\n")
        == "1:1: a key is a list or a mapping; write KEY: VALUE with a plain word as key");
  CHECK(refusal_of("? \n: 1\n").find("an empty key; write KEY: VALUE") != std::string::npos);
  CHECK(refusal_of("a: !secret b\n") == "1:4: the tag !secret means nothing here; remove it");
}

TEST_CASE("what is not UTF-8 text is refused before anybody parses it") {
  CHECK(refusal_of("a: b\nc: \xff\n") == "2:4: byte 0xFF is not UTF-8; write UTF-8");
  CHECK(refusal_of("a: \xc3(\n") == "1:4: byte 0xC3 is not UTF-8; write UTF-8");
  CHECK(refusal_of("a: \xc0\xaf") == "1:4: byte 0xC0 is not UTF-8; write UTF-8");     // overlong
  CHECK(refusal_of("a: \xed\xa0\x80") == "1:4: byte 0xED is not UTF-8; write UTF-8"); // surrogate
  CHECK(refusal_of("a: \xf4\x90\x80\x80") == "1:4: byte 0xF4 is not UTF-8; write UTF-8");
  CHECK(refusal_of("a: \xe2\x82") == "1:4: byte 0xE2 is not UTF-8; write UTF-8"); // cut off
  CHECK(refusal_of(std::string("a: 1\n\0b: 2", 10)) == "2:1: control character 0x00; remove it");
  CHECK(refusal_of("a: 1\n\x04zzz: 2") == "2:1: control character 0x04; remove it");
  CHECK(refusal_of(std::string("a\0:\0 \0", 6)) == "1:2: control character 0x00; remove it");
  const auto fine = config::read_document("\xef\xbb\xbf"
                                          "name: Gr\xc3\xbc\xc3\x9f\xe2\x82\xac\xf0\x9f\x8e\xad\n");
  REQUIRE(fine);
  CHECK((*fine)->find("name")->content->text == "Gr\xc3\xbc\xc3\x9f\xe2\x82\xac\xf0\x9f\x8e\xad");
}

TEST_CASE("bombs are refused quickly") {
  const auto begin = std::chrono::steady_clock::now();
  std::string laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n";
  for (int i = 1; i < 60; ++i) {
    const std::string before = "*a" + std::to_string(i - 1);
    laughs += "a" + std::to_string(i) + ": &a" + std::to_string(i) + " [" + repeat(before + ", ", 9)
              + before + "]\n";
  }
  CHECK(refusal_of(laughs).find("more than 100000 values") != std::string::npos);
  CHECK(refusal_of("a: &x [*x]\n")
        == "1:8: this alias (*) stands inside its own anchor (&); write the value out");
  CHECK(refusal_of("a: &x {b: {c: *x}}\n").starts_with("1:15: this alias"));
  CHECK(refusal_of(repeat("[", 100'000)).size() < 200);
  CHECK(refusal_of(repeat("{a: ", 100'000)).size() < 200);
  CHECK(refusal_of(repeat("- ", 100'000)).size() < 200);
  CHECK(refusal_of(repeat("? ", 100'000)).size() < 200);
  CHECK(refusal_of("[" + repeat("x,", 200'000) + "]").find("more than 100000")
        != std::string::npos);
  CHECK(std::chrono::steady_clock::now() - begin < std::chrono::seconds(20));
}

TEST_CASE("mutated cluster files are loaded or refused, never worse") {
  std::ifstream stream(TROUPE_SOURCE_DIR "/configs/two-nodes.yaml", std::ios::binary);
  const std::string original{std::istreambuf_iterator<char>(stream), {}};
  REQUIRE(!original.empty());
  const std::string file = TROUPE_SOURCE_DIR "/configs/c.yaml";
  const std::vector<std::string> tokens = {":",
                                           "- ",
                                           "[",
                                           "]",
                                           "{",
                                           "}",
                                           "&a ",
                                           "*a",
                                           "'",
                                           "\"",
                                           "\n",
                                           "\n\n  ",
                                           "\t",
                                           "#",
                                           "|\n",
                                           ">\n",
                                           "? ",
                                           "! ",
                                           "!!int ",
                                           "%",
                                           "@",
                                           "`",
                                           ", ",
                                           "---\n",
                                           "...\n",
                                           "<<: *a\n",
                                           "null",
                                           "~",
                                           "-1",
                                           "99999999999",
                                           "1e400",
                                           "nan",
                                           ".inf",
                                           "\xff",
                                           "\xef\xbb\xbf",
                                           std::string(1, '\0'),
                                           "true",
                                           "parallel: ",
                                           "nodes: ",
                                           "model: "};
  std::mt19937 random(20250);
  const auto pick = [&](std::size_t below) {
    return std::uniform_int_distribution<std::size_t>(0, below - 1)(random);
  };
  int num_loaded = 0;
  int num_refused = 0;
  const auto begin = std::chrono::steady_clock::now();
  for (int round = 0; round < 3000; ++round) {
    std::string text = original;
    for (std::size_t edits = 1 + pick(4); edits > 0 && !text.empty(); --edits) {
      const std::size_t at = pick(text.size());
      switch (pick(5)) {
      case 0: text.insert(at, tokens[pick(tokens.size())]); break;
      case 1: text.erase(at, 1 + pick(12)); break;
      case 2: text[at] = static_cast<char>(pick(256)); break;
      case 3: text.insert(at, text.substr(pick(text.size()), pick(80))); break;
      default: text.resize(at); break;
      }
    }
    const auto loaded = config::parse(text, file);
    if (loaded) {
      ++num_loaded;
      // Whatever is let through keeps the promises that others build on.
      REQUIRE(!loaded->nodes.empty());
      REQUIRE(!loaded->model.path.empty());
      REQUIRE(loaded->parallel.data * loaded->parallel.pipeline >= 1);
      REQUIRE(loaded->serving.kv_tokens % loaded->serving.page_tokens == 0);
      for (const auto& node : loaded->nodes)
        REQUIRE(!node.devices.empty());
    } else {
      ++num_refused;
      INFO(text);
      REQUIRE(loaded.error().code == troupe::error_code::invalid_config);
      REQUIRE(loaded.error().cause.starts_with(file));
    }
    // A slow sanitizer build does fewer rounds rather than miss its time.
    if (round >= 500 && std::chrono::steady_clock::now() - begin > std::chrono::seconds(2))
      break;
  }
  CHECK(num_loaded > 20);
  CHECK(num_refused > 20);
}
