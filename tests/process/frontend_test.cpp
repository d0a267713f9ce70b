#include "streams.hpp"

#include <algorithm>
#include <csignal>
#include <random>

#include <catch2/catch.hpp>
#include <fmt/format.h>

using namespace troupe::process_tests;
namespace http = troupe::http;

namespace {

const std::vector<std::string> many_restarts{"recovery.max_restarts=1000"};

/// A client that asks with a key, again and again, until it has the whole answer.
struct persistent_client {
  std::string id; ///< of the answer
  std::vector<std::string> problems;
  int num_attempts = 0;

  void ask(const std::string& endpoint, const conversation& talk, const std::string& key) {
    id.clear();
    const auto limit = steady::now() + 90s;
    for (;;) {
      auto result = stream_completion(endpoint, golden_request(talk), {}, key);
      ++num_attempts;
      if (!result.id.empty() && !id.empty() && result.id != id)
        problems.push_back(fmt::format("{}: answered by {} and by {}", key, id, result.id));
      if (!result.id.empty())
        id = result.id;
      // What came before the stream broke is the beginning of the answer, too.
      if (result.tokens.size() > talk.tokens.size()
          || !std::equal(result.tokens.begin(), result.tokens.end(), talk.tokens.begin()))
        problems.push_back(fmt::format("{}: wrong tokens", key));
      if (result.problem.empty()) {
        if (auto difference = result.difference(talk); !difference.empty())
          problems.push_back(difference);
        return;
      }
      if (steady::now() > limit) {
        problems.push_back(fmt::format("{}: no answer in 90 s: {}", key, result.problem));
        return;
      }
      std::this_thread::sleep_for(20ms);
    }
  }
};

/// Kills the frontend and waits until there is another one that serves.
void kill_frontend(const cluster& c) {
  const auto pid = c.frontend_pid();
  REQUIRE(::kill(pid, SIGKILL) == 0);
  REQUIRE(eventually(
    [&] {
      auto answer = http::fetch({"GET", c.endpoint() + "/health", {}, {}}, 2000ms);
      if (!answer || answer->status != 200)
        return false;
      auto status = http::fetch({"GET", c.endpoint() + "/v1/cluster", {}, {}}, 2000ms);
      return status && json::parse(status->body).at("frontend").at("pid") != pid;
    },
    30s));
}

http::client_response post_with_key(const cluster& c, const json& body, const std::string& key) {
  auto answer = http::fetch({"POST",
                             c.endpoint() + "/v1/completions",
                             {{"Content-Type", "application/json"}, {"Idempotency-Key", key}},
                             body.dump()},
                            60s);
  REQUIRE(answer);
  return *answer;
}

json whole(const conversation& talk) {
  auto body = golden_request(talk);
  body["stream"] = false;
  return body;
}

} // namespace

TEST_CASE("a frontend may be killed, and clients that ask again get every answer exactly once") {
  cluster c("local.yaml", many_restarts);
  const auto& talks = golden();
  REQUIRE(talks.size() == 48);
  std::vector<persistent_client> clients(talks.size());
  std::atomic<bool> last_round{false};
  std::atomic<std::size_t> num_answers{0};
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < clients.size(); ++i)
    threads.emplace_back([&, i] {
      for (int round = 0;; ++round) {
        const bool last = last_round;
        clients[i].ask(c.endpoint(), talks[i], fmt::format("client-{}-round-{}", i, round));
        ++num_answers;
        if (last)
          return;
      }
    });
  std::mt19937 random(20261122);
  double num_resumed = 0;
  for (int kill = 0; kill < 3; ++kill) {
    std::this_thread::sleep_for(std::chrono::milliseconds(300 + random() % 900));
    kill_frontend(c);
    num_resumed += c.metric("troupe_resumed_requests_total");
  }
  last_round = true;
  for (auto& t : threads)
    t.join();
  int num_attempts = 0;
  for (const auto& client : clients) {
    INFO(lines(client.problems));
    CHECK(client.problems.empty());
    num_attempts += client.num_attempts;
  }
  CHECK(num_resumed > 0);
  CHECK(num_attempts > static_cast<int>(num_answers));
  CHECK(c.metric("troupe_journal_errors_total") == 0);
  fmt::print("{} answers in {} attempts, {} requests taken up\n", num_answers.load(), num_attempts,
             num_resumed);

  // The answers can still be read, now and in the next life.
  for (int life = 0; life < 2; ++life) {
    for (std::size_t i = 0; i < clients.size(); i += 7) {
      auto answer = c.get("/v1/responses/" + clients[i].id);
      REQUIRE(answer.status == 200);
      auto body = json::parse(answer.body);
      CHECK(body.at("status") == "completed");
      CHECK(body.at("id") == clients[i].id);
      CHECK(body.at("choices").at(0).at("text") == talks[i].text);
      CHECK(body.at("choices").at(0).at("token_ids") == talks[i].tokens);
      CHECK(body.at("choices").at(0).at("finish_reason") == "stop");
    }
    if (life == 0)
      kill_frontend(c);
  }
  c.end();
}

TEST_CASE("a request is finished after its client and its frontend have gone") {
  cluster c("local.yaml", many_restarts);
  const auto& talk = golden()[3];
  std::string id;
  for (const char* key : {"", "with-a-key"}) {
    // Killed while the stream is under way.
    auto left = stream_completion(
      c.endpoint(), golden_request(talk),
      [&](const stream_result& so_far) {
        if (so_far.tokens.size() < 2)
          return true;
        ::kill(c.frontend_pid(), SIGKILL);
        return false;
      },
      key);
    REQUIRE(left.tokens.size() >= 2);
    json body;
    REQUIRE(eventually(
      [&] {
        auto answer = http::fetch({"GET", c.endpoint() + "/v1/responses/" + left.id, {}, {}}, 2s);
        if (!answer || answer->status != 200)
          return false;
        body = json::parse(answer->body);
        return body.at("status") == "completed";
      },
      30s));
    CHECK(body.at("choices").at(0).at("text") == talk.text);
    CHECK(body.at("choices").at(0).at("token_ids") == talk.tokens);
    // Streamed once more, from the start.
    auto streamed = c.get("/v1/responses/" + left.id + "?stream=true");
    CHECK(streamed.status == 200);
    CHECK(streamed.body.ends_with("data: [DONE]\n\n"));
    c.wait_settled();
  }
  c.end();
}

TEST_CASE("the same key is the same answer") {
  cluster c("local.yaml");
  const auto& talk = golden()[0];

  SECTION("the same request gets the same bytes, another one is refused") {
    auto sampled = whole(talk);
    sampled["temperature"] = 1.0; // drawn with a seed of the server's
    sampled["logprobs"] = 2;
    auto first = post_with_key(c, sampled, "k");
    CHECK(first.status == 200);
    auto second = post_with_key(c, sampled, "k");
    CHECK(second.status == 200);
    CHECK(second.body == first.body);
    CHECK(post_with_key(c, sampled, "other").body != first.body);
    auto refused = post_with_key(c, whole(golden()[1]), "k");
    CHECK(refused.status == 422);
    CHECK(json::parse(refused.body).at("error").at("code") == "idempotency_mismatch");
    auto too_long = post_with_key(c, sampled, std::string(256, 'k'));
    CHECK(too_long.status == 400);
    CHECK(json::parse(too_long.body).at("error").at("code") == "invalid_idempotency_key");
    CHECK(post_with_key(c, sampled, std::string(255, 'k')).status == 200);
  }
  SECTION("a client that left comes back, and two may listen at the same time") {
    auto left = stream_completion(
      c.endpoint(), golden_request(talk),
      [](const stream_result& so_far) { return so_far.tokens.size() < 3; }, "gone");
    CHECK_FALSE(left.id.empty());
    auto again = stream_completion(c.endpoint(), golden_request(talk), {}, "gone");
    CHECK(again.difference(talk).empty());
    CHECK(again.id == left.id);

    stream_result second;
    std::thread other;
    auto first = stream_completion(
      c.endpoint(), golden_request(talk),
      [&](const stream_result&) {
        if (!other.joinable())
          other = std::thread(
            [&] { second = stream_completion(c.endpoint(), golden_request(talk), {}, "both"); });
        return true;
      },
      "both");
    other.join();
    CHECK(first.difference(talk).empty());
    CHECK(second.difference(talk).empty());
    CHECK(first.id == second.id);
  }
  SECTION("what nobody asks for with a key is given up with its client") {
    auto left =
      stream_completion(c.endpoint(), golden_request(talk),
                        [](const stream_result& so_far) { return so_far.tokens.size() < 3; });
    CHECK(eventually([&] { return c.get("/v1/responses/" + left.id).status == 404; }, 5s));
    auto unknown = c.get("/v1/responses/cmpl-1-fffff");
    CHECK(unknown.status == 404);
    CHECK(json::parse(unknown.body).at("error").at("code") == "response_not_found");
  }
  c.end();
}

TEST_CASE("answers are forgotten after their time") {
  cluster c("local.yaml", {"serving.retain_s=1"});
  auto first = post_with_key(c, whole(golden()[0]), "k");
  REQUIRE(first.status == 200);
  const auto id = json::parse(first.body).at("id").get<std::string>();
  CHECK(eventually([&] { return c.get("/v1/responses/" + id).status == 404; }, 5s));
  CHECK(post_with_key(c, whole(golden()[1]), "k").status == 200);
  c.end();
}
