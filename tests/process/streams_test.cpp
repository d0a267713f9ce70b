#include "streams.hpp"

#include <algorithm>

#include <catch2/catch.hpp>
#include <fmt/format.h>

using namespace troupe::process_tests;

namespace {

constexpr std::size_t num_streams = 200;
constexpr std::size_t num_tokens = 100;
constexpr int num_rounds = 10;

json long_request(std::size_t index, std::size_t max_tokens) {
  return {{"prompt", golden()[index % golden().size()].prompt},
          {"temperature", 0},
          {"max_tokens", max_tokens},
          {"ignore_eos", true},
          {"stream", true},
          {"return_token_ids", true}};
}

std::vector<stream_result> run_round(const cluster& c) {
  std::vector<stream_result> results(num_streams);
  std::vector<std::thread> clients;
  for (std::size_t i = 0; i < num_streams; ++i)
    clients.emplace_back(
      [&, i] { results[i] = stream_completion(c.endpoint(), long_request(i, num_tokens)); });
  for (auto& client : clients)
    client.join();
  return results;
}

/// What is wrong with a stream whose answer to the same prompt is known to be `expected`.
std::string fault(std::size_t index, const stream_result& got,
                  const std::vector<std::int32_t>& expected) {
  if (!got.problem.empty())
    return fmt::format("stream {}: {}", index, got.problem);
  if (got.tokens.size() != num_tokens || got.finish != "length")
    return fmt::format("stream {}: {} tokens, finished by \"{}\"", index, got.tokens.size(),
                       got.finish);
  return got.tokens == expected ? "" : fmt::format("stream {}: other tokens than its twins", index);
}

} // namespace

TEST_CASE("200 streams of 100 tokens: none lost, none doubled, and the frontend does not grow") {
  cluster c("local.yaml");
  auto frontend = c.frontend_pid();
  std::vector<long> resident;
  std::vector<stream_result> first;
  auto begin = steady::now();
  for (int round = 1; round <= num_rounds; ++round) {
    auto results = run_round(c);
    if (first.empty())
      first.assign(results.begin(), results.begin() + static_cast<std::ptrdiff_t>(golden().size()));
    std::vector<std::string> faults;
    for (std::size_t i = 0; i < results.size(); ++i)
      if (auto f = fault(i, results[i], first[i % first.size()].tokens); !f.empty())
        faults.push_back(f);
    INFO("round " << round << ":\n" << lines(faults));
    REQUIRE(faults.empty());
    resident.push_back(resident_kib(frontend));
  }
  auto seconds = milliseconds(steady::now() - begin) / 1000;
  // Up to the golden end, which these streams pass over, the answers are the golden ones.
  for (std::size_t i = 0; i < first.size(); ++i) {
    auto length = static_cast<std::ptrdiff_t>(std::min(num_tokens, golden()[i].tokens.size()));
    INFO("prompt " << i);
    CHECK(std::equal(first[i].tokens.begin(), first[i].tokens.begin() + length,
                     golden()[i].tokens.begin()));
  }
  fmt::print("{} rounds of {} streams of {} tokens in {:.1f} s, {:.0f} tokens/s; "
             "resident memory of the frontend after each, in KiB:",
             num_rounds, num_streams, num_tokens, seconds,
             num_rounds * num_streams * num_tokens / seconds);
  for (auto kib : resident)
    fmt::print(" {}", kib);
  fmt::print("\n");
  // The first rounds fill pools and caches.
  CHECK(resident.at(9) <= resident.at(2) * 11 / 10 + 2048);
  CHECK(resident.at(2) > 0);
  c.end();
}

TEST_CASE("a client that disconnects frees its pages within 100 ms") {
  constexpr int num_trials = 10;
  constexpr std::size_t num_victims = 8;
  cluster c("local.yaml");
  auto free_pages = [&c] { return c.metric("troupe_kv_pages_free"); };
  // Warm up, and see what the idle value is.
  REQUIRE(
    stream_completion(c.endpoint(), golden_request(golden()[0])).difference(golden()[0]).empty());
  auto idle = free_pages();
  REQUIRE(eventually(
    [&] {
      idle = std::max(idle, free_pages());
      return c.metric("troupe_requests_running") == 0;
    },
    2s));
  std::this_thread::sleep_for(300ms);
  idle = free_pages();

  std::vector<double> freed_ms;
  for (int trial = 0; trial < num_trials; ++trial) {
    std::atomic<std::size_t> num_started{0};
    std::atomic<bool> leave{false};
    std::vector<steady::time_point> left(num_victims);
    std::vector<stream_result> results(num_victims);
    std::vector<std::thread> victims;
    for (std::size_t i = 0; i < num_victims; ++i)
      victims.emplace_back([&, i] {
        bool started = false;
        results[i] =
          stream_completion(c.endpoint(), long_request(i, 1900), [&](const auto& so_far) {
            if (!started && so_far.tokens.size() >= 10) {
              started = true;
              ++num_started;
            }
            left[i] = steady::now();
            return !leave;
          });
      });
    bool started = eventually([&] { return num_started == num_victims; }, 20s);
    bool held = free_pages() < idle;
    leave = true;
    for (auto& victim : victims)
      victim.join();
    auto gone = *std::max_element(left.begin(), left.end());
    bool freed = false;
    auto now = steady::now();
    while (!freed && now - gone < 5s) {
      freed = free_pages() == idle;
      now = steady::now();
    }
    for (const auto& result : results) {
      INFO(result.problem);
      CHECK(result.problem.empty());
      CHECK(result.finish.empty()); // it did not end by itself
    }
    CHECK(started);
    CHECK(held);
    REQUIRE(freed);
    freed_ms.push_back(milliseconds(now - gone));
  }
  std::sort(freed_ms.begin(), freed_ms.end());
  fmt::print("pages are free after a disconnect: median {:.0f} ms, maximum {:.0f} ms, {} trials\n",
             freed_ms[num_trials / 2], freed_ms.back(), num_trials);
  CHECK(freed_ms[num_trials / 2] < 100);
  CHECK(freed_ms.back() < 1000);
  c.end();
}

TEST_CASE("clients that disconnect do not disturb those that stay") {
  cluster c("local.yaml");
  auto idle = c.metric("troupe_kv_pages_free");
  golden_load load(c.endpoint(), 4);
  std::vector<std::thread> victims;
  std::atomic<int> num_left{0};
  for (std::size_t i = 0; i < 24; ++i)
    victims.emplace_back([&, i] {
      for (std::size_t round = 0; round < 4; ++round) {
        auto got = stream_completion(c.endpoint(), long_request(i, 1000), [&](const auto& so_far) {
          return so_far.tokens.size() < 1 + (i * 7 + round * 3) % 40;
        });
        num_left += got.problem.empty() && got.finish.empty() ? 1 : 0;
      }
    });
  for (auto& victim : victims)
    victim.join();
  load.finish();
  auto problems = load.problems();
  INFO(lines(problems));
  CHECK(problems.empty());
  CHECK(num_left == 24 * 4);
  CHECK(eventually(
    [&] {
      return c.metric("troupe_kv_pages_free") == idle && c.metric("troupe_requests_running") == 0;
    },
    2s));
  c.end();
}
