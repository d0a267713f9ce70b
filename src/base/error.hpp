#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include <tl/expected.hpp>

namespace troupe {

/// What went wrong, as far as somebody can react to it. Grouped by the largest
/// thing that has to be rebuilt, smallest first.
enum class error_code : std::uint8_t {
  none = 0,
  // The request is at fault or is given up; nothing else is touched.
  invalid_request = 1,   ///< the client sent something that cannot be served (HTTP 400)
  not_found = 2,         ///< an unknown model, request, file or route (HTTP 404)
  too_large = 3,         ///< a body or prompt over its limit (HTTP 413 or 400)
  overloaded = 4,        ///< a bounded queue is full; try again later (HTTP 503)
  deadline_exceeded = 5, ///< the work did not end in its time (HTTP 504)
  cancelled = 6,         ///< the requester went away
  // A connection is gone.
  peer_lost = 20,   ///< the process at the other end died or was cut off
  stale_epoch = 21, ///< the sender belongs to an older epoch and is fenced off
  // A process cannot go on, or cannot start.
  unavailable = 40,        ///< the service is starting, recovering or stopping (HTTP 503)
  resource_exhausted = 41, ///< memory, ports or descriptors ran out
  io_failed = 42,          ///< a system call failed; the cause holds errno's text
  internal = 43,           ///< an invariant of ours broke
  // The cluster as configured cannot run at all: restarting does not help.
  invalid_config = 60, ///< the config file is wrong
  invalid_model = 61,  ///< the model directory is wrong or damaged
};

/// Lower-case name of a code, as written in logs and JSON ("invalid_config").
std::string_view to_string(error_code code);

/// True when trying the same again can never succeed, so that a supervisor
/// gives up at once instead of spending its restarts.
bool is_permanent(error_code code);

/// A failure as a value: who noticed it, why it happened and what would help.
struct error {
  error_code code = error_code::internal;
  std::string
    cause; ///< one sentence; names the culprit (file, line, key, peer) and the offending value
  std::string cure;   ///< what the reader can do; may be empty
  std::string origin; ///< "host/process/actor" where the error was decided; filled by `fail`

  /// "cause (cure) [code, at origin]", for terminals and logs.
  std::string text() const;
};

template <class T>
using expected = tl::expected<T, error>;

/// Makes an error of this process, to be returned from a function of type
/// `expected<T>`. The origin is this process's identity (see identity.hpp).
tl::unexpected<error> fail(error_code code, std::string cause, std::string cure = {});

} // namespace troupe
