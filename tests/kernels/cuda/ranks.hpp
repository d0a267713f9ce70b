#pragma once

#include "gpu.hpp"

#include <chrono>
#include <cstdlib>
#include <functional>
#include <random>
#include <thread>

#include <cuda_runtime_api.h>

/// What tests of groups of ranks share.
namespace kernel_tests {

using std::chrono::milliseconds;
using std::chrono::steady_clock;
using troupe::kernels::cuda::gpu_rank_group;
using troupe::kernels::cuda::make_cuda_ops;
using troupe::kernels::cuda::make_gpu_rank_group;
using troupe::kernels::cuda::num_devices;

/// Ranks that share a GPU wait for each other's kernels: each stream needs a queue of its own, and
/// kernels have to be there before any waits. Read when the driver starts.
const bool has_environment = [] {
  ::setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
  ::setenv("CUDA_MODULE_LOADING", "EAGER", 0);
  troupe::kernels::cuda::prepare_environment();
  return true;
}();

using bits = std::vector<std::uint16_t>;

/// Values of very different sizes, a fourth of which cancel what the rank before has, so that the
/// order of additions shows.
inline std::vector<bits> random_parts(int num_ranks, std::size_t count, std::mt19937& random) {
  std::vector<bits> parts(num_ranks, bits(count));
  for (std::size_t i = 0; i < count; ++i) {
    for (int rank = 0; rank < num_ranks; ++rank) {
      const auto draw = static_cast<std::uint32_t>(random());
      parts[rank][i] =
        static_cast<std::uint16_t>((draw & 0x807FU) | (112 + (draw >> 20) % 32) << 7);
      if (rank > 0 && draw >> 30 == 0) {
        parts[rank][i] = parts[rank - 1][i] ^ 0x8000U;
      }
    }
  }
  return parts;
}

inline bits sum_in_order(const std::vector<bits>& parts, bool backwards = false) {
  bits result(parts.front().size());
  const auto last = static_cast<int>(parts.size()) - 1;
  for (std::size_t i = 0; i < result.size(); ++i) {
    float sum = bf16_value(parts[backwards ? last : 0][i]);
    for (int rank = 1; rank <= last; ++rank) {
      sum += bf16_value(parts[backwards ? last - rank : rank][i]);
    }
    result[i] = to_bf16(sum);
  }
  return result;
}

/// Which elements differ, so that a failure does not print them all.
inline std::size_t num_different(const bits& a, const bits& b) {
  std::size_t result = a.size() == b.size() ? 0 : std::max(a.size(), b.size());
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    result += a[i] != b[i] ? 1 : 0;
  }
  return result;
}

/// A group with an object of operations and some memory a rank.
class team {
public:
  team(const std::vector<std::int32_t>& devices, int max_rows, int num_cols,
       milliseconds deadline = milliseconds(5000))
    : devices_(devices) {
    std::string error;
    group_ = make_gpu_rank_group(devices, max_rows, num_cols, error, deadline);
    INFO(error);
    REQUIRE(group_ != nullptr);
    open_ranks();
  }

  team(const std::vector<std::int32_t>& devices, std::shared_ptr<gpu_rank_group> group,
       numerics mode = numerics::fast)
    : devices_(devices), group_(std::move(group)), mode_(mode) {
    REQUIRE(group_ != nullptr);
    open_ranks();
  }

  int size() const { return static_cast<int>(devices_.size()); }
  gpu_ops& ops(int rank) { return *ops_[rank]; }
  gpu_rank_group& group() { return *group_; }

  void reserve(std::size_t num_elements) {
    for (int rank = 0; rank < size(); ++rank) {
      memory_[rank] = ops(rank).allocate(num_elements * element_bytes());
      REQUIRE(memory_[rank] != nullptr);
    }
  }

  rows_view view(int rank, int rows, int cols, int stride, std::size_t first = 0) const {
    return {static_cast<std::byte*>(memory_[rank].get()) + first * element_bytes(), rows, cols,
            stride};
  }

  void run(const std::function<void(int)>& work) {
    std::vector<std::thread> threads;
    for (int rank = 0; rank < size(); ++rank) {
      threads.emplace_back([&, rank] { work(rank); });
    }
    for (auto& thread : threads) {
      thread.join();
    }
  }

  bool works() const {
    for (const auto& one : ops_) {
      INFO(one->failure());
      CHECK(one->failure().empty());
      if (!one->failure().empty()) {
        return false;
      }
    }
    return true;
  }

private:
  std::size_t element_bytes() const { return mode_ == numerics::exact ? 4 : 2; }

  void open_ranks() {
    std::string error;
    CHECK(group_->size() == size());
    for (int rank = 0; rank < size(); ++rank) {
      ops_.push_back(make_cuda_ops(devices_[rank], error, nullptr, nullptr, group_, rank, mode_));
      INFO(error);
      REQUIRE(ops_.back() != nullptr);
      memory_.push_back(nullptr);
    }
  }

  std::vector<std::int32_t> devices_;
  std::shared_ptr<gpu_rank_group> group_;
  numerics mode_ = numerics::fast;
  std::vector<std::unique_ptr<gpu_ops>> ops_;
  std::vector<std::shared_ptr<void>> memory_;
};

/// A graph on the device.
inline cudaGraphExec_t record(gpu_ops& ops, const std::function<void()>& work) {
  const auto stream = static_cast<cudaStream_t>(ops.stream());
  ops.synchronise(); // makes its GPU current
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t result = nullptr;
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
  work();
  cudaStreamEndCapture(stream, &graph);
  cudaGraphInstantiate(&result, graph, 0);
  cudaGraphDestroy(graph);
  cudaGraphUpload(result, stream);
  ops.synchronise();
  return result;
}

/// Rank 0 waits for the others while memory of the GPU of rank 1 is taken and given back, which
/// must not wait for it. Then all come. Room for a row is reserved.
inline void use_memory_while_a_rank_waits(team& ranks, int num_cols) {
  ranks.ops(0).all_reduce(ranks.view(0, 1, num_cols, num_cols));
  const auto begin = std::chrono::steady_clock::now();
  const auto lap = [&](const char* what, const std::function<void()>& work) {
    const auto from = std::chrono::steady_clock::now();
    work();
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - from;
    if (took > std::chrono::milliseconds(100)) {
      WARN(what << " took " << took.count() << " ms");
    }
  };
  CHECK(cudaSetDevice(1) == cudaSuccess);
  void* memory = nullptr;
  lap("cudaMalloc", [&] { CHECK(cudaMalloc(&memory, std::size_t{1} << 30) == cudaSuccess); });
  lap("cudaFree", [&] { CHECK(cudaFree(memory) == cudaSuccess); });
  lap("cudaMallocHost", [&] { CHECK(cudaMallocHost(&memory, 64 << 20) == cudaSuccess); });
  lap("cudaFreeHost", [&] { CHECK(cudaFreeHost(memory) == cudaSuccess); });
  cudaGraphExec_t graph = nullptr;
  lap("a graph", [&] {
    graph =
      record(ranks.ops(1), [&] { ranks.ops(1).all_reduce(ranks.view(1, 1, num_cols, num_cols)); });
  });
  CHECK(std::chrono::steady_clock::now() - begin < std::chrono::milliseconds(1000));
  CHECK(cudaGraphLaunch(graph, static_cast<cudaStream_t>(ranks.ops(1).stream())) == cudaSuccess);
  for (int rank = 2; rank < ranks.size(); ++rank) {
    ranks.ops(rank).all_reduce(ranks.view(rank, 1, num_cols, num_cols));
  }
  ranks.run([&](int rank) { ranks.ops(rank).synchronise(); });
  CHECK(ranks.works());
  CHECK(cudaGraphExecDestroy(graph) == cudaSuccess);
}

struct shape {
  int rows, cols, gap; ///< the rows of rank r are gap * r elements further apart
  int first = 0;       ///< element of the memory where they begin
};

/// The sums of a group with exact numerics: float32, in order of ranks, nothing rounded twice. Room
/// for 400 rows of 1600 is reserved.
inline void check_exact_sums(team& ranks, std::mt19937& random) {
  const int num_ranks = ranks.size();
  ranks.reserve(std::size_t{400} * 1600);
  for (const auto& at :
       {shape{1, 1536, 0}, shape{1, 1, 0}, shape{1, 7, 0, 3}, shape{2, 4, 0}, shape{3, 1536, 4},
        shape{17, 1001, 3}, shape{16, 1001, 0, 1}, shape{64, 1536, 0}, shape{90, 512, 0, 4},
        shape{333, 1537, 5, 1}, shape{400, 1000, 16}, shape{5, 1536, 1}, shape{1, 1536, 0}}) {
    INFO(at.rows << " rows of " << at.cols << ", " << at.gap << " apart, from " << at.first);
    std::vector<matrix> parts;
    matrix expected(at.rows, at.cols);
    for (int rank = 0; rank < num_ranks; ++rank) {
      parts.push_back(random_matrix(at.rows, at.cols, random, rank % 2 == 0 ? 1.0F : 100.0F));
      for (std::size_t i = 0; i < expected.data.size(); ++i) {
        expected.data[i] = rank == 0 ? parts[0].data[i] : expected.data[i] + parts[rank].data[i];
      }
    }
    std::vector<matrix> got(num_ranks, matrix(at.rows, at.cols));
    ranks.run([&](int rank) {
      const auto x = ranks.view(rank, at.rows, at.cols, at.cols + at.gap * rank, at.first);
      ranks.ops(rank).copy_from_host(parts[rank].data.data(), x);
      ranks.ops(rank).all_reduce(x);
      ranks.ops(rank).copy_to_host(x, got[rank].data.data());
    });
    for (int rank = 0; rank < num_ranks; ++rank) {
      INFO("rank " << rank);
      CHECK(same_bits(got[rank], expected));
    }
    if (!ranks.works()) {
      return;
    }
  }
}

} // namespace kernel_tests
