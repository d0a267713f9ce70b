#include "troupe/actors/device_watch.hpp"

#include <cstdlib>
#include <utility>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

namespace troupe::actors {

device_watch::device_watch(std::string actor, memory::activity pulse, device_waits waits,
                           std::chrono::milliseconds look_interval, bool is_alone)
  : actor_(std::move(actor)),
    pulse_(std::move(pulse)),
    waits_(std::move(waits)),
    is_alone_(is_alone),
    observer_(look_interval) {}

void device_watch::begin(const recovery::step_size& size) {
  if (!is_alone_)
    return;
  size_ = size;
  waits_.take_longest();
  limit_ns_.store(patience_.limit(size).count(), std::memory_order_relaxed);
}

void device_watch::end() {
  if (!is_alone_)
    return;
  limit_ns_.store(0, std::memory_order_relaxed);
  patience_.computed(size_, waits_.take_longest());
}

std::optional<std::chrono::nanoseconds>
device_watch::look(std::chrono::steady_clock::time_point now) {
  const auto wait = waits_.current->load(std::memory_order_relaxed);
  const std::chrono::nanoseconds limit(limit_ns_.load(std::memory_order_relaxed));
  if (observer_.look(wait, limit, now))
    return limit;
  if (wait != 0 && (limit.count() > 0 || observer_.lasted() < longest_wait))
    pulse_.tick();
  return std::nullopt;
}

void device_watch::end_process(const device_watch& whose, std::chrono::nanoseconds limit) {
  const auto why =
    fmt::format("the device has not answered for more than {:.0f} ms, four times as long as it "
                "took of late",
                std::chrono::duration<double, std::milli>(limit).count());
  spdlog::critical("{}: {}; ending", whose.actor_, why);
  whose.pulse_.last_words(why);
  spdlog::default_logger()->flush();
  std::_Exit(exit_device_stuck);
}

} // namespace troupe::actors
