#pragma once

#include "troupe/base/error.hpp"
#include "troupe/base/unique_fd.hpp"
#include "troupe/memory/segment.hpp"

#include <array>
#include <cstdint>
#include <utility>

#include <transport.pb.h>

namespace troupe::transport {

/// Who of a process is asleep and wants to be woken when something comes to its rings.
enum class listener : std::uint32_t { nobody = 0, background = 1, foreground = 2 };

/// By which processes of the same host wake this one: memory that says who listens, and a pipe for
/// each who may. As long as nobody sleeps, a neighbour that has left something makes no system
/// call. Both are opened through /proc, so that nothing is left behind in the file system.
class doorbell {
public:
  /// Fails with resource_exhausted or io_failed.
  static expected<doorbell> open();

  /// What neighbours need to open it.
  const proto::HostPlace& place() const { return place_; }

  /// Readable when `who` was rung for.
  int fd(listener who) const;

  /// From now on neighbours ring for `who`, once. Whoever sleeps looks at its rings once more after
  /// this.
  void listen(listener who);
  void hush() { listen(listener::nobody); }

private:
  explicit doorbell(memory::segment mapped) : memory_(std::move(mapped)) {}

  memory::segment memory_;
  std::array<unique_fd, 2> read_ends_;
  std::array<unique_fd, 2> write_ends_;
  proto::HostPlace place_;
};

/// Another process of this host, as far as it has to be woken.
class neighbour {
public:
  /// Fails with not_found where the process is not of this host, or of another user or container.
  static expected<neighbour> open(const proto::HostPlace& place);

  std::uint32_t pid() const { return pid_; }

  /// Wakes who listens there, if anybody does.
  void ring();

private:
  explicit neighbour(memory::segment mapped) : memory_(std::move(mapped)) {}

  memory::segment memory_;
  std::array<unique_fd, 2> bells_;
  std::uint32_t pid_ = 0;
};

} // namespace troupe::transport
