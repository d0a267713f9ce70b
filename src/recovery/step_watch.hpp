#pragma once

#include "troupe/recovery/longest_recent.hpp"

#include <array>
#include <chrono>
#include <cstdint>

namespace troupe::recovery {

/// How much there is to compute in a step, for its time: rows, and positions that they attend to.
struct step_size {
  std::uint32_t num_rows = 0;
  std::uint64_t num_positions = 0; ///< of all rows together
};

/// How long a process may wait for its device within a step before the device is taken for dead:
/// four times the longest wait of late in steps of about that size, at least 20 ms. Nothing is
/// known, and nobody judged, before a number of such steps have been seen. Pure.
///
/// Sizes are alike where rows and positions have as many binary digits. What a step costs beyond
/// (the experts it happens to need, a device that runs slower because it is hot) is within the
/// factor. Waits are measured, not steps: what the host does meanwhile, such as recording, is none.
class step_patience {
public:
  static constexpr std::chrono::nanoseconds least = std::chrono::milliseconds(20);
  static constexpr int factor = 4;
  /// Of one size, to begin with; the first ones load code and find clocks low.
  static constexpr std::uint32_t num_to_learn = 16;

  /// A step of that size was computed; its longest wait took so long.
  void computed(const step_size& size, std::chrono::nanoseconds longest_wait);

  /// Zero: as long as it takes.
  std::chrono::nanoseconds limit(const step_size& size) const;

private:
  static constexpr std::size_t row_digits = 16;
  static constexpr std::size_t position_digits = 32;

  struct known {
    std::uint32_t num_seen = 0;
    longest_recent longest;
  };
  static std::size_t place_of(const step_size& size);

  std::array<known, row_digits * position_digits> sizes_;
};

/// Looks at a wait from another thread, again and again, and says when it has lasted too long.
/// Pure. Time in which the observer did not run counts for nobody: however late it looks, two
/// intervals have passed at most, and a wait that ends as soon as the machine runs again is none.
class wait_observer {
public:
  using time_point = std::chrono::steady_clock::time_point;
  using duration = std::chrono::steady_clock::duration;

  explicit wait_observer(duration interval) : interval_(interval) {}

  /// `wait`: another number for each wait; 0: there is none. `limit`: of this one; zero: none.
  bool look(std::uint64_t wait, std::chrono::nanoseconds limit, time_point now);

  /// How long the wait that was looked at last has lasted; zero when there was none.
  duration lasted() const { return lasted_; }

private:
  duration interval_;
  std::uint64_t wait_ = 0;
  duration lasted_{};
  time_point last_look_{};
};

} // namespace troupe::recovery
