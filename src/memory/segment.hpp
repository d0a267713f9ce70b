#pragma once

#include "troupe/base/error.hpp"
#include "troupe/base/unique_fd.hpp"

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace troupe::memory {

/// Shared memory that outlives the process that computes with it: the node creates it and
/// keeps the descriptor, a worker opens it through /proc and maps it. It has no name in the file
/// system, so that nothing is left behind however the processes end: the kernel frees it with its
/// last descriptor and mapping.
class segment {
public:
  /// New memory, zeroed; pages are taken from the system when first written.
  /// Fails with resource_exhausted.
  static expected<segment> create(const std::string& name, std::size_t bytes);

  /// The same, mapped, for a process that uses it itself beside those that attach.
  static expected<segment> create_mapped(const std::string& name, std::size_t bytes);

  /// Maps descriptor `fd` of process `pid`, which the caller may trace or which belongs to the same
  /// user. Fails with io_failed, naming both, when there is no such memory of `bytes`.
  static expected<segment> attach_from(std::uint32_t pid, int fd, std::size_t bytes);

  segment(segment&& other) noexcept;
  segment& operator=(segment&& other) noexcept;
  ~segment();

  int fd() const { return fd_.get(); }
  std::size_t size() const { return size_; }

  /// The mapping; empty for what `create` made, which its owner does not touch.
  std::span<std::byte> bytes() const { return {data_, data_ == nullptr ? 0 : size_}; }

private:
  segment(unique_fd fd, std::size_t size, std::byte* data);
  static expected<segment> map(unique_fd owned, std::size_t bytes);

  unique_fd fd_;
  std::size_t size_ = 0;
  std::byte* data_ = nullptr;
};

} // namespace troupe::memory
