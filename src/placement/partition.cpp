#include "troupe/placement/partition.hpp"

#include <algorithm>
#include <cassert>
#include <limits>

namespace troupe::placement {

namespace {

/// Whether the costs can be cut into at most `num_parts` runs, none above `bound`. Fewer
/// are as good: a run can always be cut further, since there are enough items.
bool fits(std::span<const std::uint64_t> costs, std::uint32_t num_parts, std::uint64_t last_extra,
          std::uint64_t bound) {
  std::uint32_t parts = 1;
  std::uint64_t sum = 0;
  for (std::size_t i = 0; i < costs.size(); ++i) {
    const std::uint64_t cost = costs[i] + (i + 1 == costs.size() ? last_extra : 0);
    if (cost > bound)
      return false;
    if (sum + cost > bound) {
      ++parts;
      sum = 0;
    }
    sum += cost;
  }
  return parts <= num_parts;
}

} // namespace

std::vector<std::uint32_t> partition(std::span<const std::uint64_t> costs, std::uint32_t num_parts,
                                     std::uint64_t last_extra) {
  const std::size_t n = costs.size();
  assert(num_parts >= 1 && num_parts <= n);
  std::vector<std::uint64_t> before(n + 1, 0); // cost of the first i items
  for (std::size_t i = 0; i < n; ++i)
    before[i + 1] = before[i] + costs[i];
  before[n] += last_extra;

  std::uint64_t low = 0;
  std::uint64_t high = before[n];
  while (low < high) {
    const std::uint64_t middle = low + (high - low) / 2;
    if (fits(costs, num_parts, last_extra, middle))
      high = middle;
    else
      low = middle + 1;
  }
  const std::uint64_t bound = low;

  // least[p][i]: least sum of squares of cutting the first i items into p parts under the
  // bound; from[p][i]: where the last of these parts begins.
  constexpr double impossible = std::numeric_limits<double>::infinity();
  std::vector<std::vector<double>> least(num_parts + 1, std::vector<double>(n + 1, impossible));
  std::vector<std::vector<std::uint32_t>> from(num_parts + 1, std::vector<std::uint32_t>(n + 1, 0));
  least[0][0] = 0;
  for (std::uint32_t p = 1; p <= num_parts; ++p)
    for (std::size_t i = p; i + (num_parts - p) <= n; ++i)
      for (std::size_t j = i; j-- > p - 1;) {
        const std::uint64_t cost = before[i] - before[j];
        if (cost > bound)
          break;
        const double total =
          least[p - 1][j] + static_cast<double>(cost) * static_cast<double>(cost);
        if (total <= least[p][i] && total < impossible) {
          least[p][i] = total;
          from[p][i] = static_cast<std::uint32_t>(j);
        }
      }

  std::vector<std::uint32_t> bounds(num_parts + 1);
  bounds[num_parts] = static_cast<std::uint32_t>(n);
  for (std::uint32_t p = num_parts; p > 0; --p)
    bounds[p - 1] = from[p][bounds[p]];
  return bounds;
}

} // namespace troupe::placement
