#pragma once

#include "troupe/recovery/longest_recent.hpp"

#include <chrono>
#include <cstdint>
#include <vector>

namespace troupe::recovery {

/// When a micro-batch that got no answer is sent again, and whether one that failed is tried once
/// more. Pure: time is handed in. Belongs to a scheduler.
///
/// A step is overdue after the interval, but not before twice the longest time that a step took of
/// late; each repetition waits twice as long as the one before, up to `max_backoff` intervals.
/// As in Karn's algorithm (Karn, Partridge: Improving Round-Trip Time Estimates in Reliable
/// Transport Protocols, SIGCOMM 1987), steps that were sent more than once are not measured.
class resend_watch {
public:
  using time_point = std::chrono::steady_clock::time_point;

  static constexpr std::uint32_t max_backoff = 8;

  /// An interval of zero: nothing is ever overdue.
  explicit resend_watch(std::chrono::milliseconds interval) : interval_(interval) {}

  /// A step goes out: for the first time, again, or in a new epoch.
  void sent(std::uint64_t step, time_point now);

  /// The same, because the epoch has changed: what failed before may be tried once more.
  void sent_in_new_epoch(std::uint64_t step, time_point now);

  /// It was answered, or given up.
  void completed(std::uint64_t step, time_point now);
  void forget(std::uint64_t step);
  void forget_all() { steps_.clear(); }

  /// The steps to be sent again now, oldest first. Valid until the next call.
  const std::vector<std::uint64_t>& overdue(time_point now);

  /// A failure of an attempt at a step is reported. True: it is worth another attempt, which
  /// `attempt` then names. False with `is_news` false: it is of an older attempt, ignore it.
  struct verdict {
    bool is_news = false;
    bool retry = false;
  };
  verdict failed(std::uint64_t step, std::uint32_t attempt, bool may_pass);

  /// The attempt that a step is at, from 0.
  std::uint32_t attempt(std::uint64_t step) const;

  /// How long a step that is sent for the n-th time, from 1, waits for its answer.
  std::chrono::nanoseconds patience(std::uint32_t num_sent) const;

private:
  struct entry {
    std::uint64_t step = 0;
    time_point first_sent;
    time_point last_sent;
    std::uint32_t num_sent = 0;       ///< sent so often, for the measurement
    std::uint32_t num_unanswered = 0; ///< the same in this epoch and attempt
    std::uint32_t attempt = 0;
    bool has_failed = false; ///< in this epoch
  };

  entry* find(std::uint64_t step);

  std::chrono::nanoseconds interval_;
  longest_recent took_;
  std::vector<entry> steps_; ///< a handful, in the order of their first sending
  std::vector<std::uint64_t> overdue_;
};

} // namespace troupe::recovery
