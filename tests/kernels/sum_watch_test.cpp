#include "troupe/kernels/cuda/sum_watch.hpp"

#include "troupe/kernels/cuda/sum_transport.hpp"

#include <algorithm>
#include <random>
#include <utility>
#include <vector>

#include <catch2/catch.hpp>

using namespace troupe::kernels::cuda;
using std::chrono::milliseconds;

namespace {

using time_point = sum_watch::time_point;

constexpr milliseconds deadline{100};

time_point at(int ms) {
  return time_point(milliseconds(ms));
}

using progress = std::vector<rank_progress>;

} // namespace

TEST_CASE("peer memory is used where all GPUs reach it, unless NCCL is asked for") {
  for (const bool reach : {false, true}) {
    CHECK(choose_transport(sum_transport::peer, reach) == sum_transport::peer);
    CHECK(choose_transport(sum_transport::nccl, reach) == sum_transport::nccl);
  }
  CHECK(choose_transport(sum_transport::automatic, true) == sum_transport::peer);
  CHECK(choose_transport(sum_transport::automatic, false) == sum_transport::nccl);
}

TEST_CASE("ranks that are in no sum wait for nobody, however long") {
  sum_watch watch(3);
  CHECK_FALSE(watch.look(progress{{0, 0}, {0, 0}, {0, 0}}, at(0), deadline));
  CHECK_FALSE(watch.look(progress{{4, 4}, {5, 5}, {4, 4}}, at(10), deadline));
  CHECK_FALSE(watch.look(progress{{4, 4}, {5, 5}, {4, 4}}, at(100'000), deadline));
}

TEST_CASE("a rank that does not come is missed when the deadline has passed since another came") {
  for (int waiting = 0; waiting < 3; ++waiting)
    for (int missing = 0; missing < 3; ++missing) {
      if (waiting == missing)
        continue;
      sum_watch watch(3);
      progress ranks{{7, 7}, {7, 7}, {7, 7}};
      CHECK_FALSE(watch.look(ranks, at(0), deadline));
      ranks[waiting].arrived = 8;
      CHECK_FALSE(watch.look(ranks, at(50), deadline));
      // Another one that comes later does not buy it time.
      const int other = 3 - waiting - missing;
      ranks[other].arrived = 8;
      CHECK_FALSE(watch.look(ranks, at(120), deadline));
      CHECK_FALSE(watch.look(ranks, at(149), deadline));
      const auto found = watch.look(ranks, at(150), deadline);
      REQUIRE(found);
      CHECK(found->waiting == waiting);
      CHECK(found->awaited == missing);
    }
}

TEST_CASE("who is furthest behind is the one that is missed") {
  sum_watch watch(3);
  const progress ranks{{9, 8}, {7, 7}, {8, 7}};
  CHECK_FALSE(watch.look(ranks, at(0), deadline));
  const auto found = watch.look(ranks, at(100), deadline);
  REQUIRE(found);
  CHECK(found->awaited == 1);
}

TEST_CASE("a sum to which all came has the deadline from when the last one did") {
  sum_watch watch(2);
  CHECK_FALSE(watch.look(progress{{1, 0}, {0, 0}}, at(0), deadline));
  CHECK_FALSE(watch.look(progress{{1, 0}, {1, 0}}, at(90), deadline));
  CHECK_FALSE(watch.look(progress{{1, 0}, {1, 0}}, at(189), deadline));
  const auto found = watch.look(progress{{1, 0}, {1, 0}}, at(190), deadline);
  REQUIRE(found);
  CHECK(found->awaited == -1);
}

TEST_CASE("a sum that one rank has left and another has not does not end either") {
  sum_watch watch(2);
  CHECK_FALSE(watch.look(progress{{3, 3}, {3, 2}}, at(0), deadline));
  const auto found = watch.look(progress{{3, 3}, {3, 2}}, at(100), deadline);
  REQUIRE(found);
  CHECK(found->waiting == 1);
  CHECK(found->awaited == -1);
}

TEST_CASE("numbers of sums that begin again are no matter") {
  sum_watch watch(2);
  const std::uint32_t last = 0xFFFFFFFFU;
  CHECK_FALSE(watch.look(progress{{last, last}, {last, last}}, at(0), deadline));
  const progress ranks{{last, last}, {0, last}};
  CHECK_FALSE(watch.look(ranks, at(10), deadline));
  const auto found = watch.look(ranks, at(110), deadline);
  REQUIRE(found);
  CHECK(found->waiting == 1);
  CHECK(found->awaited == 0);
}

TEST_CASE("ranks that get on are never missed, in whatever steps they do") {
  std::mt19937 random(5);
  for (int round = 0; round < 200; ++round) {
    const int size = 2 + round % 7;
    sum_watch watch(size);
    progress ranks(size);
    int now = 0;
    for (std::uint32_t sum = 1; sum < 20; ++sum) {
      // All come within the deadline of the first, leave within that of the last.
      std::vector<std::pair<int, int>> steps;
      const int first = now + static_cast<int>(random() % 1000);
      for (int rank = 0; rank < size; ++rank)
        steps.emplace_back(first + static_cast<int>(random() % 99), rank);
      std::sort(steps.begin(), steps.end());
      for (const auto& [when, rank] : steps) {
        ranks[rank].arrived = sum;
        REQUIRE_FALSE(watch.look(ranks, at(when), deadline));
      }
      now = steps.back().first + static_cast<int>(random() % 99);
      REQUIRE_FALSE(watch.look(ranks, at(now), deadline));
      for (auto& rank : ranks)
        rank.left = sum;
      REQUIRE_FALSE(watch.look(ranks, at(now), deadline));
    }
  }
}
