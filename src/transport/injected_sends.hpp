#pragma once

#include "troupe/base/fault_point.hpp"
#include "troupe/transport/send_operation.hpp"

#include <chrono>
#include <memory>
#include <optional>
#include <vector>

namespace troupe::transport {

/// What a drill does to frames that leave. Used by the thread that drives the endpoint, blocks
/// nothing.
class injected_sends {
public:
  using time_point = std::chrono::steady_clock::time_point;
  using operation_ptr = std::unique_ptr<send_operation>;

  /// A frame held back for `reorder` goes out after this even if none follows it.
  static constexpr std::chrono::milliseconds longest_hold{50};

  /// Takes a frame that is to leave; what goes out for it now stands in `ready()`.
  void take(operation_ptr operation, std::optional<faults::fault> what, time_point now);

  /// Moves to `ready()` what has been held back long enough.
  void release_due(time_point now);

  /// Frames that go out now, in order; the caller empties it.
  std::vector<operation_ptr>& ready() { return ready_; }

  bool is_idle() const { return held_.empty(); }

private:
  struct held_operation {
    operation_ptr operation;
    time_point due;
    bool until_next = false; ///< goes out behind the next frame to the same peer
  };

  void release_followers(const std::string& peer);

  std::vector<held_operation> held_;
  std::vector<operation_ptr> ready_;
};

} // namespace troupe::transport
