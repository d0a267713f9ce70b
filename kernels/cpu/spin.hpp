#pragma once

#include <chrono>

namespace troupe::kernels::cpu {

/// Looks whether `done` holds, again and again, for about `time`; returns what it said last. For
/// waits that are mostly shorter than it takes to put a thread to sleep and wake it. The clock is
/// looked at only after a while: most waits are over by then.
template <class Condition>
bool spin(Condition&& done, std::chrono::nanoseconds time) {
  constexpr int kLooks = 64;
  std::chrono::steady_clock::time_point end{};
  do {
    for (int i = 0; i < kLooks; ++i) {
      if (done()) {
        return true;
      }
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    const auto now = std::chrono::steady_clock::now();
    if (end == std::chrono::steady_clock::time_point{}) {
      end = now + time;
    } else if (now >= end) {
      return false;
    }
  } while (true);
}

} // namespace troupe::kernels::cpu
