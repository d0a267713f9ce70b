#pragma once

#include "troupe/base/error.hpp"
#include "troupe/memory/segment.hpp"

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace troupe::transport {

/// Bytes on their way from one process to another of the same host: a ring in shared memory with
/// one writer and one reader, as in L. Lamport, "Proving the Correctness of Multiprocess Programs"
/// (1977). The writer makes the memory, which lasts as long as one of them maps it. Neither side
/// waits; who has to wake whom is said here and done elsewhere (doorbell.hpp).
inline constexpr std::size_t ring_capacity = std::size_t{1} << 20;

class ring_writer {
public:
  /// Fails with resource_exhausted. `name` is for people who look at /proc.
  static expected<ring_writer> create(const std::string& name);

  /// Of the memory, for the reader's `attach`.
  int fd() const { return memory_.fd(); }

  /// A reader has come.
  bool is_attached() const;

  /// Copies as many of the first bytes as there is room for and returns how many these are. The
  /// reader sees them from `publish` on.
  std::size_t put(std::span<const std::byte> bytes);
  void publish();

  /// Asks to be woken when there is room. True: there is room already.
  bool ask_for_room();

  bool has_room() const { return room() != 0; }

private:
  explicit ring_writer(memory::segment mapped) : memory_(std::move(mapped)) {}
  std::size_t room() const;

  memory::segment memory_;
  std::uint64_t written_ = 0;
};

class ring_reader {
public:
  /// Maps the ring of process `pid` that is its descriptor `fd`, as the only reader. Fails as
  /// `memory::segment::attach_from` does.
  static expected<ring_reader> attach(std::uint32_t pid, int fd);

  /// There is something to read, or the ring is damaged.
  bool is_ready() const;

  /// The next bytes, as far as they lie together; empty: there are none. Valid until `release`,
  /// though a writer that breaks the rules may change them any time.
  std::span<const std::byte> next();

  /// The first `count` of `next` have been read.
  void take(std::size_t count) { read_ += count; }

  /// Gives the room of what has been read back. True: the writer waits for room.
  bool release();

  /// More seems to be written than a ring holds: nothing that is read can be trusted.
  bool is_damaged() const { return is_damaged_; }

private:
  explicit ring_reader(memory::segment mapped) : memory_(std::move(mapped)) {}

  memory::segment memory_;
  std::uint64_t read_ = 0;
  bool is_damaged_ = false;
};

} // namespace troupe::transport
