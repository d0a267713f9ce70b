#pragma once

#include "troupe/base/child_processes.hpp"
#include "troupe/base/error.hpp"
#include "troupe/schedule/replica_scheduler.hpp"

#include <chrono>
#include <memory>
#include <utility>
#include <vector>

#include <caf/all.hpp>

/// Messages between actors of one process. They hold pointers and never leave it.
namespace troupe::actors {

/// A timer went off.
using tick_atom = caf::atom_constant<caf::atom("tick")>;

/// Try again to connect.
using redial_atom = caf::atom_constant<caf::atom("redial")>;

/// Begin: connect to whoever is above.
using start_atom = caf::atom_constant<caf::atom("start")>;

/// Ends the actor in good order.
using stop_atom = caf::atom_constant<caf::atom("stop")>;

/// The pulse asks whether the actor still answers; see memory::pulse.
using knock_atom = caf::atom_constant<caf::atom("knock")>;

/// Gives up a request.
using cancel_atom = caf::atom_constant<caf::atom("cancel")>;

/// gateway -> scheduler.
using submission = std::shared_ptr<schedule::request>;

/// scheduler -> gateway: what a step brought, for all requests of the replica.
struct progress {
  std::uint32_t replica = 0;
  std::vector<schedule::token_event> events;
  std::vector<std::pair<schedule::request_id, error>>
    errors; ///< why requests failed; each has ended
};
using progress_ptr = std::shared_ptr<const progress>;

/// scheduler -> gateway, every now and then: for health, metrics and the choice of a replica.
struct replica_report {
  std::uint32_t replica = 0;
  bool serving = false; ///< every stage and expert group runs and is connected
  schedule::counters counters;
  schedule::time_point last_progress; ///< when a step completed or there was nothing to do
};

} // namespace troupe::actors

CAF_ALLOW_UNSAFE_MESSAGE_TYPE(troupe::child_exit)
CAF_ALLOW_UNSAFE_MESSAGE_TYPE(troupe::actors::submission)
CAF_ALLOW_UNSAFE_MESSAGE_TYPE(troupe::actors::progress_ptr)
CAF_ALLOW_UNSAFE_MESSAGE_TYPE(troupe::actors::replica_report)
