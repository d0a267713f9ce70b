#pragma once

namespace gpu_bench {

/// Several GPUs together: copies from one to another, and sums of rows over two, four and eight of
/// them in each way that there is, beside NCCL where its library is found. Nothing where there is
/// one GPU.
void bench_ranks();

} // namespace gpu_bench
