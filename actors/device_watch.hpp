#pragma once

#include "troupe/memory/pulse_page.hpp"
#include "troupe/recovery/step_watch.hpp"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

namespace troupe::actors {

/// Returned by a process whose device did not answer in the time that it usually takes many times
/// over. What it has given its device to do may go on for long.
inline constexpr int exit_device_stuck = 6;

/// How the operations of a device wait for it.
struct device_waits {
  const std::atomic<std::uint64_t>* current = nullptr;    ///< another number for each wait; 0: none
  std::function<std::chrono::nanoseconds()> take_longest; ///< since the last call; computing thread
};

/// Looks whether a device still answers, from a thread of its own, while another one computes with
/// it. A failed GPU is reported by its driver after some 200 ms; who knows how long steps take
/// hears of it sooner.
class device_watch {
public:
  using overdue_callback = std::function<void(std::chrono::nanoseconds limit)>;

  static constexpr std::chrono::milliseconds look_interval{5};

  /// `on_overdue` runs on the looking thread, once. `waits` must work as long as this lives.
  device_watch(device_waits waits, overdue_callback on_overdue);
  /// Ends this process with exit_device_stuck, naming `actor`, whose pulse it is.
  static overdue_callback end_process(std::string actor, memory::activity pulse);
  ~device_watch();
  device_watch(const device_watch&) = delete;
  device_watch& operator=(const device_watch&) = delete;

  /// The computing thread begins a step. Waits in it are limited by what is known of such steps.
  void begin(const recovery::step_size& size);
  /// It was computed.
  void end();

private:
  void run();

  device_waits waits_;
  overdue_callback on_overdue_;
  recovery::step_patience patience_; // of the computing thread, like the next one
  recovery::step_size size_;
  std::atomic<std::int64_t> limit_ns_{0}; ///< of the present step; 0: none
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stopping_ = false;
  std::thread thread_;
};

} // namespace troupe::actors
