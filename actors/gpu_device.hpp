#pragma once

#include "troupe/actors/device_watch.hpp"
#include "troupe/base/error.hpp"
#include "troupe/kernels/ops.hpp"
#include "troupe/memory/pulse_page.hpp"
#include "cluster.pb.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

namespace troupe::kernels::cuda {
class gpu_rank_group;
}

namespace troupe::actors {

/// The place of a GPU among those that compute a stage together.
struct gpu_rank {
  std::shared_ptr<kernels::cuda::gpu_rank_group> group; ///< null: it computes alone
  std::int32_t rank = 0;
};

/// Which weights will do for a process.
enum class weights_taken : std::uint8_t {
  any,      ///< those of a predecessor, or else it brings them itself
  kept_only ///< those that lie there whole; somebody else may be about to bring them
};

/// Memory of a GPU, in bytes.
struct gpu_memory {
  std::uint64_t total = 0;
  std::uint64_t free = 0;
  std::uint64_t kept = 0; ///< by its keeper, for whomever
};

/// A GPU as a worker uses it: it computes there, and what must outlive it, weights and KV pages, is
/// mapped from the GPU's keeper (memory/keeper.hpp). A worker that takes another's place finds both
/// as they were. In a build without CUDA nothing of this can be opened, and the error says so.
///
/// Used by one thread at a time. What it gives out may outlive it.
class gpu_device {
public:
  virtual ~gpu_device() = default;

  /// Opens `device` ("cuda:0"), which takes a few tenths of a second, and connects to its keeper.
  /// Errors: invalid_config when this host, or this build, has no such GPU; unavailable when no
  /// keeper answers.
  static expected<std::shared_ptr<gpu_device>> open(const std::string& device,
                                                    const std::string& keeper);

  /// "cuda:0".
  virtual const std::string& name() const = 0;

  virtual expected<gpu_memory> memory() = 0;

  /// Memory for the KV pages of an actor, as the last process that computed for it has left it.
  virtual expected<std::shared_ptr<void>> map_kv(const std::string& actor, std::size_t bytes) = 0;

  /// Where the ranks of a stage on these GPUs meet, to add up as many rows of as many columns.
  /// Errors: unavailable where they do not reach each other's memory and there is no NCCL, or where
  /// what is asked for is not there; resource_exhausted.
  static expected<std::shared_ptr<kernels::cuda::gpu_rank_group>>
  join(std::span<const std::shared_ptr<gpu_device>> ranks, std::int32_t max_rows,
       std::int32_t num_cols, kernels::numerics mode, proto::AllReduce wanted);

  /// What libraries of GPUs read in the environment. Call it before any thread starts.
  static void prepare_environment();

  /// What a part of a model is loaded with: `load` is called with operations that place its
  /// weights in kept memory. `content` says which weights they are, and how they are kept: those of
  /// another content are not taken for them. Where a predecessor has left them nothing is copied.
  /// `load` is called again when what was left turns out to be incomplete. Of `kept_only`, errors:
  /// unavailable.
  using loading = std::function<expected<void>(std::shared_ptr<kernels::ops>)>;
  virtual expected<void> load(const std::string& actor, const std::string& content,
                              kernels::numerics mode, const gpu_rank& rank, weights_taken which,
                              const memory::activity& pulse, const loading& load) = 0;

  /// How operations that `load` was called with wait for this GPU. Keeps them.
  virtual device_waits waits_of(const std::shared_ptr<kernels::ops>& loaded) const = 0;
};

struct keeper_options {
  std::uint32_t device = 0;
  std::string address; ///< see memory::keeper_address
};

/// The life of a keeper process: returns the exit code, `exit_permanent` where there is no such
/// GPU.
int run_keeper(const keeper_options& options);

} // namespace troupe::actors
