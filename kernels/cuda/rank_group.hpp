#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "troupe/kernels/cuda/pieces.hpp"
#include "troupe/kernels/cuda/summing_group.hpp"

/// The sum of rows over the GPUs of one process (rank_group.cu).
namespace troupe::kernels::cuda {

/// How parts reach the other ranks. Every element is the float32 sum of its parts in order of
/// ranks, rounded once where elements are shorter, so all ways give the same bits.
enum class exchange_way : std::uint8_t {
  best,
  /// Every rank writes its rows to every other, each 8 bytes with a number that says of which call
  /// they are; who reads polls the data itself. One way over the wire, twice the bytes: the LL
  /// protocol of NCCL ("Demystifying NCCL", arXiv 2507.04786).
  few,
  /// By chunks with a flag each. Two ranks write all they have to each other; more of them write
  /// each chunk to the one that adds it up, which writes the sum to all (reduce-scatter and
  /// all-gather, (n - 1) / n of the bytes each; Rabenseifner, ICCS 2004).
  many,
};

/// What starts the exchange memory of a rank. The kernels count calls there, so that a call can be
/// recorded in a graph.
struct exchange_control {
  std::uint32_t sequence = 0; ///< of the last call; each has its own number, 0 is none
  std::uint32_t arrived = 0;  ///< blocks of this call that know its number
  std::uint32_t broken = 0;   ///< a note (see rank_view): nobody waits any more
  std::uint32_t unused = 0;
};

/// The exchange memory of a rank, in bytes. Rows travel in pieces of 16 bytes. All there is exists
/// twice, for calls of even and of odd numbers: a rank that writes for one call has the other
/// ranks' data of the call before, so they have done with the call before that.
struct exchange_layout {
  std::int32_t num_ranks = 0;
  std::uint32_t most_few = 0;  ///< pieces of one call
  std::uint32_t most_many = 0; ///< likewise

  static constexpr std::uint32_t kSmallChunk = 512;     ///< pieces
  static constexpr std::uint32_t kLargeChunk = 512 * 2; ///< pieces

  constexpr std::size_t num_chunks() const { return most_many / kSmallChunk + 1 + kMostRanks; }
  /// Pieces that one rank adds up of another's.
  constexpr std::size_t share() const { return most_many / num_ranks + 2 * kLargeChunk; }

  /// What `from` writes here in the `few` way: two lines of 16 bytes a piece.
  constexpr std::size_t lines(std::uint32_t parity, std::int32_t from) const {
    return 4096 + (std::size_t{parity} * num_ranks + from) * most_few * 32;
  }
  /// A number for each chunk of `from`.
  constexpr std::size_t part_flags(std::uint32_t parity, std::int32_t from) const {
    return lines(2, 0) + (std::size_t{parity} * num_ranks + from) * num_chunks() * 4;
  }
  /// A number for each chunk that somebody has added up.
  constexpr std::size_t sum_flags(std::uint32_t parity) const {
    return part_flags(2, 0) + parity * num_chunks() * 4;
  }
  /// What `from` writes here in the `many` way. Of two ranks everything, otherwise this rank's
  /// chunks.
  constexpr std::size_t parts(std::uint32_t parity, std::int32_t from) const {
    const std::size_t begin = (sum_flags(2) + 255) / 256 * 256;
    return num_ranks == 2 ? begin + std::size_t{parity} * most_many * 16
                          : begin + (std::size_t{parity} * num_ranks + from) * share() * 16;
  }
  /// Chunks that others have added up, of more than two ranks.
  constexpr std::size_t sums(std::uint32_t parity) const {
    return parts(2, 0) + std::size_t{parity} * most_many * 16;
  }
  constexpr std::size_t num_bytes() const { return num_ranks == 2 ? parts(2, 0) : sums(2); }
};

/// What a kernel of one rank knows.
struct rank_view {
  exchange_layout layout;
  std::int32_t rank = 0;
  std::byte* memory[kMostRanks] = {}; ///< of every rank
  /// Host memory: 0, or who has given up (rank + 1, in the second byte) and whom it has waited for
  /// (likewise, in the first).
  std::uint32_t* note = nullptr;
  std::uint64_t deadline_ns = 0;
};

/// A group that exchanges rows by peer memory.
class rank_group final : public summing_group {
public:
  /// num_cols counts elements of 16 bit; those of 32 bit count twice.
  static std::shared_ptr<rank_group> make(std::span<const std::int32_t> devices,
                                          std::int32_t max_rows, std::int32_t num_cols,
                                          std::chrono::milliseconds deadline, std::string& error);

  std::int32_t size() const override { return static_cast<std::int32_t>(devices_.size()); }
  sum_transport transport() const override { return sum_transport::peer; }
  std::int32_t device(std::int32_t rank) const override { return devices_[rank]; }

  bool add_up(cudaStream_t stream, std::int32_t rank, const rows_of<bf16>& x) override {
    return add_up(stream, rank, x, exchange_way::best);
  }
  bool add_up(cudaStream_t stream, std::int32_t rank, const rows_of<float>& x) override {
    return add_up(stream, rank, x, exchange_way::best);
  }
  template <class T>
  bool add_up(cudaStream_t stream, std::int32_t rank, const rows_of<T>& x, exchange_way way) const;

  /// Whether a kernel of this rank has waited in vain.
  bool has_failed(std::int32_t rank) const override { return read_note(rank) != 0; }
  std::string failure(std::int32_t rank) const override;
  /// Others find out, since they write to that GPU.
  void give_up(std::int32_t, const std::string&) override {}

private:
  rank_group() = default;
  std::uint32_t read_note(std::int32_t rank) const;

  std::vector<std::int32_t> devices_;
  std::chrono::milliseconds deadline_{};
  std::vector<std::shared_ptr<std::byte>> memory_;
  std::shared_ptr<std::uint32_t> notes_; ///< one a rank
  exchange_layout layout_;
  std::int32_t most_few_blocks_ = 0; ///< that run at the same time, beside those of other ranks
  std::int32_t most_many_blocks_ = 0;
};

/// Threads of a block of either way.
inline constexpr std::int32_t kFewThreads = 128;
inline constexpr std::int32_t kManyThreads = 512;

/// Loads the kernels on the current device, since loading may wait for kernels that wait for each
/// other, and says how many blocks of each way run on one multiprocessor.
cudaError_t load_exchange(std::int32_t num_ranks, std::int32_t& few_blocks,
                          std::int32_t& many_blocks);

/// A call of one rank. All ranks make it with the same number of pieces, in the same way.
template <class T>
void launch_few(cudaStream_t stream, const rank_view& group, const pieces_of_rows<T>& x);
template <class T>
void launch_many(cudaStream_t stream, const rank_view& group, const pieces_of_rows<T>& x,
                 std::int32_t most_blocks);

} // namespace troupe::kernels::cuda
