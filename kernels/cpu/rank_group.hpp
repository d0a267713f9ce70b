#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "troupe/kernels/ops.hpp"

namespace troupe::kernels {

/// Where the operations of several ranks of this process meet. Each rank has a thread of its own.
class cpu_rank_group {
public:
  /// `patience` is how long a rank waits for the others before it takes them for lost.
  cpu_rank_group(std::int32_t size, std::chrono::milliseconds patience);

  /// x = the sum of the x of all ranks, each element in order of ranks. Empty, or why it could not
  /// be done; from then on it cannot be done for anybody.
  std::string add_up(std::int32_t rank, const rows_view& x);

private:
  /// Waits until all ranks are here. False after the deadline, and for all who come later.
  bool meet();

  const std::int32_t size_;
  const std::chrono::milliseconds patience_;
  std::mutex mutex_;
  std::condition_variable all_are_here_;
  std::int32_t num_here_ = 0;
  std::uint64_t num_meetings_ = 0;
  bool is_broken_ = false;
  std::vector<rows_view> given_; ///< by rank
  std::vector<float> sums_;      ///< [rows, cols]; each rank has a share of the rows
};

} // namespace troupe::kernels
