#pragma once

#include "troupe/base/error.hpp"
#include "troupe/base/unique_fd.hpp"

#include <chrono>
#include <cstdint>
#include <utility>

namespace troupe {

/// The pipe through which a child tells its parent that it has started, and on which port, or
/// why it could not.
class startup_pipe {
public:
  /// Fails with resource_exhausted.
  static expected<startup_pipe> open();

  /// The end that the child inherits.
  int child_fd() const { return write_end_.get(); }

  /// Waits for the child's word. Call after spawning. Fails with the child's own error,
  /// unavailable when it ended without a word, or deadline_exceeded.
  expected<std::uint16_t> wait(std::chrono::milliseconds patience);

private:
  unique_fd read_end_;
  unique_fd write_end_;
};

/// The child's side: says that it has started. `fd` < 0 says nothing. Closes the descriptor.
void report_started(int fd, std::uint16_t port);

/// Says why it has not.
void report_not_started(int fd, const error& why);

} // namespace troupe
