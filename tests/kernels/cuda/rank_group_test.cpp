#include "ranks.hpp"

#include <barrier>
#include <functional>
#include <random>
#include <set>

#include "troupe/kernels/cuda/rank_group.hpp"

namespace kernel_tests {

using troupe::kernels::cuda::exchange_way;
using troupe::kernels::cuda::make_gpu_rank_group;
using troupe::kernels::cuda::rank_group;

namespace {

/// As many GPUs as there are, and one for all ranks.
std::vector<std::vector<std::int32_t>> all_groups() {
  std::vector<std::vector<std::int32_t>> result;
  for (const int size : {4, 2}) {
    if (num_devices() >= size) {
      result.emplace_back(size);
      std::iota(result.back().begin(), result.back().end(), 0);
    }
  }
  if (num_devices() > 1) {
    result.push_back({1, 0, 1});
  }
  for (const int size : {2, 3, 4, 8}) {
    result.emplace_back(size, 0);
  }
  return result;
}

bool share_gpus(const std::vector<std::int32_t>& devices) {
  return std::set(devices.begin(), devices.end()).size() < devices.size();
}

std::string name_of(const std::vector<std::int32_t>& devices) {
  std::string result = "GPUs";
  for (const auto device : devices) {
    result += " " + std::to_string(device);
  }
  return result;
}

} // namespace

TEST_CASE("ranks add up their rows in order of ranks", "[ranks]") {
  if (gpu() == nullptr) {
    return;
  }
  constexpr int kMostRows = 640;
  std::mt19937 random(51);
  for (const auto& devices : all_groups()) {
    INFO(name_of(devices));
    team ranks(devices, kMostRows, 7168);
    ranks.reserve(std::size_t{720} * 7168);
    const int num_ranks = ranks.size();
    for (const auto& at :
         {shape{1, 7168, 0}, shape{1, 1, 0}, shape{1, 7, 0, 3}, shape{2, 8, 0}, shape{3, 7168, 8},
          shape{17, 1001, 3}, shape{16, 1001, 0, 1}, shape{64, 7168, 0}, shape{90, 512, 0, 8},
          shape{127, 3000, 0}, shape{333, 1537, 5, 1}, shape{600, 1000, 16}, shape{700, 7168, 0},
          shape{5, 7168, 1}, shape{1, 7168, 0}}) {
      INFO(at.rows << " rows of " << at.cols << ", " << at.gap << " apart, from " << at.first);
      const auto parts = random_parts(num_ranks, std::size_t(at.rows) * at.cols, random);
      const auto expected = sum_in_order(parts);
      if (num_ranks > 2 && parts.front().size() > 100) {
        CHECK(num_different(sum_in_order(parts, true), expected) > 0);
      }
      std::vector<bits> got(num_ranks, bits(expected.size()));
      ranks.run([&](int rank) {
        const auto x = ranks.view(rank, at.rows, at.cols, at.cols + at.gap * rank, at.first);
        ranks.ops(rank).copy_from_host(parts[rank].data(), x);
        ranks.ops(rank).all_reduce(x);
        ranks.ops(rank).copy_to_host(x, got[rank].data());
      });
      for (int rank = 0; rank < num_ranks; ++rank) {
        INFO("rank " << rank);
        CHECK(num_different(got[rank], expected) == 0);
      }
      if (!ranks.works()) {
        return;
      }
    }
  }
}

TEST_CASE("ranks with exact numerics add up float32 rows", "[ranks][exact]") {
  if (gpu() == nullptr) {
    return;
  }
  std::mt19937 random(55);
  for (const auto& devices : all_groups()) {
    INFO(name_of(devices));
    std::string error;
    team ranks(devices,
               make_gpu_rank_group(devices, 400, 1600, error, milliseconds(5000),
                                   troupe::kernels::cuda::sum_transport::automatic,
                                   numerics::exact),
               numerics::exact);
    check_exact_sums(ranks, random);
  }
  // A group for a single row has room for it in float32.
  std::string error;
  const std::vector<std::int32_t> devices{0, 0};
  team narrow(devices,
              make_gpu_rank_group(devices, 1, 8, error, milliseconds(5000),
                                  troupe::kernels::cuda::sum_transport::automatic, numerics::exact),
              numerics::exact);
  narrow.reserve(8);
  narrow.run([&](int rank) { narrow.ops(rank).all_reduce(narrow.view(rank, 1, 8, 8)); });
  CHECK(narrow.works());
}

TEST_CASE("every way to add up gives the same bits, in any sequence", "[ranks]") {
  if (gpu() == nullptr) {
    return;
  }
  std::mt19937 random(52);
  for (const auto& devices : all_groups()) {
    INFO(name_of(devices));
    constexpr int kCols = 512, kRows = 300, kRounds = 40;
    team ranks(devices, kRows, kCols);
    const int num_ranks = ranks.size();
    ranks.reserve(std::size_t(kRows) * kCols * kRounds);
    const auto parts = random_parts(num_ranks, std::size_t(kRows) * kCols, random);
    const auto expected = sum_in_order(parts);
    std::vector<int> num_rows;
    std::vector<exchange_way> ways;
    for (int round = 0; round < kRounds; ++round) {
      num_rows.push_back(1 + static_cast<int>(random() % (round % 3 == 0 ? kRows : 8)));
      ways.push_back(random() % 2 == 0 ? exchange_way::few : exchange_way::many);
    }
    std::vector<std::vector<bits>> got(num_ranks);
    ranks.run([&](int rank) {
      auto& ops = ranks.ops(rank);
      const auto view = [&](int round) {
        return ranks.view(rank, num_rows[round], kCols, kCols, std::size_t(round) * kRows * kCols);
      };
      for (int round = 0; round < kRounds; ++round) {
        // The last rows of the parts: what is computed of a row is not a matter of its place.
        ops.copy_from_host(&parts[rank][std::size_t(kRows - num_rows[round]) * kCols], view(round));
      }
      const auto stream = static_cast<cudaStream_t>(ops.stream());
      for (int round = 0; round < kRounds; ++round) {
        static_cast<const rank_group&>(ranks.group())
          .add_up(stream, rank, troupe::kernels::cuda::as_bf16(view(round)), ways[round]);
      }
      for (int round = 0; round < kRounds; ++round) {
        got[rank].emplace_back(std::size_t(num_rows[round]) * kCols);
        ops.copy_to_host(view(round), got[rank].back().data());
      }
    });
    for (int rank = 0; rank < num_ranks; ++rank) {
      for (int round = 0; round < kRounds; ++round) {
        INFO("rank " << rank << ", round " << round << ", " << num_rows[round] << " rows");
        const bits wanted(expected.end() - std::ptrdiff_t(num_rows[round]) * kCols, expected.end());
        CHECK(num_different(got[rank][round], wanted) == 0);
      }
    }
    if (!ranks.works()) {
      return;
    }
  }
}

TEST_CASE("recorded steps add up as often as they are repeated", "[ranks]") {
  if (gpu() == nullptr) {
    return;
  }
  std::mt19937 random(53);
  for (const auto& devices : all_groups()) {
    INFO(name_of(devices));
    // Where ranks share a GPU, making a graph can wait for the kernels of another rank, and graphs
    // of more than two of them do not always run at the same time.
    const bool shared = share_gpus(devices);
    if (shared && devices.size() > 2) {
      continue;
    }
    constexpr int kCols = 1536, kCalls = 50, kSteps = 20, kMostRows = 64;
    team ranks(devices, kMostRows, kCols);
    const int num_ranks = ranks.size();
    ranks.reserve(std::size_t(kMostRows) * kCols * kCalls);
    const auto rows_of = [](int call) { return call % 10 == 9 ? kMostRows : 1 + call % 4; };
    const auto parts = random_parts(num_ranks, std::size_t(kMostRows) * kCols * kCalls, random);
    const auto expected = sum_in_order(parts);
    std::vector<std::size_t> different(num_ranks, 0);
    std::vector<cudaGraphExec_t> graphs(num_ranks, nullptr);
    std::barrier all_recorded(num_ranks);
    ranks.run([&](int rank) {
      auto& ops = ranks.ops(rank);
      bits got(std::size_t(kMostRows) * kCols);
      for (int step = 0; step < kSteps; ++step) {
        const auto view = [&](int call) {
          return ranks.view(rank, rows_of(call), kCols, kCols,
                            std::size_t(call) * kMostRows * kCols);
        };
        const auto part_of = [&](int call) {
          return std::size_t((call + step) % kCalls) * kMostRows * kCols;
        };
        for (int call = 0; call < kCalls; ++call) {
          ops.copy_from_host(&parts[rank][part_of(call)], view(call));
        }
        const auto add_up = [&] {
          for (int call = 0; call < kCalls; ++call) {
            ops.all_reduce(view(call));
          }
        };
        if (!shared) {
          ops.step({7, 1}, {}, {}, add_up);
        } else {
          if (step == 0) {
            graphs[rank] = record(ops, add_up);
            all_recorded.arrive_and_wait();
          }
          cudaGraphLaunch(graphs[rank], static_cast<cudaStream_t>(ops.stream()));
        }
        for (int call = 0; call < kCalls; ++call) {
          got.resize(std::size_t(rows_of(call)) * kCols);
          ops.copy_to_host(view(call), got.data());
          const auto from = expected.begin() + static_cast<std::ptrdiff_t>(part_of(call));
          different[rank] +=
            num_different(got, {from, from + static_cast<std::ptrdiff_t>(got.size())});
        }
      }
    });
    for (int rank = 0; rank < num_ranks; ++rank) {
      INFO("rank " << rank);
      CHECK(different[rank] == 0);
      CHECK(ranks.ops(rank).num_repeated_steps() == (shared ? 0 : kSteps - 1));
      if (shared) {
        CHECK(cudaGraphExecDestroy(graphs[rank]) == cudaSuccess);
      }
    }
    if (!ranks.works()) {
      return;
    }
  }
}

TEST_CASE("a rank that does not come is a failure of all, in time", "[ranks]") {
  if (gpu() == nullptr) {
    return;
  }
  for (const auto& devices : all_groups()) {
    for (const int rows : {1, 2000}) {
      INFO(name_of(devices) << ", " << rows << " rows");
      constexpr int kCols = 512;
      const auto begin = steady_clock::now();
      {
        team ranks(devices, rows, kCols, milliseconds(200));
        const int missing = ranks.size() - 1;
        ranks.reserve(std::size_t(rows) * kCols);
        ranks.run([&](int rank) {
          auto& ops = ranks.ops(rank);
          const auto x = ranks.view(rank, rows, kCols, kCols);
          ops.all_reduce(x); // all of them are there
          ops.synchronise();
        });
        CHECK(ranks.works());
        ranks.run([&](int rank) {
          if (rank == missing) {
            return;
          }
          auto& ops = ranks.ops(rank);
          const auto x = ranks.view(rank, rows, kCols, kCols);
          for (int call = 0; call < 100; ++call) { // only the first waits
            ops.all_reduce(x);
          }
          ops.synchronise();
        });
        const auto awaited = "for rank " + std::to_string(missing);
        for (int rank = 0; rank < missing; ++rank) {
          INFO(ranks.ops(rank).failure());
          CHECK(ranks.ops(rank).failure().find(awaited) != std::string::npos);
          CHECK(!ranks.ops(rank).all_finite(ranks.view(rank, 1, kCols, kCols)));
        }
        // Who comes too late hears of it.
        auto& late = ranks.ops(missing);
        late.all_reduce(ranks.view(missing, rows, kCols, kCols));
        late.synchronise();
        INFO(late.failure());
        CHECK(late.failure().find(awaited + " (this one)") != std::string::npos);
      }
      CHECK(steady_clock::now() - begin < std::chrono::seconds(4));
    }
  }
}

/// Not among the others, since a process that it has run in cannot use the GPU any more.
TEST_CASE("a GPU that breaks down is a failure of all, in time", "[.][breaking]") {
  if (gpu() == nullptr) {
    return;
  }
  if (num_devices() < 2) {
    return;
  }
  constexpr int kCols = 7168;
  const auto begin = steady_clock::now();
  {
    team ranks({0, 1}, 1, kCols, milliseconds(500));
    ranks.reserve(kCols);
    ranks.run([&](int rank) {
      auto& ops = ranks.ops(rank);
      const auto x = ranks.view(rank, 1, kCols, kCols);
      for (int call = 0; call < 100; ++call) {
        if (rank == 1 && call == 50) {
          ops.break_down(troupe::kernels::breakdown::illegal_access);
        }
        ops.all_reduce(x);
      }
      ops.synchronise();
    });
    for (int rank = 0; rank < 2; ++rank) {
      WARN(ranks.ops(rank).failure());
      CHECK(!ranks.ops(rank).failure().empty());
    }
  }
  CHECK(steady_clock::now() - begin < std::chrono::seconds(3));
}

TEST_CASE("memory comes and goes while a rank waits for another GPU", "[ranks]") {
  if (gpu() == nullptr) {
    return;
  }
  if (num_devices() < 2) {
    return;
  }
  constexpr int kCols = 7168;
  team ranks({0, 1}, 1, kCols, milliseconds(1500));
  ranks.reserve(kCols);
  use_memory_while_a_rank_waits(ranks, kCols);
}

TEST_CASE("groups that cannot be are refused", "[ranks]") {
  if (gpu() == nullptr) {
    return;
  }
  const auto refusal = [](const std::vector<std::int32_t>& devices, int rows, int cols) {
    std::string error;
    CHECK(make_gpu_rank_group(devices, rows, cols, error) == nullptr);
    return error;
  };
  CHECK(!refusal({}, 1, 8).empty());
  CHECK(!refusal(std::vector<std::int32_t>(9, 0), 1, 8).empty());
  CHECK(!refusal({0, 0}, 0, 8).empty());
  CHECK(!refusal({0, 99}, 1, 8).empty());

  std::string error;
  const std::vector<std::int32_t> devices{0, 0};
  const auto group = make_gpu_rank_group(devices, 1, 8, error);
  REQUIRE(group != nullptr);
  for (const int rank : {-1, 2}) {
    error.clear();
    CHECK(make_cuda_ops(0, error, nullptr, nullptr, group, rank) == nullptr);
    CHECK(!error.empty());
  }
  // Rows that no part of the memory holds.
  const auto ops = make_cuda_ops(0, error, nullptr, nullptr, group, 0);
  REQUIRE(ops != nullptr);
  const auto memory = ops->allocate(std::size_t{1000} * 2);
  ops->all_reduce({memory.get(), 1, 1000, 1000});
  CHECK(ops->failure().find("too wide") != std::string::npos);
}

TEST_CASE("a group of one adds nothing", "[ranks]") {
  if (gpu() == nullptr) {
    return;
  }
  std::mt19937 random(54);
  team ranks({0}, 4, 100);
  ranks.reserve(400);
  const auto parts = random_parts(1, 400, random);
  const auto x = ranks.view(0, 4, 100, 100);
  ranks.ops(0).copy_from_host(parts[0].data(), x);
  ranks.ops(0).all_reduce(x);
  bits got(400);
  ranks.ops(0).copy_to_host(x, got.data());
  CHECK(got == parts[0]);
  CHECK(ranks.works());
}

} // namespace kernel_tests
