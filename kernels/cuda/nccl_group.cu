#include "troupe/kernels/cuda/nccl_group.hpp"
#include "troupe/kernels/cuda/pieces.cuh"

#include <algorithm>

namespace troupe::kernels::cuda {

namespace {

constexpr std::uint32_t kThreads = 256;
constexpr std::uint32_t kMostBlocks = 1056; ///< eight a multiprocessor of what there is today

/// The host sees it some time later.
__device__ void count(std::uint32_t& own, std::uint32_t& seen) {
  own += 1;
  *const_cast<volatile std::uint32_t*>(&seen) = own;
}

__device__ bool is_first_thread() {
  return blockIdx.x == 0 && threadIdx.x == 0;
}

template <class Work>
__device__ void for_each_piece(std::uint32_t count, const Work& work) {
  for (auto i = blockIdx.x * kThreads + threadIdx.x; i < count; i += gridDim.x * kThreads) {
    work(i);
  }
}

template <class T, bool kWhole>
__global__ void collect(pieces_of_rows<T> x, uint4* to, part_memory rank) {
  if (is_first_thread()) {
    count(rank.own->arrived, rank.seen->arrived);
  }
  for_each_piece(x.count, [&](std::uint32_t i) { to[i] = load_piece<kWhole>(x, i); });
}

template <class T, bool kWhole>
__global__ void add_all(const uint4* parts, std::uint32_t num_ranks, pieces_of_rows<T> x,
                        part_memory rank) {
  if (is_first_thread()) {
    count(rank.own->left, rank.seen->left);
  }
  for_each_piece(x.count, [&](std::uint32_t i) {
    piece_sum<T> sum(parts[i]);
    for (std::uint32_t r = 1; r < num_ranks; ++r) {
      sum.add(parts[std::size_t{r} * x.count + i]);
    }
    store_piece<kWhole>(x, i, sum.rounded());
  });
}

template <class T>
__global__ void add_share(uint4* own, const uint4* others, std::uint32_t num_ranks,
                          std::uint32_t own_rank, std::uint32_t num_pieces) {
  for_each_piece(num_pieces, [&](std::uint32_t i) {
    const auto part = [&](std::uint32_t r) {
      return r == own_rank ? own[i] : others[std::size_t{r} * num_pieces + i];
    };
    piece_sum<T> sum(part(0));
    for (std::uint32_t r = 1; r < num_ranks; ++r) {
      sum.add(part(r));
    }
    own[i] = sum.rounded();
  });
}

template <class T, bool kWhole>
__global__ void hand_back(const uint4* from, pieces_of_rows<T> x, part_memory rank) {
  if (is_first_thread()) {
    count(rank.own->left, rank.seen->left);
  }
  for_each_piece(x.count, [&](std::uint32_t i) { store_piece<kWhole>(x, i, from[i]); });
}

std::uint32_t blocks_for(std::uint32_t num_pieces) {
  return std::clamp((num_pieces + kThreads - 1) / kThreads, 1U, kMostBlocks);
}

} // namespace

template <class T>
void launch_collect(cudaStream_t stream, const pieces_of_rows<T>& x, uint4* to,
                    const part_memory& rank) {
  (x.whole ? collect<T, true>
           : collect<T, false>)<<<blocks_for(x.count), kThreads, 0, stream>>>(x, to, rank);
}

template <class T>
void launch_add_all(cudaStream_t stream, const uint4* parts, std::int32_t num_ranks,
                    const pieces_of_rows<T>& x, const part_memory& rank) {
  (x.whole ? add_all<T, true> : add_all<T, false>)<<<blocks_for(x.count), kThreads, 0, stream>>>(
    parts, static_cast<std::uint32_t>(num_ranks), x, rank);
}

template <class T>
void launch_add_share(cudaStream_t stream, uint4* own, const uint4* others, std::int32_t num_ranks,
                      std::int32_t own_rank, std::uint32_t count) {
  add_share<T>
    <<<blocks_for(count), kThreads, 0, stream>>>(own, others, static_cast<std::uint32_t>(num_ranks),
                                                 static_cast<std::uint32_t>(own_rank), count);
}

template <class T>
void launch_hand_back(cudaStream_t stream, const uint4* from, const pieces_of_rows<T>& x,
                      const part_memory& rank) {
  (x.whole ? hand_back<T, true>
           : hand_back<T, false>)<<<blocks_for(x.count), kThreads, 0, stream>>>(from, x, rank);
}

namespace {

/// The first error, or `status`.
template <class T>
cudaError_t load_kernels(cudaError_t status) {
  cudaFuncAttributes attributes;
  const auto load = [&](auto* kernel) {
    const auto result = cudaFuncGetAttributes(&attributes, kernel);
    status = status == cudaSuccess ? result : status;
  };
  load(collect<T, true>);
  load(collect<T, false>);
  load(add_all<T, true>);
  load(add_all<T, false>);
  load(add_share<T>);
  load(hand_back<T, true>);
  load(hand_back<T, false>);
  return status;
}

} // namespace

cudaError_t load_nccl_kernels() {
  return load_kernels<float>(load_kernels<bf16>(cudaSuccess));
}

template void launch_collect(cudaStream_t, const pieces_of_rows<bf16>&, uint4*, const part_memory&);
template void launch_add_all(cudaStream_t, const uint4*, std::int32_t, const pieces_of_rows<bf16>&,
                             const part_memory&);
template void launch_add_share<bf16>(cudaStream_t, uint4*, const uint4*, std::int32_t, std::int32_t,
                                     std::uint32_t);
template void launch_hand_back(cudaStream_t, const uint4*, const pieces_of_rows<bf16>&,
                               const part_memory&);
template void launch_collect(cudaStream_t, const pieces_of_rows<float>&, uint4*,
                             const part_memory&);
template void launch_add_all(cudaStream_t, const uint4*, std::int32_t, const pieces_of_rows<float>&,
                             const part_memory&);
template void launch_add_share<float>(cudaStream_t, uint4*, const uint4*, std::int32_t,
                                      std::int32_t, std::uint32_t);
template void launch_hand_back(cudaStream_t, const uint4*, const pieces_of_rows<float>&,
                               const part_memory&);

} // namespace troupe::kernels::cuda
