#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <cuda_runtime_api.h>

#include "troupe/kernels/cuda/cuda_ops.hpp"

/// What the GPU benchmarks share: captured graphs timed with events, and the rates that the GPU
/// itself reaches.
namespace gpu_bench {

using troupe::kernels::cuda::gpu_ops;

/// Microseconds of one call of `work`: the median of replays of a graph that holds `repeats` of
/// them. `work` is given the number of the repeat, so that it can use other memory each time, and
/// must only queue. It runs once beforehand. Negative where something failed.
double time_graph(gpu_ops& ops, int repeats, const std::function<void(int)>& work);

/// Microseconds of one call of `work`, which may wait for the GPU: the median of `rounds`.
double time_calls(gpu_ops& ops, int rounds, const std::function<void()>& work);

/// Bytes a second, read and written, of a copy of 2 GiB within the device by a kernel, which is
/// faster than the driver's.
double copy_rate(gpu_ops& ops);

/// Operations a second of cuBLASLt: [m, k] bf16 rows by an [n, k] bf16 weight, random values. 0
/// where the library is not there.
double library_rate(gpu_ops& ops, std::int64_t m, std::int64_t n, std::int64_t k);

/// Device memory filled with random bits that are finite as bf16.
std::shared_ptr<void> random_rows(gpu_ops& ops, std::size_t num_elements);

} // namespace gpu_bench
