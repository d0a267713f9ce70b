#include "troupe/http/sse.hpp"

#include <random>

#include <catch2/catch.hpp>

using troupe::error_code;
using troupe::http::append_sse;
using troupe::http::sse_event;
using troupe::http::sse_frame;
using troupe::http::sse_parser;

namespace {

std::vector<sse_event> parse_in(const std::string& stream, const std::vector<std::size_t>& cuts) {
  sse_parser parser;
  std::vector<sse_event> events;
  std::size_t begin = 0;
  const auto feed = [&](std::size_t end) {
    auto got = parser.feed(std::string_view{stream}.substr(begin, end - begin));
    REQUIRE(got);
    events.insert(events.end(), got->begin(), got->end());
    begin = end;
  };
  for (const auto cut : cuts)
    feed(cut);
  feed(stream.size());
  return events;
}

std::vector<sse_event> parse(const std::string& stream) {
  return parse_in(stream, {});
}

} // namespace

TEST_CASE("an SSE frame has one data line for each line") {
  CHECK(sse_frame("[DONE]") == "data: [DONE]\n\n");
  CHECK(sse_frame("") == "data: \n\n");
  CHECK(sse_frame("a\nb") == "data: a\ndata: b\n\n");
  CHECK(sse_frame("a\r\nb\rc\n") == "data: a\ndata: b\ndata: c\ndata: \n\n");
  std::string out = "x";
  append_sse(out, "1");
  CHECK(out == "xdata: 1\n\n");
}

TEST_CASE("the SSE parser follows the specification") {
  CHECK(parse("data: a\n\n") == std::vector<sse_event>{{"", "a", ""}});
  CHECK(parse("data:a\r\rdata: b\r\n\r\n") == std::vector<sse_event>{{"", "a", ""}, {"", "b", ""}});
  CHECK(parse("\xEF\xBB\xBF"
              "data: a\n\n")
        == std::vector<sse_event>{{"", "a", ""}});
  // Only one space is taken off.
  CHECK(parse("data:  a\n\n") == std::vector<sse_event>{{"", " a", ""}});
  CHECK(parse("event: add\nid: 7\ndata: 1\ndata\ndata: 2\n\ndata: 3\n\n")
        == std::vector<sse_event>{{"add", "1\n\n2", "7"}, {"", "3", "7"}});
  CHECK(parse(": a comment\nretry: 10\nunknown: x\ndata: a\n\n")
        == std::vector<sse_event>{{"", "a", ""}});
  // Without data there is no event, and its type does not leak into the next one.
  CHECK(parse("event: lost\n\ndata: a\n\n") == std::vector<sse_event>{{"", "a", ""}});
  CHECK(parse("data: not finished\n").empty());
}

TEST_CASE("the SSE parser gives the same events however the stream is cut") {
  std::mt19937_64 random{20240817};
  const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random() % n); };
  const std::vector<std::string> ends{"\n", "\r", "\r\n"};
  const std::vector<std::string> texts{"", " ", "x", "{\"a\": 1}", "\xE4\xB8\xAD", ":", "data: "};
  for (int round = 0; round < 300; ++round) {
    std::string stream = below(4) == 0 ? "\xEF\xBB\xBF" : "";
    std::vector<sse_event> wanted;
    std::string id;
    for (auto n = below(6); n > 0; --n) {
      sse_event event;
      // An empty line must not turn the '\r' before it into half of a "\r\n".
      const auto line = [&](const std::string& text) {
        stream += text + ends[text.empty() && stream.ends_with('\r') ? 1 + below(2) : below(3)];
      };
      if (below(4) == 0)
        line(":" + texts[below(texts.size())]);
      if (below(3) == 0)
        line("event: " + (event.event = "kind" + std::to_string(below(3))));
      if (below(3) == 0)
        line("id: " + (id = std::to_string(below(100))));
      for (std::size_t i = 0, lines = 1 + below(3); i < lines; ++i) {
        const auto& text = texts[below(texts.size())];
        event.data += (i > 0 ? "\n" : "") + text;
        line("data: " + text);
      }
      line("");
      event.id = id;
      wanted.push_back(event);
    }
    std::vector<std::size_t> cuts;
    for (std::size_t i = 1; i < stream.size(); ++i)
      if (below(3) == 0)
        cuts.push_back(i);
    INFO("round " << round);
    CHECK(parse(stream) == wanted);
    CHECK(parse_in(stream, cuts) == wanted);
    std::vector<std::size_t> every;
    for (std::size_t i = 1; i < stream.size(); ++i)
      every.push_back(i);
    CHECK(parse_in(stream, every) == wanted);
  }
}

TEST_CASE("what the SSE writer writes is what the parser reads") {
  std::mt19937_64 random{7};
  for (int round = 0; round < 300; ++round) {
    std::string stream;
    std::vector<sse_event> wanted;
    for (auto n = random() % 5; n > 0; --n) {
      std::string data;
      for (auto size = random() % 20; size > 0; --size)
        data.push_back(" :\nabd"[random() % 6]);
      append_sse(stream, data);
      wanted.push_back({"", data, ""});
    }
    CHECK(parse(stream) == wanted);
  }
}

TEST_CASE("the SSE parser bounds the size of an event") {
  sse_parser parser{100};
  REQUIRE(parser.feed("data: " + std::string(60, 'x') + "\n"));
  const auto result = parser.feed("data: " + std::string(60, 'x') + "\n");
  REQUIRE_FALSE(result);
  CHECK(result.error().code == error_code::too_large);
}
