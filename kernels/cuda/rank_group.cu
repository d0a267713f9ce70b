#include "troupe/kernels/cuda/pieces.cuh"
#include "troupe/kernels/cuda/rank_group.hpp"

#include <algorithm>

/// Kernels of different ranks wait for each other, so the blocks of a call have to run at the same
/// time: grids are never larger than what the GPU holds.
namespace troupe::kernels::cuda {

namespace {

constexpr std::uint32_t kPolls = 64; ///< between two looks at the clock

// Memory that other GPUs read and write.

__device__ uint4 load_now(const void* at) {
  uint4 value;
  asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(at)
               : "memory");
  return value;
}

__device__ void store_now(void* at, const uint4& value) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

__device__ void store_now(std::uint32_t* at, std::uint32_t value) {
  asm volatile("st.volatile.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}

__device__ void release(void* at, std::uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}

__device__ std::uint32_t acquire(const void* at) {
  std::uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}

__device__ std::uint64_t nanoseconds() {
  std::uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// Calls.

__device__ exchange_control* control_of(const rank_view& group, std::int32_t rank) {
  return reinterpret_cast<exchange_control*>(group.memory[rank]);
}

struct call {
  std::uint32_t sequence;
  std::uint32_t parity;
  std::uint32_t broken; ///< a note: somebody has given up
};

/// Numbers alternate between odd and even, also where they begin again.
__device__ call this_call(const rank_view& group) {
  const uint4 control = load_now(control_of(group, group.rank));
  const std::uint32_t sequence = control.x == 0xFFFFFFFFU ? 2 : control.x + 1;
  return {sequence, sequence % 2, control.z};
}

/// Of one thread of a block whose threads have used the number. The last block passes it on to the
/// next call, which another kernel makes.
__device__ void count_call(const rank_view& group, const call& now) {
  exchange_control* control = control_of(group, group.rank);
  if (atomicAdd(&control->arrived, 1U) == gridDim.x - 1) {
    store_now(&control->arrived, 0U);
    store_now(&control->sequence, now.sequence);
  }
}

/// What the host is told.
__device__ void leave_note(const rank_view& group, std::uint32_t note) {
  store_now(group.note, note);
  __threadfence_system();
}

/// How long a thread has waited.
class patience {
public:
  /// Whether to go on waiting. Who gives up tells all ranks, so that they fail at the same time.
  __device__ bool lasts(const rank_view& group, std::int32_t awaited) {
    if (++polls_ % kPolls != 0) {
      return true;
    }
    const std::uint64_t now = nanoseconds();
    if (polls_ == kPolls) {
      begin_ = now;
    }
    const std::uint32_t told = load_now(control_of(group, group.rank)).z;
    if (told == 0 && now - begin_ < group.deadline_ns) {
      return true;
    }
    const std::uint32_t note = told != 0 ? told : (group.rank + 1U) << 8 | (awaited + 1U);
    if (told == 0) {
      for (std::int32_t rank = 0; rank < group.layout.num_ranks; ++rank) {
        store_now(&control_of(group, rank)->broken, note);
      }
    }
    leave_note(group, note);
    return false;
  }

private:
  std::uint32_t polls_ = 0;
  std::uint64_t begin_ = 0;
};

__device__ bool wait_for(const rank_view& group, std::size_t flag, std::uint32_t sequence,
                         std::int32_t awaited) {
  patience patience;
  const std::byte* at = group.memory[group.rank] + flag;
  while (acquire(at) != sequence) {
    if (!patience.lasts(group, awaited)) {
      return false;
    }
  }
  return true;
}

// Few rows.

/// Two lines hold a piece: each 8 bytes that are written at once are 4 of data and the number.
__device__ bool is_there(uint4 first, uint4 second, std::uint32_t sequence) {
  return first.y == sequence && first.w == sequence && second.y == sequence && second.w == sequence;
}

template <class T, int kRanks, bool kWhole>
__global__ void __launch_bounds__(kFewThreads)
  add_few(const __grid_constant__ rank_view group, const __grid_constant__ pieces_of_rows<T> x) {
  const std::uint32_t piece = blockIdx.x * kFewThreads + threadIdx.x;
  const bool has_piece = piece < x.count;
  const call now = this_call(group);
  const uint4 own = has_piece ? load_piece<kWhole>(x, piece) : uint4{};
  if (has_piece) {
    const uint4 first{own.x, now.sequence, own.y, now.sequence};
    const uint4 second{own.z, now.sequence, own.w, now.sequence};
    const std::size_t at = group.layout.lines(now.parity, group.rank) + piece * std::size_t{32};
#pragma unroll
    for (int rank = 0; rank < kRanks; ++rank) {
      if (rank < group.layout.num_ranks && rank != group.rank) {
        store_now(group.memory[rank] + at, first);
        store_now(group.memory[rank] + at + 16, second);
      }
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    count_call(group, now);
  }
  if (!has_piece || now.broken != 0) {
    if (now.broken != 0) {
      leave_note(group, now.broken);
    }
    return;
  }
  uint4 first[kRanks] = {};
  uint4 second[kRanks] = {};
  const auto from = [&](int rank) {
    return group.memory[group.rank] + group.layout.lines(now.parity, rank)
           + piece * std::size_t{32};
  };
#pragma unroll
  for (int rank = 0; rank < kRanks; ++rank) {
    if (rank < group.layout.num_ranks && rank != group.rank) {
      first[rank] = load_now(from(rank));
      second[rank] = load_now(from(rank) + 16);
    }
  }
  patience patience;
#pragma unroll
  for (int rank = 0; rank < kRanks; ++rank) {
    if (rank < group.layout.num_ranks && rank != group.rank) {
      while (!is_there(first[rank], second[rank], now.sequence)) {
        if (!patience.lasts(group, rank)) {
          return;
        }
        first[rank] = load_now(from(rank));
        second[rank] = load_now(from(rank) + 16);
      }
    }
  }
  const auto part = [&](int rank) {
    return choose(rank == group.rank, own,
                  {first[rank].x, first[rank].z, second[rank].x, second[rank].z});
  };
  piece_sum<T> sum(part(0));
#pragma unroll
  for (int rank = 1; rank < kRanks; ++rank) {
    if (rank < group.layout.num_ranks) {
      sum.add(part(rank));
    }
  }
  store_piece<kWhole>(x, piece, sum.rounded());
}

// Many rows.

/// Calls `each` with the pieces of a chunk that belong to this thread.
template <int kPieces, class Each>
__device__ void for_pieces(std::uint32_t chunk, std::uint32_t count, const Each& each) {
#pragma unroll
  for (std::uint32_t i = 0; i < kPieces; ++i) {
    const std::uint32_t offset = i * kManyThreads + threadIdx.x;
    const std::uint32_t piece = chunk * (kPieces * kManyThreads) + offset;
    if (piece < count) {
      each(i, piece, offset);
    }
  }
}

/// Two ranks.
template <class T, int kPieces, bool kWhole>
__global__ void __launch_bounds__(kManyThreads, 2)
  add_both(const __grid_constant__ rank_view group, const __grid_constant__ pieces_of_rows<T> x) {
  const call now = this_call(group);
  const std::int32_t peer = 1 - group.rank;
  const std::uint32_t num_chunks =
    (x.count + kPieces * kManyThreads - 1) / (kPieces * kManyThreads);
  const std::size_t parts = group.layout.parts(now.parity, 0);
  auto* const outgoing = reinterpret_cast<uint4*>(group.memory[peer] + parts);
  const auto* const incoming = reinterpret_cast<const uint4*>(group.memory[group.rank] + parts);
  const std::size_t sent = group.layout.part_flags(now.parity, group.rank);
  const std::size_t got = group.layout.part_flags(now.parity, peer);

  const auto send = [&](std::uint32_t chunk) {
    uint4 values[kPieces];
    for_pieces<kPieces>(
      chunk, x.count, [&](auto i, auto piece, auto) { values[i] = load_piece<kWhole>(x, piece); });
    for_pieces<kPieces>(chunk, x.count,
                        [&](auto i, auto piece, auto) { outgoing[piece] = values[i]; });
    __syncthreads();
    if (threadIdx.x == 0) {
      release(group.memory[peer] + sent + chunk * std::size_t{4}, now.sequence);
    }
  };
  const auto receive = [&](std::uint32_t chunk) {
    const bool there =
      threadIdx.x != 0 || wait_for(group, got + chunk * std::size_t{4}, now.sequence, peer);
    if (__syncthreads_and(there) == 0) {
      return false;
    }
    uint4 own[kPieces];
    uint4 other[kPieces];
    for_pieces<kPieces>(chunk, x.count, [&](auto i, auto piece, auto) {
      own[i] = load_piece<kWhole>(x, piece);
      other[i] = __ldcg(incoming + piece);
    });
    for_pieces<kPieces>(chunk, x.count, [&](auto i, auto piece, auto) {
      piece_sum<T> sum(own[i]); // the order of two does not matter
      sum.add(other[i]);
      store_piece<kWhole>(x, piece, sum.rounded());
    });
    return true;
  };

  // One chunk is always on its way.
  std::uint32_t chunk = blockIdx.x;
  send(chunk);
  if (threadIdx.x == 0) {
    count_call(group, now);
  }
  if (__syncthreads_or(now.broken != 0) != 0) {
    if (now.broken != 0) {
      leave_note(group, now.broken);
    }
    return;
  }
  for (; chunk < num_chunks; chunk += gridDim.x) {
    if (chunk + gridDim.x < num_chunks) {
      send(chunk + gridDim.x);
    }
    if (!receive(chunk)) {
      return;
    }
  }
}

/// More than two ranks. Of num_ranks neighbouring chunks, a set, each rank adds up one.
template <class T, int kRanks, int kPieces, bool kWhole>
__global__ void __launch_bounds__(kManyThreads, 2)
  add_shares(const __grid_constant__ rank_view group, const __grid_constant__ pieces_of_rows<T> x) {
  constexpr std::uint32_t kChunk = kPieces * kManyThreads;
  const call now = this_call(group);
  const std::uint32_t num_ranks = group.layout.num_ranks;
  const std::uint32_t num_chunks = (x.count + kChunk - 1) / kChunk;
  const std::uint32_t num_sets = (num_chunks + num_ranks - 1) / num_ranks;
  std::byte* const memory = group.memory[group.rank];
  const auto rank_idx = static_cast<std::uint32_t>(group.rank);

  const auto send_parts = [&](std::uint32_t set) {
    const std::size_t parts = group.layout.parts(now.parity, group.rank);
#pragma unroll 1
    for (std::uint32_t i = 1; i < num_ranks; ++i) {
      const std::uint32_t owner = (rank_idx + i) % num_ranks;
      auto* const to =
        reinterpret_cast<uint4*>(group.memory[owner] + parts) + std::size_t{set} * kChunk;
      for_pieces<kPieces>(set * num_ranks + owner, x.count, [&](auto, auto piece, auto offset) {
        to[offset] = load_piece<kWhole>(x, piece);
      });
    }
    __syncthreads();
    if (threadIdx.x < num_ranks && threadIdx.x != rank_idx) {
      const std::size_t flags = group.layout.part_flags(now.parity, group.rank);
      release(group.memory[threadIdx.x] + flags + set * std::size_t{4}, now.sequence);
    }
  };
  const auto add_share = [&](std::uint32_t set) {
    bool there = true;
    if (threadIdx.x < num_ranks && threadIdx.x != rank_idx) {
      const std::size_t flags = group.layout.part_flags(now.parity, threadIdx.x);
      there = wait_for(group, flags + set * std::size_t{4}, now.sequence, threadIdx.x);
    }
    if (__syncthreads_and(there) == 0) {
      return false;
    }
    const std::uint32_t chunk = set * num_ranks + rank_idx;
    for_pieces<kPieces>(chunk, x.count, [&](auto, auto piece, auto offset) {
      const uint4 own = load_piece<kWhole>(x, piece);
      uint4 parts[kRanks] = {};
#pragma unroll
      for (int rank = 0; rank < kRanks; ++rank) {
        if (rank < group.layout.num_ranks && rank != group.rank) {
          const auto* from =
            reinterpret_cast<const uint4*>(memory + group.layout.parts(now.parity, rank));
          parts[rank] = __ldcg(from + std::size_t{set} * kChunk + offset);
        }
      }
      piece_sum<T> sum(choose(group.rank == 0, own, parts[0]));
#pragma unroll
      for (int rank = 1; rank < kRanks; ++rank) {
        if (rank < group.layout.num_ranks) {
          sum.add(choose(rank == group.rank, own, parts[rank]));
        }
      }
      const uint4 result = sum.rounded();
      store_piece<kWhole>(x, piece, result);
#pragma unroll
      for (int rank = 0; rank < kRanks; ++rank) {
        if (rank < group.layout.num_ranks && rank != group.rank) {
          reinterpret_cast<uint4*>(group.memory[rank] + group.layout.sums(now.parity))[piece] =
            result;
        }
      }
    });
    __syncthreads();
    if (threadIdx.x < num_ranks && threadIdx.x != rank_idx) {
      const std::size_t flags = group.layout.sum_flags(now.parity);
      release(group.memory[threadIdx.x] + flags + chunk * std::size_t{4}, now.sequence);
    }
    return true;
  };
  const auto take_sums = [&](std::uint32_t set) {
    bool there = true;
    if (threadIdx.x < num_ranks && threadIdx.x != rank_idx) {
      const std::size_t flags = group.layout.sum_flags(now.parity);
      there = wait_for(group, flags + (set * num_ranks + threadIdx.x) * std::size_t{4},
                       now.sequence, threadIdx.x);
    }
    if (__syncthreads_and(there) == 0) {
      return false;
    }
    const auto* const sums = reinterpret_cast<const uint4*>(memory + group.layout.sums(now.parity));
#pragma unroll 1
    for (std::uint32_t i = 1; i < num_ranks; ++i) {
      const std::uint32_t owner = (rank_idx + i) % num_ranks;
      for_pieces<kPieces>(set * num_ranks + owner, x.count, [&](auto, auto piece, auto) {
        store_piece<kWhole>(x, piece, __ldcg(sums + piece));
      });
    }
    return true;
  };

  // While others add up a set, this rank sends the next.
  const std::uint32_t first = blockIdx.x;
  const std::uint32_t step = gridDim.x;
  send_parts(first);
  if (threadIdx.x == 0) {
    count_call(group, now);
  }
  if (__syncthreads_or(now.broken != 0) != 0) {
    if (now.broken != 0) {
      leave_note(group, now.broken);
    }
    return;
  }
  for (std::uint32_t set = first; set < num_sets + step; set += step) {
    if (set + step < num_sets) {
      send_parts(set + step);
    }
    if (set < num_sets && !add_share(set)) {
      return;
    }
    if (set >= first + step && !take_sums(set - step)) {
      return;
    }
  }
}

template <class T>
using exchange_kernel = void (*)(rank_view, pieces_of_rows<T>);

template <class T>
exchange_kernel<T> few_kernel(std::int32_t num_ranks, bool whole) {
  if (num_ranks == 2) {
    return whole ? add_few<T, 2, true> : add_few<T, 2, false>;
  }
  if (num_ranks <= 4) {
    return whole ? add_few<T, 4, true> : add_few<T, 4, false>;
  }
  return whole ? add_few<T, 8, true> : add_few<T, 8, false>;
}

template <class T>
exchange_kernel<T> many_kernel(std::int32_t num_ranks, bool large, bool whole) {
  if (num_ranks == 2 && large) {
    return whole ? add_both<T, 2, true> : add_both<T, 2, false>;
  }
  if (num_ranks == 2) {
    return whole ? add_both<T, 1, true> : add_both<T, 1, false>;
  }
  if (num_ranks <= 4 && large) {
    return whole ? add_shares<T, 4, 2, true> : add_shares<T, 4, 2, false>;
  }
  if (num_ranks <= 4) {
    return whole ? add_shares<T, 4, 1, true> : add_shares<T, 4, 1, false>;
  }
  if (large) {
    return whole ? add_shares<T, 8, 2, true> : add_shares<T, 8, 2, false>;
  }
  return whole ? add_shares<T, 8, 1, true> : add_shares<T, 8, 1, false>;
}

/// What load_exchange does, of one type of elements.
template <class T>
cudaError_t load_kernels(std::int32_t num_ranks, std::int32_t& few_blocks,
                         std::int32_t& many_blocks) {
  auto status = cudaSuccess;
  const auto ask = [&](exchange_kernel<T> kernel, std::int32_t threads, std::int32_t& least) {
    int blocks = 0;
    const auto result = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0);
    status = status == cudaSuccess ? result : status;
    least = std::min(least, static_cast<std::int32_t>(blocks));
  };
  for (const bool whole : {true, false}) {
    ask(few_kernel<T>(num_ranks, whole), kFewThreads, few_blocks);
    for (const bool large : {true, false}) {
      ask(many_kernel<T>(num_ranks, large, whole), kManyThreads, many_blocks);
    }
  }
  return status;
}

} // namespace

cudaError_t load_exchange(std::int32_t num_ranks, std::int32_t& few_blocks,
                          std::int32_t& many_blocks) {
  few_blocks = many_blocks = 1 << 20;
  const auto status = load_kernels<bf16>(num_ranks, few_blocks, many_blocks);
  return status == cudaSuccess ? load_kernels<float>(num_ranks, few_blocks, many_blocks) : status;
}

template <class T>
void launch_few(cudaStream_t stream, const rank_view& group, const pieces_of_rows<T>& x) {
  const auto blocks = (x.count + kFewThreads - 1) / kFewThreads;
  few_kernel<T>(group.layout.num_ranks, x.whole)<<<blocks, kFewThreads, 0, stream>>>(group, x);
}

template <class T>
void launch_many(cudaStream_t stream, const rank_view& group, const pieces_of_rows<T>& x,
                 std::int32_t most_blocks) {
  const auto num_ranks = static_cast<std::uint32_t>(group.layout.num_ranks);
  const auto most = static_cast<std::uint32_t>(most_blocks);
  const auto unit = num_ranks == 2 ? 1 : num_ranks;
  const auto jobs = [&](std::uint32_t chunk) {
    return (x.count + chunk * unit - 1) / (chunk * unit);
  };
  // Large chunks where there is enough of them.
  const bool large = jobs(exchange_layout::kLargeChunk) >= most / 2;
  const auto blocks =
    std::min(jobs(large ? exchange_layout::kLargeChunk : exchange_layout::kSmallChunk), most);
  many_kernel<T>(num_ranks, large, x.whole)<<<blocks, kManyThreads, 0, stream>>>(group, x);
}

template void launch_few(cudaStream_t, const rank_view&, const pieces_of_rows<bf16>&);
template void launch_many(cudaStream_t, const rank_view&, const pieces_of_rows<bf16>&,
                          std::int32_t);
template void launch_few(cudaStream_t, const rank_view&, const pieces_of_rows<float>&);
template void launch_many(cudaStream_t, const rank_view&, const pieces_of_rows<float>&,
                          std::int32_t);

} // namespace troupe::kernels::cuda
