#pragma once

#include <cstdint>
#include <string>

#include <cuda_runtime_api.h>

#include "troupe/kernels/cuda/cuda_ops.hpp"
#include "troupe/kernels/cuda/kernels.hpp"

namespace troupe::kernels::cuda {

inline constexpr std::int32_t kMostRanks = 8;

/// A group as its ranks use it, each on a thread of its own, at the same time. Every element of a
/// sum is the float32 sum of its parts in order of ranks, rounded once: what carries the parts does
/// not show in the bits, nor do other rows, nor the number of rows.
class summing_group : public gpu_rank_group {
public:
  virtual std::int32_t device(std::int32_t rank) const = 0;

  /// Queues x = sum over ranks for one of them, whose device is current. False: rows are wider than
  /// the memory of the group. What fails otherwise is a failure of the group.
  virtual bool add_up(cudaStream_t stream, std::int32_t rank, const rows_of<bf16>& x) = 0;
  virtual bool add_up(cudaStream_t stream, std::int32_t rank, const rows_of<float>& x) = 0;

  /// Whether the group has ended: a look at memory, without waiting.
  virtual bool has_failed(std::int32_t rank) const = 0;
  /// Why, as this rank is told; empty: it has not.
  virtual std::string failure(std::int32_t rank) const = 0;

  /// The GPU of this rank has failed, and it will not come to sums any more. May be said often.
  virtual void give_up(std::int32_t rank, const std::string& why) = 0;
};

/// That rank `who` has waited for `whom`, as `rank` is told.
inline std::string waited_in_vain(std::int32_t rank, std::int32_t who, std::int32_t whom,
                                  std::int64_t milliseconds) {
  const auto name = [rank](std::int32_t other) {
    return "rank " + std::to_string(other) + (other == rank ? " (this one)" : "");
  };
  return name(who) + " waited " + std::to_string(milliseconds) + " ms for " + name(whom)
         + " in vain";
}

} // namespace troupe::kernels::cuda
