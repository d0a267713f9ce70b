#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "troupe/kernels/cuda/nccl_api.hpp"
#include "troupe/kernels/cuda/sum_watch.hpp"

namespace troupe::kernels::cuda {

/// Memory in which GPUs say how far they have got, one entry a rank. It may outlive the group.
using shared_progress = std::shared_ptr<rank_progress[]>;

/// NCCL's communicators of the ranks of a group, which are threads of this process, and the guard
/// of them: a thread that makes them, looks after them and aborts them. All that may block in NCCL
/// runs there, so nobody else waits longer than a deadline: who has to wait for the guard leaves it
/// behind when it is stuck.
///
/// The group fails when a communicator reports an error, when a rank waits for another beyond the
/// deadline (sum_watch), or when somebody gives up. The guard then aborts all communicators, which
/// ends kernels that wait for a rank, and all that is asked of the group later does nothing.
class nccl_communicators {
public:
  /// Null with the cause in `error` where that fails or is not done within `patience`. `deadline`
  /// is that of a sum.
  static std::unique_ptr<nccl_communicators>
  make(const nccl_api::functions& api, std::span<const std::int32_t> devices,
       shared_progress progress, std::chrono::milliseconds patience,
       std::chrono::milliseconds deadline, std::string& error);

  /// Aborts what is under way. Kernels of the communicators have ended then, unless this is false:
  /// the guard is stuck.
  bool stop();
  ~nccl_communicators();
  nccl_communicators(const nccl_communicators&) = delete;
  nccl_communicators& operator=(const nccl_communicators&) = delete;

  std::int32_t size() const;

  /// Queues for one rank: the `bytes` of each rank at `all` + its rank x `bytes`, where its own
  /// stand already. False: the group has failed.
  bool all_gather(std::int32_t rank, void* all, std::size_t bytes, nccl_api::stream stream);

  /// Queues for one rank: part p of `out` to rank p, and what rank p has for this one to part p
  /// of `in`. Its own part stays where it is.
  bool all_to_all(std::int32_t rank, const void* out, void* in, std::size_t bytes,
                  nccl_api::stream stream);

  void set_deadline(std::chrono::milliseconds deadline);

  bool has_failed() const;
  /// As `rank` is told; empty: it has not.
  std::string failure(std::int32_t rank) const;
  void give_up(const std::string& why);

private:
  struct state;
  explicit nccl_communicators(std::shared_ptr<state> s) : state_(std::move(s)) {}

  template <class Call>
  bool carry_out(std::int32_t rank, const Call& call);

  std::shared_ptr<state> state_; ///< the guard's as well
};

} // namespace troupe::kernels::cuda
