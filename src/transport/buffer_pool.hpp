#pragma once

#include "troupe/base/error.hpp"

#include <cstddef>
#include <memory>
#include <span>

namespace troupe::transport {

class buffer_pool;

namespace detail {
class pool_state;
}

/// A block of host memory on loan from a buffer_pool: 64-byte aligned, content
/// undefined at first. It goes back to its pool on destruction, from any thread,
/// and may outlive the pool. Movable; share it as std::shared_ptr<buffer>.
class buffer {
public:
  buffer() = default;
  buffer(buffer&& other) noexcept;
  buffer& operator=(buffer&& other) noexcept;
  ~buffer();

  std::byte* data() { return data_; }
  const std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  std::span<std::byte> bytes() { return {data_, size_}; }
  std::span<const std::byte> bytes() const { return {data_, size_}; }

private:
  friend class buffer_pool;

  std::shared_ptr<detail::pool_state> pool_;
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

/// Keeps returned blocks in size classes (four to each doubling, so at most a quarter
/// of a block is slack) and hands them out again, so that frames of the usual
/// sizes cost neither an allocation nor page faults. A handle: copies share the pool.
/// Every function may be called on any thread.
class buffer_pool {
public:
  static constexpr std::size_t alignment = 64;

  /// `max_cached_bytes` bounds what lies idle in the pool, not what is on loan.
  explicit buffer_pool(std::size_t max_cached_bytes);

  /// Lends `size` bytes; zero gives an empty buffer without memory.
  /// Fails with resource_exhausted.
  expected<buffer> take(std::size_t size);

  /// Bytes that lie idle, ready to be lent.
  std::size_t cached_bytes() const;

private:
  std::shared_ptr<detail::pool_state> state_;
};

} // namespace troupe::transport
