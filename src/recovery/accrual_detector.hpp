#pragma once

#include <array>
#include <chrono>
#include <cstddef>

namespace troupe::recovery {

/// Suspects a peer the more, the longer its heartbeats stay away compared with how regularly they
/// came before: phi is -log10 of the chance that the next one is only late (N. Hayashibara et al.,
/// "The phi accrual failure detector", SRDS 2004), with the tail of the normal distribution by
/// the logistic approximation of S. Bowling et al. (J. Industrial Engineering and Management 2(1),
/// 2009). phi 1: one in ten heartbeats is as late; phi 8: one in 10^8.
///
/// Before it has seen anything it expects heartbeats at the agreed interval, a quarter of it early
/// or late. A silence teaches at most `least_patience`, so one failure does not hide the next.
///
/// Pure: time is handed in. Also fair: time in which the observer itself did not run counts for
/// nobody (see `observer_paused`).
class accrual_detector {
public:
  using time_point = std::chrono::steady_clock::time_point;
  using duration = std::chrono::steady_clock::duration;

  /// `interval`: between two heartbeats, by agreement. `least_patience`: silence that is never
  /// suspicious, whatever the statistics say.
  accrual_detector(duration interval, duration least_patience);

  /// A heartbeat came. The first one starts the watch.
  void heartbeat(time_point now);

  /// The observer was not running for so long.
  void observer_paused(duration lost);

  /// 0 before the first heartbeat and within `least_patience`. Never falls while silence lasts.
  double phi(time_point now) const;

  /// Silence so far; 0 before the first heartbeat.
  duration silence(time_point now) const;

  /// Forgets everything: the peer begins anew.
  void reset();

private:
  using milliseconds = std::chrono::duration<double, std::milli>;

  static constexpr std::size_t window = 100;

  void learn(milliseconds interval);

  duration least_patience_;
  milliseconds agreed_;
  milliseconds longest_lesson_;
  std::array<milliseconds, window> intervals_{}; ///< a ring
  std::size_t count_ = 0;
  std::size_t next_ = 0;
  bool started_ = false;
  time_point last_{};
};

} // namespace troupe::recovery
