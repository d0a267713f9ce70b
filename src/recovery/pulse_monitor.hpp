#pragma once

#include "troupe/memory/pulse_page.hpp"

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace troupe::recovery {

/// Judges a process by its pulse page: whether it runs (beat), whether its actors answer
/// (control) and whether what computes gets on (progress). Pure: samples and time are handed in.
///
/// - A long computation is not death: it ticks as it goes, and only computing without a tick
/// counts.
/// - Waiting for a peer is not hanging: the peer has a pulse of its own.
/// - Time in which the observer did not run itself counts for nobody: however late it looks, two
///   poll intervals have passed at most.
/// - Time in which the process did not run counts against its beat, not against its actors and
///   activities, which have the same right to begin again when it does.
class pulse_monitor {
public:
  using time_point = std::chrono::steady_clock::time_point;
  using duration = std::chrono::steady_clock::duration;

  /// `patience`: the silence that is death (recovery.hang_ms). `birth`: how long a process may
  /// take to its first beat. `poll_interval`: at which `look` is called when all is well.
  pulse_monitor(duration patience, duration birth, duration poll_interval);

  /// The process was started (again); forgets the one before.
  void born(time_point now);

  /// Looks at a sample. Why the process counts as dead, in words for people ("no beat for
  /// 812 ms", "its actors have not answered for 830 ms", "replica-0/stage-1 computes without
  /// progress for 801 ms"), or nothing. Says it again at every look until the process is born anew.
  ///
  /// `is_starved` is asked about a silent process: does its beating thread wait for a processor?
  /// Then it is the machine that is overloaded, and five times the patience applies.
  std::optional<std::string> look(const memory::pulse_sample& sample, time_point now,
                                  const std::function<bool()>& is_starved = {});

private:
  /// A counter and the time at which it was seen to change, by one of the clocks below.
  struct counter {
    std::uint64_t value = 0;
    duration changed{};

    /// How long it has stood still.
    duration update(std::uint64_t seen, duration clock);
  };

  struct watched_activity {
    std::string name;
    counter progress;
  };

  duration patience_;
  duration birth_;
  duration poll_interval_;
  time_point last_look_{};
  bool has_looked_ = false;
  duration watched_{}; ///< time since birth in which the observer ran
  duration lived_{};   ///< the part of it in which the process did
  counter beat_;
  counter control_;
  std::vector<watched_activity> activities_;
};

} // namespace troupe::recovery
