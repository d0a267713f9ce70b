#include "troupe/transport/ring.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

namespace troupe::transport {

namespace {

/// In front of the bytes; each side writes to cache lines of its own. Counts never go back: a place
/// is a count modulo the capacity.
struct head {
  alignas(64) std::atomic<std::uint64_t> written;
  std::atomic<std::uint32_t> writer_waits;
  alignas(64) std::atomic<std::uint64_t> read;
  std::atomic<std::uint32_t> is_attached;
};
static_assert(std::atomic<std::uint64_t>::is_always_lock_free);

constexpr std::size_t head_bytes = 128;
static_assert(sizeof(head) <= head_bytes && (ring_capacity & (ring_capacity - 1)) == 0);

constexpr std::size_t memory_bytes = head_bytes + ring_capacity;

head& head_of(const memory::segment& memory) {
  return *reinterpret_cast<head*>(memory.bytes().data());
}

std::span<std::byte> from(const memory::segment& memory, std::uint64_t count) {
  const std::size_t place = count & (ring_capacity - 1);
  return memory.bytes().subspan(head_bytes + place, ring_capacity - place);
}

} // namespace

expected<ring_writer> ring_writer::create(const std::string& name) {
  auto made = memory::segment::create_mapped(name, memory_bytes);
  if (!made)
    return tl::unexpected(std::move(made).error());
  return ring_writer{std::move(*made)};
}

bool ring_writer::is_attached() const {
  return head_of(memory_).is_attached.load(std::memory_order_acquire) != 0;
}

std::size_t ring_writer::room() const {
  const auto used = written_ - head_of(memory_).read.load(std::memory_order_seq_cst);
  return used <= ring_capacity ? ring_capacity - used : 0;
}

std::size_t ring_writer::put(std::span<const std::byte> bytes) {
  const std::size_t count = std::min(bytes.size(), room());
  for (std::size_t done = 0; done < count;) {
    const auto target = from(memory_, written_);
    const std::size_t part = std::min(count - done, target.size());
    std::memcpy(target.data(), bytes.data() + done, part);
    done += part;
    written_ += part;
  }
  return count;
}

void ring_writer::publish() {
  head_of(memory_).written.store(written_, std::memory_order_seq_cst);
}

bool ring_writer::ask_for_room() {
  auto& shared = head_of(memory_);
  shared.writer_waits.store(1, std::memory_order_seq_cst);
  if (!has_room())
    return false;
  shared.writer_waits.store(0, std::memory_order_relaxed);
  return true;
}

expected<ring_reader> ring_reader::attach(std::uint32_t pid, int fd) {
  auto mapped = memory::segment::attach_from(pid, fd, memory_bytes);
  if (!mapped)
    return tl::unexpected(std::move(mapped).error());
  ring_reader result{std::move(*mapped)};
  head_of(result.memory_).is_attached.store(1, std::memory_order_release);
  return result;
}

bool ring_reader::is_ready() const {
  return head_of(memory_).written.load(std::memory_order_seq_cst) != read_;
}

std::span<const std::byte> ring_reader::next() {
  const auto count = head_of(memory_).written.load(std::memory_order_acquire) - read_;
  if (count > ring_capacity)
    is_damaged_ = true;
  if (is_damaged_)
    return {};
  const auto bytes = from(memory_, read_);
  return bytes.first(std::min<std::size_t>(count, bytes.size()));
}

bool ring_reader::release() {
  auto& shared = head_of(memory_);
  shared.read.store(read_, std::memory_order_seq_cst);
  return shared.writer_waits.load(std::memory_order_seq_cst) != 0
         && shared.writer_waits.exchange(0) != 0;
}

} // namespace troupe::transport
