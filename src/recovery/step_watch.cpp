#include "troupe/recovery/step_watch.hpp"

#include <algorithm>
#include <bit>

namespace troupe::recovery {

std::size_t step_patience::place_of(const step_size& size) {
  auto rows = std::min<std::size_t>(std::bit_width(size.num_rows), row_digits - 1);
  auto positions = std::min<std::size_t>(std::bit_width(size.num_positions), position_digits - 1);
  return rows * position_digits + positions;
}

void step_patience::computed(const step_size& size, std::chrono::nanoseconds longest_wait) {
  auto& known = sizes_[place_of(size)];
  known.longest.add(longest_wait);
  known.num_seen = std::min(known.num_seen + 1, num_to_learn);
}

std::chrono::nanoseconds step_patience::limit(const step_size& size) const {
  const auto& known = sizes_[place_of(size)];
  if (known.num_seen < num_to_learn)
    return {};
  return std::max(least, known.longest.get() * factor);
}

bool wait_observer::look(std::uint64_t wait, std::chrono::nanoseconds limit, time_point now) {
  const auto passed = std::clamp<duration>(now - last_look_, {}, 2 * interval_);
  last_look_ = now;
  if (wait == 0 || wait != wait_) {
    wait_ = wait;
    lasted_ = {};
    return false;
  }
  lasted_ += passed;
  return limit.count() > 0 && lasted_ > limit;
}

} // namespace troupe::recovery
