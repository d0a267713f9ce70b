#include "troupe/transport/buffer_pool.hpp"

#include "troupe/base/fault_point.hpp"

#include <array>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <utility>
#include <vector>

#include <fmt/format.h>

namespace troupe::transport {

namespace {

constexpr std::size_t smallest_block = 4096;
constexpr std::size_t largest_block = std::size_t{1} << 40;
constexpr std::size_t classes_per_doubling = 4;

struct size_class {
  std::size_t index;
  std::size_t block_size;
};

/// Four classes to a doubling: with p the power of two that holds `size`, blocks
/// are 5/8, 6/8, 7/8 and 8/8 of p. Requires size <= largest_block.
size_class class_of(std::size_t size) {
  if (size <= smallest_block)
    return {0, smallest_block};
  const std::size_t power = std::bit_ceil(size);
  const std::size_t step = power / (2 * classes_per_doubling);
  const std::size_t steps = (size + step - 1) / step; // 5..8
  const auto doubling = static_cast<std::size_t>(std::countr_zero(power / smallest_block) - 1);
  return {1 + doubling * classes_per_doubling + steps - (classes_per_doubling + 1), steps * step};
}

constexpr std::size_t num_classes =
  1 + classes_per_doubling * std::countr_zero(largest_block / smallest_block);

} // namespace

namespace detail {

class pool_state {
public:
  explicit pool_state(std::size_t max_cached_bytes) : max_cached_bytes_(max_cached_bytes) {}

  ~pool_state() {
    for (auto& idle : classes_)
      for (auto* block : idle.blocks)
        std::free(block);
  }

  std::byte* take(std::size_t size) {
    const auto wanted = class_of(size);
    {
      std::lock_guard guard{mutex_};
      auto& idle = classes_[wanted.index];
      idle.last_used = ++clock_;
      if (!idle.blocks.empty()) {
        auto* block = idle.blocks.back();
        idle.blocks.pop_back();
        cached_bytes_ -= wanted.block_size;
        return block;
      }
    }
    return static_cast<std::byte*>(std::aligned_alloc(buffer_pool::alignment, wanted.block_size));
  }

  void give_back(std::byte* block, std::size_t size) {
    const auto own = class_of(size);
    std::vector<std::byte*> surplus; // freed without the lock: munmap of a large block takes long
    {
      std::lock_guard guard{mutex_};
      while (cached_bytes_ + own.block_size > max_cached_bytes_
             && evict_before(own.index, surplus)) {
      }
      if (cached_bytes_ + own.block_size <= max_cached_bytes_) {
        auto& idle = classes_[own.index];
        idle.block_size = own.block_size;
        idle.blocks.push_back(block);
        cached_bytes_ += own.block_size;
      } else {
        surplus.push_back(block);
      }
    }
    for (auto* each : surplus)
      std::free(each);
  }

  std::size_t cached_bytes() const {
    std::lock_guard guard{mutex_};
    return cached_bytes_;
  }

private:
  struct idle_blocks {
    std::vector<std::byte*> blocks;
    std::size_t block_size = 0;
    std::uint64_t last_used = 0;
  };

  /// Moves one block of the class that was asked for longest ago into `surplus`, unless
  /// that is class `own` itself: sizes no longer in use make room for those that are.
  bool evict_before(std::size_t own, std::vector<std::byte*>& surplus) {
    idle_blocks* oldest = nullptr;
    for (auto& each : classes_)
      if (!each.blocks.empty() && (oldest == nullptr || each.last_used < oldest->last_used))
        oldest = &each;
    if (oldest == nullptr || oldest->last_used >= classes_[own].last_used)
      return false;
    surplus.push_back(oldest->blocks.back());
    oldest->blocks.pop_back();
    cached_bytes_ -= oldest->block_size;
    return true;
  }

  mutable std::mutex mutex_;
  std::array<idle_blocks, num_classes> classes_;
  const std::size_t max_cached_bytes_;
  std::size_t cached_bytes_ = 0;
  std::uint64_t clock_ = 0;
};

} // namespace detail

buffer::buffer(buffer&& other) noexcept
  : pool_(std::move(other.pool_)),
    data_(std::exchange(other.data_, nullptr)),
    size_(std::exchange(other.size_, 0)) {}

buffer& buffer::operator=(buffer&& other) noexcept {
  std::swap(pool_, other.pool_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

buffer::~buffer() {
  if (data_ != nullptr)
    pool_->give_back(data_, size_);
}

buffer_pool::buffer_pool(std::size_t max_cached_bytes)
  : state_(std::make_shared<detail::pool_state>(max_cached_bytes)) {}

expected<buffer> buffer_pool::take(std::size_t size) {
  buffer result;
  if (size == 0)
    return result;
  auto fault = faults::hit(faults::point::allocation);
  bool fails = fault && fault->what == faults::kind::fail;
  if (size <= largest_block && !fails)
    result.data_ = state_->take(size);
  if (result.data_ == nullptr)
    return fail(error_code::resource_exhausted,
                fmt::format("cannot allocate a buffer of {} bytes for a frame", size),
                "give the process more memory or send smaller micro-batches");
  result.pool_ = state_;
  result.size_ = size;
  return result;
}

std::size_t buffer_pool::cached_bytes() const {
  return state_->cached_bytes();
}

} // namespace troupe::transport
