#include "troupe/recovery/step_watch.hpp"

#include <catch2/catch.hpp>

#include <random>
#include <vector>

using namespace troupe::recovery;
using namespace std::chrono_literals;

namespace {

constexpr step_size decode{8, 8 * 1000};

void learn(step_patience& patience, const step_size& size, std::chrono::nanoseconds took,
           std::uint32_t count = step_patience::num_to_learn) {
  for (std::uint32_t i = 0; i < count; ++i)
    patience.computed(size, took);
}

} // namespace

TEST_CASE("nobody is judged before enough steps of about that size were seen") {
  step_patience patience;
  learn(patience, decode, 20ms, step_patience::num_to_learn - 1);
  CHECK(patience.limit(decode) == 0ns);
  patience.computed(decode, 20ms);
  CHECK(patience.limit(decode) == 80ms);
  CHECK(patience.limit({7, 7 * 1000}) == 0ns);   // fewer rows: other kernels
  CHECK(patience.limit({8, 8 * 5000}) == 0ns);   // longer contexts
  CHECK(patience.limit({15, 8 * 1000}) == 80ms); // as many digits
  CHECK(patience.limit({2048, 2048}) == 0ns);
}

TEST_CASE("a limit is four times the longest wait of late, and never short") {
  step_patience patience;
  learn(patience, decode, 1ms);
  CHECK(patience.limit(decode) == 20ms);
  patience.computed(decode, 30ms);
  CHECK(patience.limit(decode) == 120ms);
  learn(patience, decode, 1ms, 64);
  CHECK(patience.limit(decode) == 120ms); // one of the last 64 to 128
  learn(patience, decode, 1ms, 64);
  CHECK(patience.limit(decode) == 20ms);
}

TEST_CASE("sizes beyond all bounds are known as the largest") {
  step_patience patience;
  const step_size huge{~0U, ~std::uint64_t{0}};
  CHECK(patience.limit({}) == 0ns);
  learn(patience, huge, 1s);
  CHECK(patience.limit(huge) == 4s);
  CHECK(patience.limit({1U << 20U, std::uint64_t{1} << 40U}) == 4s);
}

TEST_CASE("a wait is overdue when it was seen for longer than its limit") {
  wait_observer observer(10ms);
  wait_observer::time_point now{1h};
  CHECK_FALSE(observer.look(0, 40ms, now));
  for (int i = 0; i < 5; ++i)
    CHECK_FALSE(observer.look(1, 40ms, now += 10ms)); // 0 to 40 ms
  SECTION("it goes on") {
    CHECK(observer.look(1, 40ms, now += 10ms));
    CHECK(observer.look(1, 40ms, now += 10ms));
  }
  SECTION("it ended") {
    CHECK_FALSE(observer.look(0, 40ms, now += 10ms));
    CHECK_FALSE(observer.look(1, 40ms, now += 10ms)); // never comes again, but if it did
  }
  SECTION("another one has begun") {
    for (int i = 0; i < 5; ++i)
      CHECK_FALSE(observer.look(2, 40ms, now += 10ms));
    CHECK(observer.look(2, 40ms, now += 10ms));
  }
  SECTION("it has no limit") {
    for (int i = 0; i < 1000; ++i)
      CHECK_FALSE(observer.look(1, 0ns, now += 10ms));
  }
}

TEST_CASE("a wait is as long as it was looked at, whenever the machine stood still") {
  wait_observer observer(10ms);
  wait_observer::time_point now{1h};
  observer.look(1, 40ms, now);
  CHECK_FALSE(observer.look(1, 40ms, now += 10s)); // 20 ms
  CHECK_FALSE(observer.look(1, 40ms, now += 10s)); // 40 ms
  CHECK(observer.look(1, 40ms, now += 10s));
}

TEST_CASE(
  "devices whose steps take up to three times as long as lately are not judged, dead ones are") {
  std::mt19937_64 random(20261122);
  for (int run = 0; run < 200; ++run) {
    step_patience patience;
    wait_observer observer(10ms);
    wait_observer::time_point now{1h};
    std::uint64_t wait = 0;
    const auto usual = std::chrono::microseconds(500 + random() % 60'000);
    const auto step = [&](std::chrono::nanoseconds takes) {
      const auto limit = patience.limit(decode);
      const auto end = now + takes;
      bool is_overdue = false;
      ++wait;
      while (now < end && !is_overdue) {
        // The observer wakes when it can: sometimes much later.
        now += random() % 50 == 0 ? std::chrono::milliseconds(random() % 500) : 10ms;
        is_overdue = observer.look(now < end ? wait : 0, limit, now);
      }
      if (!is_overdue)
        patience.computed(decode, takes);
      return is_overdue;
    };
    for (int i = 0; i < 300; ++i)
      REQUIRE_FALSE(step(usual * (50 + random() % 250) / 100));
    const auto begin = now;
    REQUIRE(step(10min));
    CHECK(now - begin < 12 * 3 * usual + 2s);
  }
}
