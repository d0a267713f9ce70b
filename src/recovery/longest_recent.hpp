#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>

namespace troupe::recovery {

/// The longest of the last `window` to twice as many durations, in constant memory.
class longest_recent {
public:
  explicit longest_recent(std::uint32_t window = 64) : window_(window) {}

  void add(std::chrono::nanoseconds took) {
    if (num_ == window_) {
      before_ = now_;
      now_ = {};
      num_ = 0;
    }
    now_ = std::max(now_, took);
    ++num_;
  }

  std::chrono::nanoseconds get() const { return std::max(now_, before_); }

private:
  std::uint32_t window_;
  std::uint32_t num_ = 0;
  std::chrono::nanoseconds now_{};
  std::chrono::nanoseconds before_{};
};

} // namespace troupe::recovery
