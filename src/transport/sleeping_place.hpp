#pragma once

#include "troupe/base/error.hpp"
#include "troupe/base/unique_fd.hpp"

#include <chrono>

namespace troupe::transport {

/// What a thread of an endpoint sleeps on: UCX's descriptor, neighbours, and other threads of its
/// process.
class sleeping_place {
public:
  sleeping_place();

  /// Before the first sleep. `network` is UCX's descriptor, `bell` that of neighbours
  /// (doorbell.hpp) or -1. Fails with io_failed when descriptors have run out.
  expected<void> open(int network, int bell);

  /// Stops or begins to be woken by UCX. As it was: nothing happens.
  void watch_network(bool wakes);

  /// True if UCX may have something to do.
  bool sleep(std::chrono::milliseconds limit);

  /// Wakes who sleeps here, or who will do so next. On any thread.
  void wake();

private:
  unique_fd poll_;
  unique_fd wake_;
  int network_ = -1;
  int bell_ = -1;
  bool watches_network_ = true;
};

} // namespace troupe::transport
