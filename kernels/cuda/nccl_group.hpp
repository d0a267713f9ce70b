#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "troupe/kernels/cuda/nccl_communicators.hpp"
#include "troupe/kernels/cuda/pieces.hpp"
#include "troupe/kernels/cuda/summing_group.hpp"

namespace troupe::kernels::cuda {

/// A rank's memory of the parts of a sum, and where it writes how far it has got.
struct part_memory {
  uint4* pieces = nullptr;
  rank_progress* own = nullptr;  ///< memory of the GPU
  rank_progress* seen = nullptr; ///< host memory, see shared_progress
};

/// A group that exchanges rows by NCCL, for GPUs that do not reach each other's memory. NCCL moves
/// the parts and does not add them up: its own sums round after every addition, in an order that
/// depends on the size of all rows together. So a step has the bits that it has by peer memory.
///
/// A few rows are gathered: every rank gets the parts of all and adds them up. Of many rows with
/// more than two ranks, each rank adds up a share of the pieces and hands on the sums, so that less
/// travels: 2 (n - 1) / n of the bytes instead of n - 1 times as many.
///
/// Calls are counted by the kernels before and behind those of NCCL, in memory that the guard of
/// the communicators watches. So they can be recorded in a step; the guard aborts communicators
/// when steps that use them wait in vain, and is done when these steps are gone.
class nccl_group final : public summing_group {
public:
  /// `library` is what is opened as NCCL, which wants a GPU for each rank. num_cols counts elements
  /// of 16 bit; those of 32 bit count twice.
  static std::shared_ptr<nccl_group> make(const std::string& library,
                                          std::span<const std::int32_t> devices,
                                          std::int32_t max_rows, std::int32_t num_cols,
                                          std::chrono::milliseconds deadline, std::string& error);
  ~nccl_group() override;

  std::int32_t size() const override { return static_cast<std::int32_t>(devices_.size()); }
  sum_transport transport() const override { return sum_transport::nccl; }
  std::int32_t device(std::int32_t rank) const override { return devices_[rank]; }
  bool add_up(cudaStream_t stream, std::int32_t rank, const rows_of<bf16>& x) override;
  bool add_up(cudaStream_t stream, std::int32_t rank, const rows_of<float>& x) override;
  bool has_failed(std::int32_t) const override { return communicators_->has_failed(); }
  std::string failure(std::int32_t rank) const override { return communicators_->failure(rank); }
  void give_up(std::int32_t rank, const std::string& why) override;

private:
  nccl_group() = default;
  bool take_memory(std::int32_t max_rows, std::int32_t num_cols, std::string& error);
  bool rehearse(std::int32_t num_cols, std::chrono::milliseconds patience, std::string& error);
  template <class T>
  bool add_up_rows(cudaStream_t stream, std::int32_t rank, const rows_of<T>& x);
  template <class T>
  void gather(cudaStream_t stream, std::int32_t rank, const pieces_of_rows<T>& x);
  template <class T>
  void share_out(cudaStream_t stream, std::int32_t rank, const pieces_of_rows<T>& x);

  std::vector<std::int32_t> devices_;
  shared_progress progress_;
  std::vector<part_memory> memory_;
  std::uint32_t most_ = 0; ///< pieces of one exchange
  std::unique_ptr<nccl_communicators> communicators_;
};

// Kernels (nccl_group.cu).

/// Copies rows into pieces; the rank comes to a sum.
template <class T>
void launch_collect(cudaStream_t stream, const pieces_of_rows<T>& x, uint4* to,
                    const part_memory& rank);
/// x = the sum of num_ranks parts, of which part r begins at parts + r x x.count; the rank leaves
/// the sum.
template <class T>
void launch_add_all(cudaStream_t stream, const uint4* parts, std::int32_t num_ranks,
                    const pieces_of_rows<T>& x, const part_memory& rank);
/// own += the others, in order of ranks: part r begins at others + r x count, and that of
/// `own_rank` is in `own`. Pieces are of T.
template <class T>
void launch_add_share(cudaStream_t stream, uint4* own, const uint4* others, std::int32_t num_ranks,
                      std::int32_t own_rank, std::uint32_t count);
/// Copies pieces back into rows; the rank leaves the sum.
template <class T>
void launch_hand_back(cudaStream_t stream, const uint4* from, const pieces_of_rows<T>& x,
                      const part_memory& rank);

/// Loads these kernels on the current device.
cudaError_t load_nccl_kernels();

} // namespace troupe::kernels::cuda
