#include "ranks.hpp"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "nccl.hpp"
#include "timing.hpp"
#include "troupe/kernels/cuda/peer_memory.hpp"
#include "troupe/kernels/cuda/rank_group.hpp"

namespace gpu_bench {

namespace {

using namespace troupe::kernels::cuda;

constexpr int kHidden = 7168;

/// Microseconds between two events with one call of `work` between them: the median.
double time_alone(gpu_ops& ops, const std::function<void()>& work) {
  const auto stream = static_cast<cudaStream_t>(ops.stream());
  cudaEvent_t begin;
  cudaEvent_t end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  std::vector<float> times;
  for (int round = 0; round < 40; ++round) {
    cudaEventRecord(begin, stream);
    work();
    cudaEventRecord(end, stream);
    ops.synchronise();
    float milliseconds = 0.0F;
    cudaEventElapsedTime(&milliseconds, begin, end);
    times.push_back(milliseconds * 1e3F);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::nth_element(times.begin(), times.begin() + 20, times.end());
  return times[20];
}

void bench_copies() {
  std::string error;
  const auto ops = make_cuda_ops(0, error);
  const std::int32_t devices[] = {0, 1};
  constexpr std::size_t kMost = std::size_t{256} << 20;
  const auto there = make_peer_memory(1, devices, kMost, error);
  if (ops == nullptr || there == nullptr) {
    std::printf("copies to another GPU: %s\n", error.c_str());
    return;
  }
  const auto here = random_rows(*ops, kMost / 2);
  const auto stream = static_cast<cudaStream_t>(ops->stream());
  ops->synchronise();
  const double by_peer =
    time_alone(*ops, [&] { cudaMemcpyPeerAsync(there.get(), 1, here.get(), 0, 32 << 10, stream); });
  std::printf("to another GPU by cudaMemcpyPeerAsync: 32 KiB %5.1f us alone\n", by_peer);
  const std::function<void(std::size_t)> ways[] = {
    [&](std::size_t bytes) {
      cudaMemcpyAsync(there.get(), here.get(), bytes, cudaMemcpyDefault, stream);
    },
    [&](std::size_t bytes) { launch_copy(stream, here.get(), there.get(), bytes); },
  };
  const char* const names[] = {"cudaMemcpyAsync", "a kernel"};
  for (int way = 0; way < 2; ++way) {
    const auto& copy = ways[way];
    const double alone = time_alone(*ops, [&] { copy(32 << 10); });
    const double chained = time_graph(*ops, 100, [&](int) { copy(32 << 10); });
    const double large = time_graph(*ops, 4, [&](int) { copy(kMost); });
    std::printf("to another GPU by %-19s 32 KiB %5.1f us alone, %5.1f us in a graph; "
                "256 MiB %4.0f GB/s\n",
                names[way], alone, chained, kMost / large * 1e-3);
  }
  std::fflush(stdout);
}

/// One call of each rank, by a thread each: microseconds of the slowest.
double time_ranks(const std::vector<std::unique_ptr<gpu_ops>>& ops, int repeats,
                  const std::function<void(int rank)>& work) {
  std::vector<double> times(ops.size());
  std::vector<std::thread> threads;
  for (std::size_t rank = 0; rank < ops.size(); ++rank) {
    threads.emplace_back([&, rank] {
      cudaSetDevice(static_cast<int>(rank));
      times[rank] = time_graph(*ops[rank], repeats, [&](int) { work(static_cast<int>(rank)); });
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  const bool failed = *std::min_element(times.begin(), times.end()) < 0.0;
  return failed ? -1.0 : *std::max_element(times.begin(), times.end());
}

/// The same without a graph, by the host's clock.
double time_one_by_one(const std::vector<std::unique_ptr<gpu_ops>>& ops,
                       const std::function<void(int rank)>& work) {
  constexpr int kCalls = 200;
  const auto begin = std::chrono::steady_clock::now();
  std::vector<std::thread> threads;
  for (std::size_t rank = 0; rank < ops.size(); ++rank) {
    threads.emplace_back([&, rank] {
      cudaSetDevice(static_cast<int>(rank));
      for (int call = 0; call < kCalls; ++call) {
        work(static_cast<int>(rank));
      }
      ops[rank]->synchronise();
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - begin;
  return took.count() / kCalls;
}

/// Says what it takes.
std::shared_ptr<summing_group> open_group_over_nccl(std::span<const std::int32_t> devices,
                                                    std::int32_t max_rows) {
  std::string error;
  const auto before = memory_of(devices.front()).free_bytes;
  const auto begin = std::chrono::steady_clock::now();
  auto group = make_gpu_rank_group(devices, max_rows, kHidden, error, std::chrono::seconds(2),
                                   sum_transport::nccl);
  const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - begin;
  if (group == nullptr) {
    std::printf("a group over NCCL: %s\n", error.c_str());
    return nullptr;
  }
  std::printf("a group over NCCL: ready after %.0f ms, %.0f MB a GPU\n", took.count(),
              static_cast<double>(before - memory_of(devices.front()).free_bytes) * 1e-6);
  return std::static_pointer_cast<summing_group>(std::move(group));
}

void bench_sums(int num_ranks) {
  std::vector<std::int32_t> devices(num_ranks);
  for (int rank = 0; rank < num_ranks; ++rank) {
    devices[rank] = rank;
  }
  constexpr std::int32_t kMostRows = (1 << 30) / (2 * kHidden);
  std::string error;
  constexpr auto kPatience = std::chrono::seconds(2);
  const auto shared =
    make_gpu_rank_group(devices, kMostRows, kHidden, error, kPatience, sum_transport::peer);
  std::vector<std::unique_ptr<gpu_ops>> ops;
  std::vector<std::shared_ptr<void>> memory;
  for (int rank = 0; rank < num_ranks && shared != nullptr; ++rank) {
    ops.push_back(make_cuda_ops(rank, error, nullptr, nullptr, shared, rank));
    if (ops.back() == nullptr) {
      break;
    }
    memory.push_back(random_rows(*ops.back(), std::size_t{kMostRows} * kHidden));
  }
  if (shared == nullptr || ops.back() == nullptr) {
    std::printf("sums over %d GPUs: %s\n", num_ranks, error.c_str());
    return;
  }
  auto& peers = static_cast<rank_group&>(*shared);
  const auto library = open_nccl(devices);
  const auto over_nccl = library == nullptr ? nullptr : open_group_over_nccl(devices, kMostRows);
  std::printf(
    "%d GPUs, us a call in a graph (bus GB/s): few, many, the best, NCCL%s, ours over it\n",
    num_ranks, library == nullptr ? " (not there)" : "");
  for (const int rows : {1, 2, 4, 8, 18, 36, 73, 146, 292, 585, 2340, 4096, kMostRows}) {
    const std::size_t bytes = std::size_t(rows) * kHidden * 2;
    const int repeats = bytes > (std::size_t{64} << 20) ? 4 : bytes > (4 << 20) ? 20 : 200;
    std::printf("%11zu B", bytes);
    const auto print = [&](double time) {
      const double moved = 2.0 * (num_ranks - 1) / num_ranks * static_cast<double>(bytes);
      std::printf("  %9.1f (%5.1f)", time, moved / time * 1e-3);
    };
    const auto stream = [&](int rank) { return static_cast<cudaStream_t>(ops[rank]->stream()); };
    for (const auto way : {exchange_way::few, exchange_way::many, exchange_way::best}) {
      if (way == exchange_way::few && bytes * (num_ranks - 1) > (1 << 20)) {
        std::printf("  %17s", "");
        continue;
      }
      print(time_ranks(ops, repeats, [&](int rank) {
        peers.add_up(stream(rank), rank,
                     rows_of_bf16{static_cast<bf16*>(memory[rank].get()), rows, kHidden, kHidden},
                     way);
      }));
    }
    if (library != nullptr) {
      print(time_ranks(ops, repeats, [&](int rank) {
        library->all_reduce(rank, memory[rank].get(), bytes / 2, stream(rank));
      }));
    }
    if (over_nccl != nullptr) {
      print(time_ranks(ops, repeats, [&](int rank) {
        over_nccl->add_up(
          stream(rank), rank,
          rows_of_bf16{static_cast<bf16*>(memory[rank].get()), rows, kHidden, kHidden});
      }));
    }
    std::printf("\n");
    std::fflush(stdout);
  }
  for (auto* const group : {static_cast<summing_group*>(&peers), over_nccl.get()}) {
    if (group != nullptr) {
      const double time = time_one_by_one(ops, [&](int rank) {
        group->add_up(static_cast<cudaStream_t>(ops[rank]->stream()), rank,
                      rows_of_bf16{static_cast<bf16*>(memory[rank].get()), 1, kHidden, kHidden});
      });
      std::printf("one row, not recorded, %s: %.1f us a call\n",
                  group == over_nccl.get() ? "over NCCL" : "by peer memory", time);
      if (group->has_failed(0)) {
        std::printf("%s\n", group->failure(0).c_str());
      }
    }
  }
  for (const auto& one : ops) {
    if (!one->failure().empty()) {
      std::printf("%s\n", one->failure().c_str());
    }
  }
}

} // namespace

void bench_ranks() {
  if (num_devices() < 2) {
    std::printf("ranks: one GPU alone\n");
    return;
  }
  bench_copies();
  for (const int num_ranks : {2, 4, 8}) {
    if (num_ranks <= num_devices()) {
      bench_sums(num_ranks);
    }
  }
}

} // namespace gpu_bench
