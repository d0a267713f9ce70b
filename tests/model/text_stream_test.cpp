#include "troupe/model/text_stream.hpp"

#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>

#include <array>
#include <fstream>
#include <random>

namespace {

using troupe::model::text_stream;
using troupe::model::text_stream_options;
using troupe::model::tokenizer;

const std::string mini_dir = TROUPE_SOURCE_DIR "/configs/models/troupe-mini";

const tokenizer& mini() {
  static const auto loaded = tokenizer::load(mini_dir);
  if (!loaded)
    FAIL(loaded.error().text());
  return *loaded;
}

std::vector<std::int32_t> ids_of(std::string_view text) {
  return mini().encode(text).value();
}

/// The ids of the 256 single bytes.
const std::array<std::int32_t, 256>& byte_ids() {
  static const auto ids = [] {
    std::array<std::int32_t, 256> found{};
    for (std::int32_t id = 0; id < mini().vocab_size(); ++id)
      if (mini().token_bytes(id).size() == 1)
        found[static_cast<unsigned char>(mini().token_bytes(id)[0])] = id;
    return found;
  }();
  return ids;
}

struct outcome {
  std::string reasoning;
  std::string content;
  bool stopped = false;
  std::string stop;

  bool operator==(const outcome&) const = default;
};

std::ostream& operator<<(std::ostream& out, const outcome& o) {
  return out << nlohmann::json{o.reasoning, o.content, o.stopped, o.stop}.dump(
           -1, ' ', true, nlohmann::json::error_handler_t::replace);
}

outcome run(const std::vector<std::int32_t>& ids, const text_stream_options& options) {
  text_stream stream(mini(), options);
  outcome o;
  for (const std::int32_t id : ids) {
    const auto& delta = stream.push(id);
    o.reasoning += delta.reasoning;
    o.content += delta.content;
    CHECK(troupe::model::find_invalid_utf8(delta.reasoning) == std::string::npos);
    CHECK(troupe::model::find_invalid_utf8(delta.content) == std::string::npos);
    if (delta.stopped)
      break;
  }
  const auto& rest = stream.finish();
  o.reasoning += rest.reasoning;
  o.content += rest.content;
  o.stopped = stream.stopped();
  o.stop = stream.matched_stop();
  return o;
}

/// What should come out, from the whole text at once.
outcome expected_of(const std::vector<std::int32_t>& ids, const text_stream_options& options) {
  std::string text = mini().decode(ids, options.skip_special).value();
  outcome o;
  std::size_t end = std::string::npos; // of the stop string that is complete first
  for (const std::string& stop : options.stop) {
    const std::size_t found = stop.empty() ? std::string::npos : text.find(stop);
    if (found == std::string::npos)
      continue;
    const std::size_t its_end = found + stop.size();
    if (its_end < end || (its_end == end && stop.size() > o.stop.size())) {
      end = its_end;
      o.stop = stop;
    }
  }
  if (end != std::string::npos) {
    o.stopped = true;
    text.resize(options.include_stop ? end : end - o.stop.size());
  }
  if (!options.split_reasoning) {
    o.content = text;
    return o;
  }
  const std::string_view open = "<think>";
  const std::string_view close = "</think>";
  if (!options.reasoning_open) {
    const std::size_t first = text.find_first_not_of(" \t\r\n");
    if (first == std::string::npos || !text.substr(first).starts_with(open)) {
      o.content = text;
      return o;
    }
    text.erase(0, first + open.size());
    const std::size_t closed = text.find(close);
    o.reasoning = text.substr(0, closed);
    if (closed != std::string::npos)
      o.content = text.substr(closed + close.size());
    return o;
  }
  const std::size_t closed = text.find(close);
  o.reasoning = text.substr(0, closed);
  if (closed != std::string::npos)
    o.content = text.substr(closed + close.size());
  if (const std::size_t opened = o.reasoning.find(open); opened != std::string::npos)
    o.reasoning.erase(opened, open.size());
  return o;
}

} // namespace

TEST_CASE("text_stream gives the texts of the golden conversations") {
  std::ifstream in(mini_dir + "/golden.json");
  const auto golden = nlohmann::json::parse(in);
  for (const auto& conversation : golden) {
    const std::vector<std::int32_t> ids = conversation["tokens"];
    const std::string text = conversation["text"];
    const outcome raw = run(ids, {});
    CHECK(raw.reasoning.empty());
    CHECK(raw.content == text);
    const outcome split = run(ids, {.split_reasoning = true});
    const std::size_t close = text.find("</think>");
    REQUIRE(close != std::string::npos);
    CHECK(split.reasoning == text.substr(0, close));
    CHECK(split.content == text.substr(close + 8));
  }
}

TEST_CASE("text_stream holds back unfinished characters") {
  const auto& byte = byte_ids();
  text_stream stream(mini(), {});
  CHECK(stream.push(byte[0xE4]).content.empty());
  CHECK(stream.push(byte[0xBD]).content.empty());
  CHECK(stream.push(byte[0xA0]).content == "你");
  CHECK(stream.push(byte[0xF0]).content.empty());
  CHECK(stream.push(byte['a']).content == "\uFFFDa");
  CHECK(stream.push(byte[0xC3]).content.empty());
  CHECK(stream.finish().content == "\uFFFD");
  CHECK(stream.finish().content.empty());
  CHECK(stream.push(byte['a']).content.empty());
}

TEST_CASE("text_stream leaves out special tokens unless asked") {
  auto ids = ids_of("a<｜User｜>b");
  ids.push_back(5000); // padding of the embedding: no token
  CHECK(run(ids, {}).content == "ab");
  CHECK(run(ids, {.skip_special = false}).content == "a<｜User｜>b");
}

TEST_CASE("text_stream cuts at stop strings that span tokens") {
  const auto ids = ids_of("one two three");
  const outcome cut = run(ids, {.stop = {"o th"}});
  CHECK(cut.content == "one tw");
  CHECK(cut.stopped);
  CHECK(cut.stop == "o th");
  CHECK(run(ids, {.stop = {"o th"}, .include_stop = true}).content == "one two th");
  CHECK(run(ids, {.stop = {"three!"}}).content == "one two three"); // held back, then released
  CHECK_FALSE(run(ids, {.stop = {""}}).stopped);
  CHECK(run(ids, {.stop = {"e", "one"}}).stop == "one");             // complete at once: the longer
  CHECK(run(ids, {.stop = {"two three", "wo"}}).content == "one t"); // the first to be complete
}

TEST_CASE("text_stream ignores stop strings within min_tokens") {
  std::vector<std::int32_t> ids;
  for (const char c : std::string("abcabcab"))
    ids.push_back(byte_ids()[static_cast<unsigned char>(c)]);
  CHECK(run(ids, {.stop = {"ab"}, .min_tokens = 0}).content.empty());
  CHECK(run(ids, {.stop = {"ab"}, .min_tokens = 2}).content == "abc");
  CHECK(run(ids, {.stop = {"ab"}, .min_tokens = 5}).content == "abcabc");
  CHECK(run(ids, {.stop = {"ab"}, .min_tokens = 8}).content == "abcabcab");
}

TEST_CASE("text_stream splits reasoning from content") {
  const text_stream_options split{.split_reasoning = true};
  const auto of = [&](std::string_view text) { return run(ids_of(text), split); };
  CHECK(of("think</think>\n\nanswer") == outcome{"think", "\n\nanswer", false, ""});
  CHECK(of("<think>\nx</think>y") == outcome{"\nx", "y", false, ""});
  CHECK(of("never closed <") == outcome{"never closed <", "", false, ""});
  CHECK(of("</think>a</think>b<think>") == outcome{"", "a</think>b<think>", false, ""});
  CHECK(of("a<thin</thin") == outcome{"a<thin</thin", "", false, ""});
  // Tags written out letter by letter count as well.
  std::vector<std::int32_t> letters;
  for (const char c : std::string("<think>a<<</think>b"))
    letters.push_back(byte_ids()[static_cast<unsigned char>(c)]);
  CHECK(run(letters, split) == outcome{"a<<", "b", false, ""});

  text_stream stream(mini(), split);
  CHECK(stream.in_reasoning());
  stream.push(*mini().added_token("</think>"));
  CHECK_FALSE(stream.in_reasoning());
  CHECK_FALSE(text_stream(mini(), {}).in_reasoning());
}

TEST_CASE("text_stream sees the tags even where they are special tokens") {
  std::ifstream in(mini_dir + "/tokenizer.json");
  auto file = nlohmann::json::parse(in);
  for (auto& added : file["added_tokens"])
    added["special"] = true;
  const auto t = tokenizer::parse(file.dump(), "", "dir").value();
  text_stream stream(t, {.split_reasoning = true});
  std::string reasoning;
  std::string content;
  const std::vector<std::int32_t> ids = t.encode("<think>a</think>b").value();
  for (const std::int32_t id : ids) {
    const auto& delta = stream.push(id);
    reasoning += delta.reasoning;
    content += delta.content;
  }
  CHECK(reasoning == "a");
  CHECK(content == "b");
}

TEST_CASE("prompts that close the thinking are told from those that open it") {
  using troupe::model::reasoning_after;
  using troupe::model::reasoning_start;
  CHECK(reasoning_after("<｜Assistant｜><think>\n") == reasoning_start::open);
  CHECK(reasoning_after("<｜Assistant｜>") == reasoning_start::unsaid);
  CHECK(reasoning_after("") == reasoning_start::unsaid);
  CHECK(reasoning_after("<｜Assistant｜></think>") == reasoning_start::closed);
  CHECK(reasoning_after("<think>\n\n</think>\n\n") == reasoning_start::closed);
  CHECK(reasoning_after("<think></think>x<｜tool▁output▁end｜>") == reasoning_start::unsaid);
}

TEST_CASE("where the prompt says nothing of reasoning, only the output's first word begins it") {
  const text_stream_options unsaid{.split_reasoning = true, .reasoning_open = false};
  const auto of = [&](std::string_view text) { return run(ids_of(text), unsaid); };
  CHECK(of("<think>\nx</think>y") == outcome{"\nx", "y", false, ""});
  CHECK(of("\n <think>x</think>y") == outcome{"x", "y", false, ""});
  CHECK(of("no thought</think>y") == outcome{"", "no thought</think>y", false, ""});
  CHECK(of("\n\n18 degrees") == outcome{"", "\n\n18 degrees", false, ""});
  CHECK(of("<thin</think>") == outcome{"", "<thin</think>", false, ""});
  CHECK(of("\n<") == outcome{"", "\n<", false, ""});
  CHECK(of("") == outcome{});
  text_stream stream(mini(), unsaid);
  CHECK_FALSE(stream.in_reasoning());
  stream.push(*mini().added_token("<think>"));
  CHECK(stream.in_reasoning());
}

TEST_CASE("special tokens stay in the text where they are wanted") {
  const auto ids = ids_of("a<｜User｜>b<｜Assistant｜>");
  CHECK(run(ids, {.shown = {"<｜User｜>", "no such token"}}).content == "a<｜User｜>b");
}

TEST_CASE("text_stream gives the same text for any split into tokens") {
  std::mt19937 random(5);
  const std::vector<std::string> words = {"<think>", "</think>", "<",  "</",   "think>",
                                          "ab",      "a",        "b",  "aab",  "你",
                                          "🙂",    "\n\n",     "｜", " the", "é"};
  const std::vector<std::string> stops = {"ab",      "aab",    "b\n", "</think>", "<think>ab",
                                          "你🙂", "\uFFFD", "aba", "k>",       "\n\na"};
  int num_stopped = 0;
  for (int round = 0; round < 3000; ++round) {
    std::vector<std::int32_t> ids;
    const auto length = random() % 20;
    for (std::uint32_t i = 0; i < length; ++i) {
      switch (random() % 5) {
      case 0: ids.push_back(byte_ids()[random() % 256]); break;
      case 1: ids.push_back(static_cast<std::int32_t>(random() % 1024)); break;
      default:
        for (const std::int32_t id : ids_of(words[random() % words.size()]))
          ids.push_back(id);
      }
    }
    text_stream_options options;
    const auto num_stops = random() % 4;
    for (std::uint32_t i = 0; i < num_stops; ++i)
      options.stop.push_back(stops[random() % stops.size()]);
    options.skip_special = random() % 2 == 0;
    options.include_stop = random() % 2 == 0;
    options.split_reasoning = random() % 2 == 0;
    options.reasoning_open = random() % 2 == 0;

    const outcome wanted = expected_of(ids, options);
    INFO(nlohmann::json(ids).dump() << " stops " << nlohmann::json(options.stop).dump());
    CHECK(run(ids, options) == wanted);
    num_stopped += wanted.stopped ? 1 : 0;

    std::vector<std::int32_t> bytes; // the same text, one byte a token
    for (const std::int32_t id : ids) {
      if (mini().is_special(id) && options.skip_special)
        continue;
      for (const char c : mini().token_bytes(id))
        bytes.push_back(byte_ids()[static_cast<unsigned char>(c)]);
    }
    CHECK(run(bytes, options) == wanted);
  }
  CHECK(num_stopped > 500);
}
