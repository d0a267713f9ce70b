#include "timing.hpp"

#include <algorithm>
#include <chrono>
#include <cstdio>

#include "troupe/kernels/cuda/kernels.hpp"

namespace gpu_bench {

namespace {

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

bool succeeded(cudaError_t status) {
  if (status != cudaSuccess) {
    std::fprintf(stderr, "gpu-bench: %s\n", cudaGetErrorString(status));
    cudaGetLastError();
  }
  return status == cudaSuccess;
}

} // namespace

double time_graph(gpu_ops& ops, int repeats, const std::function<void(int)>& work) {
  const auto stream = static_cast<cudaStream_t>(ops.stream());
  work(0);
  ops.synchronise();
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t runnable = nullptr;
  if (!succeeded(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal))) {
    return -1.0;
  }
  for (int i = 0; i < repeats; ++i) {
    work(i);
  }
  if (!succeeded(cudaStreamEndCapture(stream, &graph))
      || !succeeded(cudaGraphInstantiate(&runnable, graph, 0))) {
    return -1.0;
  }
  cudaEvent_t begin;
  cudaEvent_t end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  std::vector<double> times;
  for (int round = 0; round < 9; ++round) {
    cudaEventRecord(begin, stream);
    cudaGraphLaunch(runnable, stream);
    cudaEventRecord(end, stream);
    ops.synchronise();
    float milliseconds = 0.0F;
    cudaEventElapsedTime(&milliseconds, begin, end);
    if (round > 1) { // the first ones warm up
      times.push_back(milliseconds * 1e3 / repeats);
    }
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(runnable);
  cudaGraphDestroy(graph);
  return ops.failure().empty() ? median(times) : -1.0;
}

double time_calls(gpu_ops& ops, int rounds, const std::function<void()>& work) {
  std::vector<double> times;
  for (int round = 0; round < rounds + 2; ++round) {
    const auto begin = std::chrono::steady_clock::now();
    work();
    ops.synchronise();
    const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - begin;
    if (round > 1) {
      times.push_back(time.count());
    }
  }
  return ops.failure().empty() ? median(times) : -1.0;
}

double copy_rate(gpu_ops& ops) {
  constexpr std::size_t kBytes = std::size_t{2} << 30;
  const auto from = random_rows(ops, kBytes / 2);
  const auto to = ops.allocate(kBytes);
  if (from == nullptr || to == nullptr) {
    return 0.0;
  }
  const auto stream = static_cast<cudaStream_t>(ops.stream());
  const double time = time_graph(
    ops, 4, [&](int) { troupe::kernels::cuda::launch_copy(stream, from.get(), to.get(), kBytes); });
  return 2.0 * kBytes / time * 1e6;
}

std::shared_ptr<void> random_rows(gpu_ops& ops, std::size_t num_elements) {
  constexpr std::size_t kPattern = std::size_t{1} << 24;
  static const auto pattern = [] {
    std::vector<std::uint16_t> bits(kPattern);
    std::uint64_t state = 88172645463325252ULL;
    for (auto& one : bits) {
      state ^= state << 13;
      state ^= state >> 7;
      state ^= state << 17;
      // Sign and fraction at random, magnitudes from 2^-4 to 2^-1.
      one = static_cast<std::uint16_t>((state & 0x807F) | (123 + (state >> 20 & 3)) << 7);
    }
    return bits;
  }();
  auto memory = ops.allocate(num_elements * 2);
  if (memory == nullptr) {
    return nullptr;
  }
  const auto stream = static_cast<cudaStream_t>(ops.stream());
  auto* to = static_cast<std::uint16_t*>(memory.get());
  for (std::size_t at = 0; at < num_elements; at += kPattern) {
    const auto count = std::min(kPattern, num_elements - at);
    if (at == 0) {
      cudaMemcpyAsync(to, pattern.data(), count * 2, cudaMemcpyHostToDevice, stream);
    } else {
      cudaMemcpyAsync(to + at, to, count * 2, cudaMemcpyDeviceToDevice, stream);
    }
  }
  ops.synchronise();
  return memory;
}

} // namespace gpu_bench
