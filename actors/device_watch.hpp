#pragma once

#include "troupe/memory/pulse_page.hpp"
#include "troupe/recovery/step_watch.hpp"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

namespace troupe::actors {

/// Returned by a process whose device did not answer in the time that it usually takes many times
/// over. What it has given its device to do may go on for long.
inline constexpr int exit_device_stuck = 6;

/// How the operations of a device wait for it.
struct device_waits {
  std::shared_ptr<const std::atomic<std::uint64_t>> current; ///< another number each; 0: none
  std::function<std::chrono::nanoseconds()> take_longest; ///< since the last call; computing thread
};

/// How long one actor may wait for its device, and whether it does. Two threads have a side of it:
/// the actor, which computes, and the device's `gpu`, which looks. A failed GPU is reported by its
/// driver after some 200 ms; who knows how long steps take hears of it sooner.
///
/// While it waits, an actor cannot say that it gets on, and one wait may be for much: the layers of
/// a long prompt. So the watch says it in its place, as long as the wait is within its limit; one
/// without a limit may last `longest_wait`.
class device_watch {
public:
  static constexpr std::chrono::seconds longest_wait{10};

  /// `actor` as planned ("replica-0/stage-1"), `pulse` that of its computing thread.
  /// `look_interval`: how often `look` is called. `is_alone`: nobody else computes on the device.
  /// Otherwise it cannot be known how long steps take, and there are no limits.
  device_watch(std::string actor, memory::activity pulse, device_waits waits,
               std::chrono::milliseconds look_interval, bool is_alone = true);

  /// The computing thread begins a step. Waits in it are limited by what is known of such steps.
  void begin(const recovery::step_size& size);
  /// It was computed.
  void end();

  /// The limit of the present wait, if it has lasted longer; otherwise ticks for it. The looking
  /// thread.
  std::optional<std::chrono::nanoseconds> look(std::chrono::steady_clock::time_point now);

  /// Ends this process with exit_device_stuck, naming the actor of `whose`.
  [[noreturn]] static void end_process(const device_watch& whose, std::chrono::nanoseconds limit);

private:
  std::string actor_;
  memory::activity pulse_;
  device_waits waits_;
  bool is_alone_;
  recovery::step_patience patience_; // of the computing thread, like the next one
  recovery::step_size size_;
  std::atomic<std::int64_t> limit_ns_{0}; ///< of the present step; 0: none
  recovery::wait_observer observer_;      // of the looking thread
};

} // namespace troupe::actors
