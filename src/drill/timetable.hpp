#pragma once

#include "troupe/drill/scenario.hpp"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace troupe::drill {

/// An event with everything drawn that can be drawn beforehand.
struct planned_event {
  std::size_t event = 0;  ///< its number in the scenario
  milliseconds at{};      ///< after the run's start, or after its condition holds
  milliseconds lasting{}; ///< 0: to the end of the run
  std::uint64_t seed = 0; ///< for choosing the target, and of its rule
};

/// The seed of one run of a drill. Running one with `--seed` of this and `--runs 1` repeats it.
constexpr std::uint64_t seed_of_run(std::uint64_t seed, unsigned run) {
  return seed + run;
}

/// What happens when in a run, repetitions written out. Events that wait for a condition stay
/// behind the one they follow in the scenario; the others are in the order of time.
std::vector<planned_event> timetable(const scenario& drill, std::uint64_t run_seed);

/// Gaps between the arrivals of an open loop (exponential, a Poisson process).
class arrivals {
public:
  arrivals(double rate_per_s, std::uint64_t seed);
  std::chrono::nanoseconds next();

private:
  double rate_per_s_;
  std::uint64_t state_;
};

} // namespace troupe::drill
