#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "troupe/kernels/cuda/shared_memory.hpp"
#include "troupe/kernels/cuda/sum_transport.hpp"
#include "troupe/kernels/ops.hpp"

/// What a GPU offers beyond `ops`. This header needs no CUDA toolkit, so code that is built
/// without one can name the types; the functions exist where TROUPE_HAS_CUDA is defined.
namespace troupe::kernels::cuda {

/// Number of GPUs that this process can use; 0 where there is no driver.
std::int32_t num_devices();

/// Where a GPU is plugged in ("0000:1b:00.0"), by which other programs know it; empty: not known.
std::string pci_bus_id(std::int32_t device);

struct device_memory {
  std::size_t free_bytes = 0;
  std::size_t total_bytes = 0;
};

/// Of a GPU as it is now, whoever uses it.
device_memory memory_of(std::int32_t device);

/// How rows are that were fetched from a block. `gone`: the block did not hold the rows of this
/// ticket until the copy was done, or the GPU failed; what arrived may be anything.
enum class fetched_rows : std::uint8_t { whole, gone, not_finite };

/// Operations on one GPU: bfloat16 activations and pages, or float32 with exact numerics, and
/// float32 accumulation. Work is queued on one stream of the object; what an operation writes to
/// host memory is there when it returns, everything else is only queued. An object is used by one
/// thread at a time.
///
/// Weights of 16, 8 and 4 bit stay as wide as they are stored and are expanded in registers.
/// Float32 and float16 weights of products are rounded to bfloat16 when they are placed, but not
/// with exact numerics, which round no weight that is not to be kept in 8 bit.
///
/// When the GPU fails, the first failure is kept (`failure`), further operations do nothing,
/// `all_finite` says no and `sample` gives token -1: the process has to be replaced.
class gpu_ops : public ops {
public:
  /// Waits for everything that was queued.
  virtual void synchronise() = 0;

  /// The wait for the GPU that is under way, each with another number; 0: there is none. For any
  /// thread to look at.
  virtual const std::atomic<std::uint64_t>& current_wait() const = 0;

  /// The longest wait for the GPU since the last call.
  virtual std::chrono::nanoseconds take_longest_wait() = 0;

  virtual device_memory memory() const = 0;

  /// Memory was asked for that the GPU did not have, whatever became of it.
  virtual bool has_run_out() const = 0;

  /// Calls of `step` that repeated what an earlier one had recorded. TROUPE_CUDA_GRAPHS=off in the
  /// environment keeps an object from recording.
  virtual std::uint64_t num_repeated_steps() const = 0;

  /// The CUDA stream (cudaStream_t) on which everything is queued.
  virtual void* stream() const = 0;

  /// Leaves rows for another process at `offset` of `block`, memory of this GPU that begins with a
  /// number: rows with tickets below it are gone. The number is raised to `oldest` before anything
  /// is overwritten. The rows are there when it returns.
  virtual void leave_rows(const rows_view& from, std::uint64_t oldest, void* block,
                          std::size_t offset) = 0;

  /// Copies such rows from a block of this GPU or of another that it can read, and says how they
  /// are: `all_finite` is included.
  virtual fetched_rows fetch_rows(const void* block, std::size_t offset, std::uint64_t ticket,
                                  const rows_view& to) = 0;
};

/// What the ranks of a tensor-parallel group on GPUs share: what carries rows from one to the
/// other, and who has waited for whom in vain. The first rank that waits for another beyond the
/// deadline ends the group: `failure` of every rank says so, and nothing waits any more.
class gpu_rank_group {
public:
  virtual ~gpu_rank_group() = default;
  virtual std::int32_t size() const = 0;
  virtual sum_transport transport() const = 0;
};

/// What NCCL is told by the environment, unless somebody has told it otherwise. Call it before any
/// thread starts, in processes that may make a group.
void prepare_environment();

/// A group whose rank r computes on devices[r]; ranks may share a GPU, which is of use for tests
/// alone. max_rows x num_cols: the largest rows that `all_reduce` is given as a rule; larger ones
/// are added up in several parts. The deadline is for the time from when one rank comes to when the
/// last one does. `automatic` is decided here (choose_transport); the bits are the same with each.
/// `mode` is that of the operations, whose rows are twice as wide where they are exact. Null with
/// the cause in `error`: where NCCL is asked for, also when its library is not there.
std::shared_ptr<gpu_rank_group> make_gpu_rank_group(
  std::span<const std::int32_t> devices, std::int32_t max_rows, std::int32_t num_cols,
  std::string& error, std::chrono::milliseconds deadline = std::chrono::seconds(2),
  sum_transport transport = sum_transport::automatic, numerics mode = numerics::fast);

/// Opens a GPU. Null where that fails, with the cause in `error`. `progress`, which outlives the
/// object, is counted up with every operation and every wait that ended. Weights are placed in
/// memory of this process, or in `weights` if that is given. With a group it computes together
/// with the group's other members, as the one of this rank; each rank is used by a thread of its
/// own, and there is one object a rank at a time.
std::unique_ptr<gpu_ops> make_cuda_ops(std::int32_t device, std::string& error,
                                       std::atomic<std::uint64_t>* progress = nullptr,
                                       std::shared_ptr<weight_memory> weights = nullptr,
                                       std::shared_ptr<gpu_rank_group> group = nullptr,
                                       std::int32_t rank = 0, numerics mode = numerics::fast);

} // namespace troupe::kernels::cuda
