#include "troupe/actors/device_watch.hpp"

#include <catch2/catch.hpp>

#include <atomic>
#include <chrono>
#include <functional>
#include <utility>
#include <thread>

#include <sys/wait.h>
#include <unistd.h>

using namespace troupe;
using namespace std::chrono_literals;
using actors::device_watch;

namespace {

/// A device that answers after the time that it is told.
struct slow_device {
  std::atomic<std::uint64_t> current{0};
  std::uint64_t num_waits = 0;
  std::chrono::nanoseconds longest{};

  actors::device_waits waits() {
    return {&current, [this] { return std::exchange(longest, {}); }};
  }
  /// Until `is_over` where that is given, and for so long otherwise.
  void compute(device_watch& watch, std::chrono::nanoseconds time,
               const std::function<bool()>& is_over = {}) {
    watch.begin({4, 4000});
    current = ++num_waits;
    const auto end = std::chrono::steady_clock::now() + (is_over ? 20s : time);
    while (std::chrono::steady_clock::now() < end && !(is_over && is_over()))
      std::this_thread::yield();
    current = 0;
    longest = time; // as it would be on a machine with nothing else to do
    watch.end();
  }
};

} // namespace

TEST_CASE("a device that stops answering is overdue, once enough is known of it") {
  slow_device device;
  std::atomic<std::int64_t> overdue{0};
  device_watch watch(device.waits(), [&](auto limit) { overdue = limit.count(); });
  device.compute(watch, 200ms); // the first ones may take what they want
  CHECK(overdue == 0);
  for (int i = 0; i < 200; ++i)
    device.compute(watch, 100us);
  CHECK(overdue == 0);
  device.compute(watch, 1ms, [&] { return overdue != 0; });
  CHECK(std::chrono::nanoseconds(overdue) == recovery::step_patience::least);
}

TEST_CASE("a process whose device is stuck ends with a code of its own") {
  auto page = memory::pulse_page::create();
  REQUIRE(page);
  const auto pid = ::fork();
  REQUIRE(pid >= 0);
  if (pid == 0) {
    slow_device device;
    auto pulse = memory::pulse::start(::dup(page->fd()), 1ms);
    device_watch watch(device.waits(), device_watch::end_process(
                                         "replica-0/stage-0", *(*pulse)->add("replica-0/stage-0")));
    for (int i = 0; i < 200; ++i)
      device.compute(watch, 100us);
    device.compute(watch, 1ms, [] { return false; });
    ::_exit(0);
  }
  int status = 0;
  REQUIRE(::waitpid(pid, &status, 0) == pid);
  REQUIRE(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == actors::exit_device_stuck);
  CHECK(page->last_words().find("replica-0/stage-0: the device has not answered") == 0);
}
