#pragma once

#include <cstdint>

namespace troupe::kernels::cuda {

/// What carries rows between the GPUs of a group.
enum class sum_transport : std::uint8_t {
  automatic, ///< peer memory where all of them reach each other's, NCCL elsewhere
  peer,      ///< memory of each GPU that all of them reach (rank_group.hpp)
  nccl,      ///< NVIDIA's library, which needs no such memory (nccl_group.hpp)
};

/// Peer memory is the faster one at every size that was measured (docs/benchmarks.md).
constexpr sum_transport choose_transport(sum_transport wanted, bool all_reach_each_other) {
  if (wanted != sum_transport::automatic) {
    return wanted;
  }
  return all_reach_each_other ? sum_transport::peer : sum_transport::nccl;
}

} // namespace troupe::kernels::cuda
