#pragma once

#include "troupe/drill/scenario.hpp"

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace troupe::drill {

/// The processes and copies that a cluster has when it is new; faults are drawn for these.
struct cast {
  std::vector<std::string> workers;       ///< that run something
  std::vector<std::string> expert_groups; ///< those of the workers that run experts
  std::vector<std::string> nodes;
  bool has_standbys = false;
};

/// A kind of fault that random drills draw.
struct random_fault {
  std::string_view name; ///< "kill-worker", for `--faults`
  unsigned weight;
};

/// All of them.
std::span<const random_fault> random_faults();

/// What to draw.
struct random_settings {
  std::uint64_t seed = 1;
  milliseconds length{60'000};
  milliseconds every{2'000};     ///< between two faults
  std::vector<std::string> only; ///< names of random_faults; empty: all
  std::vector<std::string> without;
};

/// Draws events: one fault (or a pair that belongs together) every `every`, a little before or
/// after, from the first on. The same settings and cast give the same events. Fails with
/// invalid_request for unknown names.
expected<std::vector<event>> draw_events(const random_settings& settings, const cast& who);

} // namespace troupe::drill
