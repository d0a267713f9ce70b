#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace troupe::placement {

/// A device as a number of its node and a number within that node.
struct seat {
  std::uint32_t node = 0;
  std::uint32_t device = 0;

  friend bool operator==(const seat&, const seat&) = default;
};

/// Devices for every actor, by their numbers.
struct seating {
  std::vector<std::vector<seat>> stages;  ///< [replica][stage]
  std::vector<std::vector<seat>> experts; ///< [group][copy]
};

/// Gives every actor a device, under the rules of `place`. `num_devices` holds the
/// number of devices of each node; at least one of them is not 0.
seating seat_actors(std::span<const std::uint32_t> num_devices, std::uint32_t num_replicas,
                    std::uint32_t num_stages, std::uint32_t num_groups, std::uint32_t num_copies);

} // namespace troupe::placement
