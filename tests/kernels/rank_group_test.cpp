#include "troupe/kernels/cpu/rank_group.hpp"

#include <chrono>
#include <random>
#include <thread>
#include <vector>

#include <catch2/catch.hpp>

using namespace troupe::kernels;

namespace {

/// Calls work(rank) on a thread of each rank.
template <class Work>
void on_ranks(std::int32_t size, const Work& work) {
  std::vector<std::thread> threads;
  for (std::int32_t rank = 0; rank < size; ++rank)
    threads.emplace_back([&work, rank] { work(rank); });
  for (auto& thread : threads)
    thread.join();
}

} // namespace

TEST_CASE("ranks add up their rows in order of ranks, as often as they like") {
  for (const std::int32_t size : {1, 2, 3, 5}) {
    const auto group = make_cpu_rank_group(size);
    std::vector<std::vector<float>> rows(size);
    std::mt19937 random(7);
    for (const std::int32_t count : {1, 2, 7, 64, 3}) {
      const std::int32_t cols = 33;
      std::vector<float> wanted(count * cols, 0.0F);
      for (auto& mine : rows) {
        mine.resize(count * (cols + 5));
        for (auto& value : mine)
          value = std::normal_distribution<float>(0, 1)(random);
        for (std::int32_t r = 0; r < count; ++r)
          for (std::int32_t c = 0; c < cols; ++c)
            wanted[r * cols + c] += mine[r * (cols + 5) + c];
      }
      auto before = rows;
      std::vector<std::string> said(size);
      on_ranks(size, [&](std::int32_t rank) {
        said[rank] = group->add_up(rank, {rows[rank].data(), count, cols, cols + 5});
      });
      for (std::int32_t rank = 0; rank < size; ++rank) {
        CHECK(said[rank].empty());
        for (std::int32_t r = 0; r < count; ++r)
          for (std::int32_t c = 0; c < cols + 5; ++c)
            REQUIRE(rows[rank][r * (cols + 5) + c]
                    == (c < cols ? wanted[r * cols + c] : before[rank][r * (cols + 5) + c]));
      }
    }
  }
}

TEST_CASE("a rank that waits in vain says so, and so does everybody after it") {
  cpu_rank_group group(2, std::chrono::milliseconds(20));
  std::vector<float> row(8, 1.0F);
  const rows_view x{row.data(), 1, 8, 8};
  CHECK(group.add_up(0, x).find("rank 0 of 2 waited in vain") != std::string::npos);
  CHECK(group.add_up(1, x).find("rank 1 of 2 waited in vain") != std::string::npos);
}

TEST_CASE("operations of ranks: sums, and a failure of the device where one is missing") {
  const auto group = make_cpu_rank_group(2);
  std::vector<float> first(6, 1.5F), second(6, 2.25F);
  on_ranks(2, [&](std::int32_t rank) {
    const auto ops = make_cpu_ops(1, nullptr, numerics::exact, group, rank);
    auto& mine = rank == 0 ? first : second;
    ops->all_reduce({mine.data(), 2, 3, 3});
    ops->clear({mine.data(), 1, 2, 3});
  });
  CHECK(first == std::vector<float>{0, 0, 3.75F, 3.75F, 3.75F, 3.75F});
  CHECK(second == first);
  const auto alone = make_cpu_ops(1);
  alone->all_reduce({first.data(), 2, 3, 3});
  CHECK(second == first);
}
