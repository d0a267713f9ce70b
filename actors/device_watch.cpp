#include "troupe/actors/device_watch.hpp"

#include <csignal>
#include <cstdlib>
#include <system_error>
#include <utility>

#include <fmt/format.h>
#include <pthread.h>
#include <spdlog/spdlog.h>

namespace troupe::actors {

device_watch::device_watch(device_waits waits, overdue_callback on_overdue)
  : waits_(std::move(waits)), on_overdue_(std::move(on_overdue)) {
  // Signals are handled by the threads that expect them.
  sigset_t all;
  sigset_t before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    thread_ = std::thread([this] { run(); });
  } catch (const std::system_error& e) {
    spdlog::warn("a device that fails will be heard of late: {}", e.what());
  }
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

device_watch::overdue_callback device_watch::end_process(std::string actor,
                                                         memory::activity pulse) {
  return [actor = std::move(actor), pulse = std::move(pulse)](std::chrono::nanoseconds limit) {
    const auto why =
      fmt::format("the device has not answered for more than {:.0f} ms, four times as long as it "
                  "took of late",
                  std::chrono::duration<double, std::milli>(limit).count());
    spdlog::critical("{}: {}; ending", actor, why);
    pulse.last_words(why);
    spdlog::default_logger()->flush();
    std::_Exit(exit_device_stuck);
  };
}

device_watch::~device_watch() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable())
    thread_.join();
}

void device_watch::begin(const recovery::step_size& size) {
  size_ = size;
  waits_.take_longest();
  limit_ns_.store(patience_.limit(size).count(), std::memory_order_relaxed);
}

void device_watch::end() {
  limit_ns_.store(0, std::memory_order_relaxed);
  patience_.computed(size_, waits_.take_longest());
}

void device_watch::run() {
  ::pthread_setname_np(::pthread_self(), "device watch");
  recovery::wait_observer observer(look_interval);
  std::unique_lock lock(mutex_);
  while (!wake_.wait_for(lock, look_interval, [this] { return stopping_; })) {
    const auto wait = waits_.current->load(std::memory_order_relaxed);
    const std::chrono::nanoseconds limit(limit_ns_.load(std::memory_order_relaxed));
    if (!observer.look(wait, limit, std::chrono::steady_clock::now()))
      continue;
    on_overdue_(limit);
    return;
  }
}

} // namespace troupe::actors
