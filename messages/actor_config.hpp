#pragma once

#include <cstdint>

#include <caf/actor_system_config.hpp>

namespace troupe::messages {

/// How a process sets up its actor system. Every process registers the same message types, so
/// that no message arrives empty because one side did not know it.
struct actor_config : caf::actor_system_config {
  /// `num_threads` event-based actors may run at once. Peers are given up after
  /// `timeout_ms` without a sign of life, asked for every `heartbeat_ms`.
  actor_config(std::uint32_t num_threads, std::uint32_t heartbeat_ms, std::uint32_t timeout_ms);

  /// A set-up for tests: the deterministic scheduler, no network.
  struct deterministic_tag {};
  explicit actor_config(deterministic_tag);

private:
  void add_types();
};

} // namespace troupe::messages
