#include "deterministic.hpp"

#include "troupe/actors/gpu.hpp"

#include <catch2/catch.hpp>

#include <atomic>
#include <chrono>
#include <optional>
#include <utility>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

using namespace troupe;
using namespace std::chrono_literals;
using actors::device_watch;
using actors::gpu;

namespace {

/// A device that takes the time that it is told.
struct slow_device {
  std::shared_ptr<std::atomic<std::uint64_t>> current =
    std::make_shared<std::atomic<std::uint64_t>>(0);
  std::uint64_t num_waits = 0;
  std::chrono::nanoseconds longest{};

  std::shared_ptr<device_watch> watch(memory::activity pulse = {}, bool is_alone = true) {
    return std::make_shared<device_watch>(
      "replica-0/stage-0", std::move(pulse),
      actors::device_waits{current, [this] { return std::exchange(longest, {}); }},
      gpu::look_interval, is_alone);
  }
  void begin(device_watch& watch) {
    watch.begin({4, 4000});
    *current = ++num_waits;
  }
  void end(device_watch& watch, std::chrono::nanoseconds took) {
    *current = 0;
    longest = took;
    watch.end();
  }
};

/// A GPU in virtual time, and who computes with it.
struct watched_gpu : test::deterministic_system {
  slow_device device;
  std::shared_ptr<device_watch> watch = device.watch();
  std::vector<std::chrono::nanoseconds> overdue;
  actors::gpu_actor looking =
    self->spawn<gpu>(nullptr, std::vector{watch},
                     [this](const device_watch&, auto limit) { overdue.push_back(limit); });

  ~watched_gpu() {
    self->send_exit(looking, caf::exit_reason::kill);
    run();
  }

  void pass(std::chrono::nanoseconds time) {
    run();
    for (; time > 0ns; time -= gpu::look_interval)
      advance(std::min<std::chrono::nanoseconds>(time, gpu::look_interval));
  }
  void compute(std::chrono::nanoseconds time) {
    device.begin(*watch);
    pass(time);
    device.end(*watch, time);
  }
};

} // namespace

TEST_CASE("a GPU that stops answering is overdue, once enough is known of it") {
  watched_gpu one;
  one.compute(10s); // the first ones may take what they want
  for (int i = 0; i < 200; ++i)
    one.compute(1ms);
  CHECK(one.overdue.empty());
  one.device.begin(*one.watch);
  one.pass(recovery::step_patience::least - gpu::look_interval);
  CHECK(one.overdue.empty());
  one.pass(3 * gpu::look_interval);
  REQUIRE(!one.overdue.empty());
  CHECK(one.overdue.front() == recovery::step_patience::least);
}

TEST_CASE("who waits for a GPU gets on, as long as that may take") {
  auto page = memory::pulse_page::create();
  REQUIRE(page);
  auto pulse = memory::pulse::start(::dup(page->fd()), 1ms);
  REQUIRE(pulse);
  const bool is_alone = GENERATE(true, false);
  slow_device device;
  const auto watch = device.watch(*(*pulse)->add("replica-0/stage-0"), is_alone);
  memory::pulse_sample sample;
  const auto progress = [&] {
    page->sample(sample);
    return sample.activities.at(0).progress;
  };
  auto now = std::chrono::steady_clock::time_point{} + 1h;
  /// How long the counter stood still at most, of what a parent would see.
  const auto longest_pause = [&](std::chrono::nanoseconds time) {
    auto longest = 0ns;
    auto still = 0ns;
    auto seen = progress();
    for (const auto end = now + time; now < end;) {
      now += gpu::look_interval;
      watch->look(now);
      still = progress() == seen ? still + gpu::look_interval : 0ns;
      seen = progress();
      longest = std::max(longest, still);
    }
    return longest;
  };
  CHECK(longest_pause(1s) == 1s); // it does not wait: it has to say itself that it gets on
  for (int i = 0; i < 40; ++i) {
    device.begin(*watch);
    CHECK(longest_pause(i == 0 ? 9s : 100ms) <= 2 * gpu::look_interval);
    device.end(*watch, 100ms);
  }
  device.begin(*watch);
  // Where steps are known it is overdue after 400 ms, and whoever looks ends the process.
  const auto pause = longest_pause(30s);
  if (is_alone)
    CHECK(pause > 29s);
  else
    CHECK(std::chrono::abs(pause - 20s) < 50ms);
}

TEST_CASE("time between steps is no wait for a GPU, however long") {
  watched_gpu one;
  for (int i = 0; i < 200; ++i)
    one.compute(1ms);
  one.advance(1h);
  one.compute(1ms);
  CHECK(one.overdue.empty());
}

TEST_CASE("a GPU is allowed four times what steps of that size took of late") {
  watched_gpu one;
  for (int i = 0; i < 200; ++i)
    one.compute(100ms);
  one.compute(395ms);
  CHECK(one.overdue.empty());
  for (int i = 0; i < 200; ++i) // until that one is forgotten
    one.compute(100ms);
  one.compute(420ms);
  REQUIRE(!one.overdue.empty());
  CHECK(one.overdue.front() == 400ms);
}

TEST_CASE("a process whose device is stuck ends with a code of its own, and says why") {
  auto page = memory::pulse_page::create();
  REQUIRE(page);
  const auto pid = ::fork();
  REQUIRE(pid >= 0);
  if (pid == 0) {
    slow_device device;
    auto pulse = memory::pulse::start(::dup(page->fd()), 1ms);
    const auto watch = device.watch(*(*pulse)->add("replica-0/stage-0"));
    device_watch::end_process(*watch, 20ms);
  }
  int status = 0;
  REQUIRE(::waitpid(pid, &status, 0) == pid);
  REQUIRE(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == actors::exit_device_stuck);
  CHECK(
    page->last_words().find("replica-0/stage-0: the device has not answered for more than 20 ms")
    == 0);
}
