#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace troupe::kernels::cuda {

/// How far a rank's GPU has got: to how many sums it has come, and how many of them it has left.
/// Both begin again after the largest number.
struct rank_progress {
  std::uint32_t arrived = 0;
  std::uint32_t left = 0;

  friend bool operator==(const rank_progress&, const rank_progress&) = default;
};

/// A sum that does not end.
struct stuck_sum {
  std::int32_t waiting = -1; ///< rank that is in it
  std::int32_t awaited = -1; ///< rank that has not come; -1: all have
};

/// Decides from looks at the progress of all ranks whether one waits in vain: whether `deadline`
/// has passed since it came to a sum to which another has not come, or since the last one came
/// to a sum that does not end.
class sum_watch {
public:
  using time_point = std::chrono::steady_clock::time_point;

  explicit sum_watch(std::size_t num_ranks) : seen_(num_ranks) {}

  std::optional<stuck_sum> look(std::span<const rank_progress> ranks, time_point now,
                                std::chrono::nanoseconds deadline) {
    for (std::size_t i = 0; i < seen_.size(); ++i) {
      if (!seen_[i].is_known || seen_[i].progress != ranks[i]) {
        seen_[i] = {ranks[i], now, true};
      }
    }
    for (std::size_t i = 0; i < seen_.size(); ++i) {
      if (seen_[i].progress.arrived == seen_[i].progress.left) {
        continue;
      }
      const auto behind = [&](const known_rank& other) {
        return static_cast<std::int32_t>(seen_[i].progress.arrived - other.progress.arrived);
      };
      const auto by_distance = [&](const auto& a, const auto& b) { return behind(a) < behind(b); };
      const auto last = std::max_element(seen_.begin(), seen_.end(), by_distance);
      if (behind(*last) > 0) {
        if (now - seen_[i].changed >= deadline) {
          return stuck_sum{static_cast<std::int32_t>(i),
                           static_cast<std::int32_t>(last - seen_.begin())};
        }
        continue;
      }
      const auto by_time = [](const auto& a, const auto& b) { return a.changed < b.changed; };
      if (now - std::max_element(seen_.begin(), seen_.end(), by_time)->changed >= deadline) {
        return stuck_sum{static_cast<std::int32_t>(i), -1};
      }
    }
    return std::nullopt;
  }

private:
  struct known_rank {
    rank_progress progress;
    time_point changed;
    bool is_known = false;
  };

  std::vector<known_rank> seen_;
};

} // namespace troupe::kernels::cuda
