#pragma once

namespace gpu_bench {

/// What it takes to hand hidden rows of DeepSeek-R1 from one GPU to the next: left in memory that
/// another process owns and fetched from there, beside the way by the host. With one GPU, from that
/// to itself. Starts a process, so nothing of CUDA may have been used before. The exit code.
int bench_boundary();

} // namespace gpu_bench
