#pragma once

#include "troupe/drill/scenario.hpp"

#include <cstdint>

namespace troupe::drill {

/// A stream of random numbers that is the same everywhere for a seed, unlike the distributions of
/// the standard library. SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number
/// Generators, OOPSLA 2014).
class seeded {
public:
  explicit seeded(std::uint64_t seed) : state_(seed) {}

  std::uint64_t next() {
    std::uint64_t z = (state_ += 0x9E3779B97F4A7C15ULL);
    z = (z ^ (z >> 30U)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27U)) * 0x94D049BB133111EBULL;
    return z ^ (z >> 31U);
  }

  /// 0 to n - 1; n must not be 0. The bias is below n / 2^64.
  std::uint64_t below(std::uint64_t n) { return next() % n; }

  /// [0, 1)
  double fraction() { return static_cast<double>(next() >> 11U) * 0x1p-53; }

  milliseconds in(const time_range& range) {
    auto span = static_cast<std::uint64_t>((range.high - range.low).count());
    return range.low + milliseconds(below(span + 1));
  }

private:
  std::uint64_t state_;
};

} // namespace troupe::drill
