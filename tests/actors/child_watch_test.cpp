#include "troupe/actors/child_watch.hpp"

#include <catch2/catch.hpp>

#include <chrono>
#include <optional>
#include <string>
#include <vector>

#include <unistd.h>

using namespace troupe;
using namespace std::chrono_literals;
using actors::child_watch;

namespace {

/// Looks every `interval` for `time` of virtual time; when it was judged, if it was.
std::optional<std::chrono::milliseconds> look_for(child_watch& watch, child_watch::time_point& now,
                                                  std::chrono::milliseconds time) {
  auto interval = child_watch::interval(800ms);
  for (auto passed = interval; passed <= time; passed += interval) {
    now += interval;
    if (watch.look(::getpid(), now))
      return passed;
  }
  return std::nullopt;
}

} // namespace

TEST_CASE("a child inherits its page, and is judged once when it never beats") {
  child_spec spec;
  auto watch = child_watch::begin(spec, 800ms);
  REQUIRE(watch);
  REQUIRE(spec.inherited_fds.size() == 1);
  CHECK(spec.arguments
        == std::vector<std::string>{"--pulse-fd", std::to_string(spec.inherited_fds[0])});
  auto now = std::chrono::steady_clock::now();
  CHECK(look_for(*watch, now, 9900ms) == std::nullopt);
  CHECK(watch->verdict().empty());
  CHECK(look_for(*watch, now, 300ms));
  CHECK(watch->verdict().find("no beat yet") == 0);
  CHECK(watch->judged() == now);
  auto judged = now;
  CHECK(look_for(*watch, now, 1s) == std::nullopt); // it is being killed already
  CHECK(watch->judged() == judged);
}

TEST_CASE("a child that has beaten and stops is judged after its patience") {
  child_spec spec;
  auto watch = child_watch::begin(spec, 800ms);
  REQUIRE(watch);
  auto now = std::chrono::steady_clock::now();
  {
    auto pulse = memory::pulse::start(::dup(spec.inherited_fds.at(0)), 1ms);
    REQUIRE(pulse);
    // The first beat comes from another thread: it is waited for, bounded by the birth time.
    memory::pulse_sample seen;
    auto page = memory::pulse_page::attach(::dup(spec.inherited_fds[0]));
    REQUIRE(page);
    auto deadline = std::chrono::steady_clock::now() + 10s;
    while (seen.beat == 0 && std::chrono::steady_clock::now() < deadline)
      page->sample(seen);
    REQUIRE(seen.beat != 0);
  }
  auto judged = look_for(*watch, now, 2s);
  REQUIRE(judged);
  CHECK(*judged >= 800ms);
  CHECK(*judged <= 1100ms);
  CHECK(watch->verdict().find("no beat for") == 0);
}

TEST_CASE("a child that says what it ends of is believed") {
  child_spec spec;
  auto watch = child_watch::begin(spec, 800ms);
  REQUIRE(watch);
  child_exit exit;
  exit.status = 3;
  CHECK(watch->cause_of(exit) == "exited with code 3");
  auto pulse = memory::pulse::start(::dup(spec.inherited_fds.at(0)), 1h);
  REQUIRE(pulse);
  (*pulse)->last_words("the device failed");
  CHECK(watch->cause_of(exit) == "exited with code 3: the device failed");
}

TEST_CASE("a short patience does not make a parent look all the time") {
  CHECK(child_watch::interval(800ms) == 100ms);
  CHECK(child_watch::interval(16ms) == 10ms);
}
