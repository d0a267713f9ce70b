#include "troupe/recovery/pulse_monitor.hpp"

#include <catch2/catch.hpp>

#include <functional>
#include <random>

using namespace std::chrono_literals;
using troupe::memory::activity_state;
using troupe::memory::pulse_sample;
using troupe::recovery::pulse_monitor;

namespace {

constexpr auto patience = 800ms;
constexpr auto birth = 5s;
constexpr auto poll = 50ms;

/// A watched process and its observer, in virtual time.
struct watch {
  pulse_monitor monitor{patience, birth, poll};
  pulse_monitor::time_point now{1h};
  pulse_sample sample;

  watch() { monitor.born(now); }

  /// A process that has begun and computes.
  static watch computing() {
    watch w;
    w.sample.beat = w.sample.control = 1;
    w.sample.activities.push_back({"replica-0/stage-1", activity_state::computing, 7});
    w.must_live(1s, &watch::all);
    return w;
  }

  void all() {
    ++sample.beat;
    ++sample.control;
    for (auto& activity : sample.activities)
      ++activity.progress;
  }
  void beat_only() { ++sample.beat; }
  void beat_and_control() {
    ++sample.beat;
    ++sample.control;
  }
  void nothing() {}

  auto step(const std::function<void(watch&)>& act, pulse_monitor::duration d = poll) {
    now += d;
    act(*this);
    return monitor.look(sample, now);
  }

  /// Polls for `d` while the process does `act` before every look.
  void must_live(pulse_monitor::duration d, const std::function<void(watch&)>& act) {
    for (const auto end = now + d; now < end;) {
      const auto verdict = step(act);
      INFO((end - now) / 1ms << " ms before the end: " << verdict.value_or(""));
      REQUIRE_FALSE(verdict);
    }
  }

  /// How long it takes until the process counts as dead, and why.
  std::pair<pulse_monitor::duration, std::string> dies(const std::function<void(watch&)>& act) {
    for (const auto begin = now; now < begin + 1min;) {
      if (auto verdict = step(act))
        return {now - begin, *verdict};
    }
    return {1h, "lives"};
  }
};

bool within(pulse_monitor::duration d, pulse_monitor::duration from, pulse_monitor::duration to) {
  INFO(d / 1ms << " ms");
  CHECK(d >= from);
  CHECK(d <= to);
  return d >= from && d <= to;
}

} // namespace

TEST_CASE("a process without a beat is dead after its patience") {
  auto w = watch::computing();
  const auto [after, why] = w.dies(&watch::nothing);
  within(after, patience, patience + 2 * poll);
  CHECK(why == "no beat for 800 ms");
  CHECK(w.step(&watch::nothing)); // and stays dead
  w.monitor.born(w.now);          // until it is another
  w.sample = {};
  w.must_live(birth - poll, &watch::nothing);
}

TEST_CASE("a process whose actors do not answer is dead though it beats and computes") {
  auto w = watch::computing();
  const auto [after, why] = w.dies([](watch& p) {
    ++p.sample.beat;
    ++p.sample.activities[0].progress;
  });
  within(after, patience, patience + 2 * poll);
  CHECK(why == "its actors have not answered for 800 ms");
}

TEST_CASE("nobody's answers are missed while nobody asks") {
  watch w;
  w.must_live(20s, &watch::beat_only);
  w.sample.control = 1;
  within(w.dies(&watch::beat_only).first, patience, patience + 2 * poll);
}

TEST_CASE("computing without progress is death, and its name is told") {
  auto w = watch::computing();
  w.sample.activities.push_back({"experts-2", activity_state::computing, 3});
  w.must_live(1s, &watch::all);
  const auto [after, why] = w.dies([](watch& p) {
    p.all();
    --p.sample.activities[1].progress;
  });
  within(after, patience, patience + 2 * poll);
  CHECK(why == "experts-2 computes without progress for 800 ms");
}

TEST_CASE("waiting and being idle are no work, for as long as they last") {
  for (const auto state : {activity_state::idle, activity_state::waiting}) {
    auto w = watch::computing();
    w.must_live(patience - poll, &watch::beat_and_control); // nearly dead
    w.sample.activities[0].state = state;
    w.must_live(60s, &watch::beat_and_control);
    // Its clock begins when it is seen to compute.
    w.sample.activities[0].state = activity_state::computing;
    within(w.dies(&watch::beat_and_control).first, patience, patience + 2 * poll);
  }
}

TEST_CASE("a long computation lives as long as it ticks now and then") {
  auto w = watch::computing();
  for (int i = 0; i < 100; ++i) {
    w.must_live(patience - poll, &watch::beat_and_control);
    w.must_live(poll, &watch::all);
  }
}

TEST_CASE("a process may be slow to begin, but not for ever") {
  watch w;
  const auto [after, why] = w.dies(&watch::nothing);
  within(after, birth, birth + 2 * poll);
  CHECK(why == "no beat yet 5000 ms after its start");
}

TEST_CASE("time in which the observer did not run counts for nobody") {
  auto w = watch::computing();
  for (int i = 0; i < 7; ++i) // nothing has moved, but it looked seven times only
    REQUIRE_FALSE(w.step(&watch::nothing, 10s));
  within(w.dies(&watch::nothing).first, poll, 2 * poll);

  watch unborn;
  REQUIRE_FALSE(unborn.step(&watch::nothing, 1h));
}

TEST_CASE("a process that was stopped and goes on in time has all its patience again") {
  auto w = watch::computing();
  for (int i = 0; i < 20; ++i) {
    w.must_live(patience - 2 * poll, &watch::nothing);
    // Whatever begins to move first, the rest has time to follow.
    w.must_live(poll, &watch::beat_only);
    w.must_live(patience / 2, &watch::beat_and_control);
    w.must_live(poll, &watch::all);
  }
}

TEST_CASE("beats that fall between two looks are not missed") {
  auto w = watch::computing();
  const auto slowly = [even = false](watch& p) mutable {
    if (even = !even; even)
      p.beat_only();
  };
  const auto [after, why] = w.dies(slowly);
  within(after, patience, patience + 3 * poll); // no later than with a beat a look
  CHECK(why.starts_with("its actors"));
}

TEST_CASE("activities come and go with the page") {
  auto w = watch::computing();
  w.must_live(patience - poll, &watch::beat_and_control);
  w.sample.activities[0].name = "replica-0/stage-2"; // another one, with a clock of its own
  w.must_live(patience - poll, &watch::beat_and_control);
  w.sample.activities.clear();
  w.must_live(10s, &watch::beat_and_control);
}

TEST_CASE("no healthy process is ever called dead, however looks and beats fall") {
  for (std::uint32_t seed = 0; seed < 300; ++seed) {
    std::mt19937 random(seed);
    const auto any = [&](int from, int to) {
      return std::uniform_int_distribution<>(from, to)(random) * 1ms;
    };
    auto w = watch::computing();
    // Each of the signs of life comes again within 600 ms of the time in which the process runs;
    // it is stopped for up to 600 ms now and then, and the observer for any time.
    auto beat = w.now;
    auto control = w.now;
    auto progress = w.now;
    auto may_stop = w.now;
    const auto end = w.now + 60s;
    while (w.now < end) {
      if (w.now > may_stop && any(0, 99) == 0ms) {
        const auto stopped = any(0, 600);
        beat = control = progress = w.now + stopped;
        may_stop = beat + 100ms;
      }
      w.now += any(0, 199) == 0ms ? any(0, 20000) : any(20, 60);
      if (w.now >= beat) {
        ++w.sample.beat;
        beat = w.now + any(20, 80);
      }
      if (w.now >= control) {
        ++w.sample.control;
        control = w.now + any(20, 600);
      }
      if (w.now >= progress) {
        ++w.sample.activities[0].progress;
        progress = w.now + any(1, 600);
      }
      const auto verdict = w.monitor.look(w.sample, w.now);
      INFO("seed " << seed << ": " << verdict.value_or(""));
      REQUIRE_FALSE(verdict);
    }
  }
}

TEST_CASE("a process that waits for a processor gets five times the patience, and no more") {
  pulse_monitor monitor(800ms, 10s, 100ms);
  pulse_sample sample;
  sample.beat = 1;
  auto now = pulse_monitor::time_point{} + 1h;
  monitor.born(now);
  int died_at = 0;
  for (int i = 1; i <= 60 && died_at == 0; ++i)
    if (monitor.look(sample, now + i * 100ms, [] { return true; }))
      died_at = i;
  CHECK(died_at >= 40);
  CHECK(died_at <= 42);
}
