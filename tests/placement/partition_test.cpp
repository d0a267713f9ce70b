#include <catch2/catch.hpp>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <random>
#include <tuple>
#include <vector>

#include "troupe/placement/partition.hpp"

using troupe::placement::partition;

namespace {

using bounds = std::vector<std::uint32_t>;

/// Costliest part and sum of squares.
std::tuple<std::uint64_t, std::uint64_t> quality(const std::vector<std::uint64_t>& costs,
                                                 std::uint64_t extra, const bounds& cut) {
  std::uint64_t most = 0;
  std::uint64_t squares = 0;
  for (std::size_t p = 0; p + 1 < cut.size(); ++p) {
    std::uint64_t sum = p + 2 == cut.size() ? extra : 0;
    sum = std::accumulate(costs.begin() + cut[p], costs.begin() + cut[p + 1], sum);
    most = std::max(most, sum);
    squares += sum * sum;
  }
  return {most, squares};
}

/// Tries every cut.
std::tuple<std::uint64_t, std::uint64_t> best_quality(const std::vector<std::uint64_t>& costs,
                                                      std::uint32_t parts, std::uint64_t extra) {
  const auto n = static_cast<std::uint32_t>(costs.size());
  std::tuple<std::uint64_t, std::uint64_t> best{UINT64_MAX, UINT64_MAX};
  bounds cut{0};
  const std::function<void()> extend = [&] {
    if (cut.size() == parts) {
      cut.push_back(n);
      best = std::min(best, quality(costs, extra, cut));
      cut.pop_back();
      return;
    }
    for (std::uint32_t next = cut.back() + 1; next < n; ++next) {
      cut.push_back(next);
      extend();
      cut.pop_back();
    }
  };
  extend();
  return best;
}

} // namespace

TEST_CASE("layers of one cost are cut evenly") {
  const std::vector<std::uint64_t> costs(10, 5);
  CHECK(partition(costs, 1, 0) == bounds{0, 10});
  CHECK(partition(costs, 2, 0) == bounds{0, 5, 10});
  CHECK(partition(costs, 5, 0) == bounds{0, 2, 4, 6, 8, 10});
  CHECK(partition(costs, 10, 0) == bounds{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10});
}

TEST_CASE("the head takes layers off the last stage") {
  const std::vector<std::uint64_t> costs(8, 10);
  CHECK(partition(costs, 2, 20) == bounds{0, 5, 8});
  CHECK(partition(costs, 4, 1000) == bounds{0, 2, 4, 7, 8});
}

TEST_CASE("dear layers make short stages") {
  CHECK(partition(std::vector<std::uint64_t>{1, 1, 1, 1, 20, 20}, 3, 0) == bounds{0, 4, 5, 6});
}

TEST_CASE("no cut is better than the one chosen") {
  std::mt19937 random(7);
  for (int round = 0; round < 600; ++round) {
    const std::size_t n = 1 + random() % 9;
    std::vector<std::uint64_t> costs(n);
    for (auto& cost : costs)
      cost = 1 + random() % 30;
    const auto parts = static_cast<std::uint32_t>(1 + random() % n);
    const std::uint64_t extra = random() % 40;
    const bounds cut = partition(costs, parts, extra);
    REQUIRE(cut.size() == parts + 1);
    REQUIRE(cut.front() == 0);
    REQUIRE(cut.back() == n);
    REQUIRE(std::adjacent_find(cut.begin(), cut.end(), std::greater_equal<>{}) == cut.end());
    REQUIRE(quality(costs, extra, cut) == best_quality(costs, parts, extra));
  }
}

TEST_CASE("thousands of layers are cut in time") {
  std::vector<std::uint64_t> costs(4096);
  std::mt19937 random(8);
  for (auto& cost : costs)
    cost = 1 + random() % 1000;
  const bounds cut = partition(costs, 256, 500);
  const std::uint64_t total = std::accumulate(costs.begin(), costs.end(), std::uint64_t{500});
  CHECK(std::get<0>(quality(costs, 500, cut)) <= total / 256 + 1000);
}
