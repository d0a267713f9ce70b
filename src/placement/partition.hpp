#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace troupe::placement {

/// Cuts `costs` into `num_parts` contiguous runs of at least one item each; `last_extra`
/// comes on top of the last run. The result holds num_parts + 1 bounds: part p is
/// [result[p], result[p + 1]). The costliest part is as cheap as possible; among those
/// cuts the sum of squared part costs is least; ties go to the earliest bounds.
/// Needs 1 <= num_parts <= costs.size().
std::vector<std::uint32_t> partition(std::span<const std::uint64_t> costs, std::uint32_t num_parts,
                                     std::uint64_t last_extra);

} // namespace troupe::placement
