#include "streams.hpp"

#include "troupe/base/unique_fd.hpp"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <catch2/catch.hpp>
#include <fmt/format.h>

using namespace troupe::process_tests;

namespace {

struct bad_request {
  std::string name;
  std::string path;
  std::string body;
  int status;
  std::string culprit; ///< what the message has to name
};

std::vector<bad_request> bad_requests() {
  const std::string text = "/v1/completions";
  const std::string chat = "/v1/chat/completions";
  auto too_long = json{{"prompt", std::vector<int>(2048, 20)}}.dump();
  return {
    {"not JSON", text, "prompt=hello", 400, "JSON"},
    {"half a JSON", text, R"({"prompt": "he)", 400, "JSON"},
    {"no object", text, R"(["prompt"])", 400, "object"},
    {"empty", text, "", 400, "empty"},
    {"a prompt of the wrong type", text, R"({"prompt": {"a": 1}})", 400, "prompt"},
    {"no prompt", text, R"({"max_tokens": 3})", 400, "prompt"},
    {"a temperature of the wrong type", text, R"({"prompt": "a", "temperature": "hot"})", 400,
     "temperature"},
    {"stream of the wrong type", chat,
     R"({"messages": [{"role": "user", "content": "a"}], "stream": 1})", 400, "stream"},
    {"messages of the wrong type", chat, R"({"messages": "hello"})", 400, "messages"},
    {"an unknown role", chat, R"({"messages": [{"role": "king", "content": "a"}]})", 400, "king"},
    {"an unknown model", text, R"({"model": "gpt-9", "prompt": "a"})", 404, "gpt-9"},
    {"an unknown model of a chat", chat,
     R"({"model": "gpt-9", "messages": [{"role": "user", "content": "a"}]})", 404, "gpt-9"},
    {"empty messages", chat, R"({"messages": []})", 400, "messages"},
    {"a prompt over the context", text, too_long, 400, "2048"},
    {"negative max_tokens", text, R"({"prompt": "a", "max_tokens": -5})", 400, "-5"},
    {"a token id out of range", text, R"({"prompt": [5, 1024]})", 400, "1024"},
    {"a negative token id", text, R"({"prompt": [5, -1]})", 400, "-1"},
    {"a body of 10 MB", text, json{{"prompt", std::string(10'000'000, 'a')}}.dump(), 413, ""},
    {"invalid UTF-8", text, "{\"prompt\": \"a\xC3(b\"}", 400, "UTF-8"},
    {"too many stop strings", text,
     json{{"prompt", "a"}, {"stop", std::vector<std::string>(99, "x")}}.dump(), 400, "stop"},
    {"detokenize out of range", "/detokenize", R"({"tokens": [99999]})", 400, "99999"},
    {"tokenize of the wrong type", "/tokenize", R"({"prompt": 5})", 400, "prompt"},
    {"an unknown path", "/v1/nothing", "{}", 404, "/v1/nothing"},
    {"a wrong method", "/v1/models", "{}", 405, "POST"},
  };
}

/// A client that has connected and never completes its request.
troupe::unique_fd slow_client(const std::string& endpoint) {
  auto port = static_cast<std::uint16_t>(std::stoi(endpoint.substr(endpoint.rfind(':') + 1)));
  troupe::unique_fd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  REQUIRE(::connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
  return fd;
}

bool send_text(const troupe::unique_fd& fd, std::string_view text) {
  return ::send(fd.get(), text.data(), text.size(), MSG_NOSIGNAL)
         == static_cast<ssize_t>(text.size());
}

} // namespace

TEST_CASE("bad requests are refused by name and disturb nobody") {
  cluster c("local.yaml");
  golden_load load(c.endpoint(), 12);
  for (const auto& bad : bad_requests()) {
    auto answer = c.post(bad.path, bad.body);
    INFO(bad.name << " -> " << answer.status << " " << answer.body);
    CHECK(answer.status == bad.status);
    auto body = json::parse(answer.body, nullptr, false);
    REQUIRE(body.is_object());
    REQUIRE(body.contains("error"));
    REQUIRE(body["error"].value("message", "") != "");
    CHECK(body["error"]["message"].get<std::string>().find(bad.culprit) != std::string::npos);
    CHECK(body["error"].contains("type"));
    CHECK(body["error"].contains("code"));
  }
  CHECK(c.get("/v1/chat/completions").status == 405);
  CHECK(c.get("/nothing").status == 404);
  load.finish();
  auto problems = load.problems();
  INFO(lines(problems));
  CHECK(problems.empty());
  auto status = c.status();
  CHECK(c.settled(status));
  CHECK(status.at("recoveries").empty());
  c.end();
}

TEST_CASE("clients that trickle their requests do not slow down others") {
  constexpr std::size_t num_slow = 150;
  cluster c("single.yaml");
  std::vector<troupe::unique_fd> slow;
  for (std::size_t i = 0; i < num_slow; ++i) {
    slow.push_back(slow_client(c.endpoint()));
    // Half of them are slow with their header, half with their body.
    REQUIRE(send_text(slow.back(), i % 2 == 0 ? "POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-"
                                              : "POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
                                                "Content-Length: 1000\r\n\r\n"));
  }
  std::atomic<bool> stop{false};
  std::size_t num_trickled = 0;
  std::thread trickle([&] {
    while (!stop) {
      for (const auto& fd : slow)
        num_trickled += send_text(fd, "a") ? 1 : 0;
      std::this_thread::sleep_for(50ms);
    }
  });
  std::vector<std::string> differences;
  double slowest_ms = 0;
  for (std::size_t i = 0; i < 5; ++i) {
    auto begin = steady::now();
    auto health = c.get("/health");
    slowest_ms = std::max(slowest_ms, milliseconds(steady::now() - begin));
    CHECK(health.status == 200);
    auto got = stream_completion(c.endpoint(), golden_request(golden()[i]));
    if (auto difference = got.difference(golden()[i]); !difference.empty())
      differences.push_back(difference);
  }
  stop = true;
  trickle.join();
  INFO(lines(differences));
  CHECK(differences.empty());
  CHECK(num_trickled >= num_slow);
  CHECK(slowest_ms < 500);
  slow.clear();
  c.end();
}
