#pragma once

#include <chrono>
#include <functional>
#include <optional>
#include <string>
#include <string_view>

#include "troupe/base/error.hpp"
#include "troupe/http/message.hpp"

namespace troupe::http {

/// A request of a command line tool or a test.
struct client_request {
  std::string method = "GET";
  std::string url;     ///< "http://host[:port]/path?query"
  header_list headers; ///< Host, Content-Length and Connection are added
  std::string body;
};

struct client_response {
  int status = 0;
  header_list headers;
  std::string body;
  bool complete = true; ///< false when `on_piece` gave up before the end of the body

  /// The value of the first field called `name`, or nothing.
  std::optional<std::string_view> header(std::string_view name) const;
};

struct client_timeouts {
  std::chrono::milliseconds connect{5'000};
  std::chrono::milliseconds silence{60'000}; ///< longest wait for the next bytes
};

/// Receives the body piece by piece as it arrives; false gives up and closes the
/// connection. Also called with an empty piece when a signal interrupted the
/// wait, so that a tool can react to Ctrl-C.
using piece_handler = std::function<bool(std::string_view piece)>;

/// Sends one request over a new connection and waits for the whole answer, at
/// most `deadline` in all (name resolution excepted, which has the system's own
/// limits). Any status is a success. Each error names host and port:
/// invalid_request (the URL), unavailable (refused, unknown host),
/// deadline_exceeded, peer_lost (closed or reset before the end, or not HTTP),
/// too_large (a body over 64 MiB), io_failed. Blocks the calling thread.
expected<client_response> fetch(const client_request& what, std::chrono::milliseconds deadline);

/// The same with the body given to `on_piece` as it arrives, if the status is
/// 2xx; the body of any other status is in the result.
expected<client_response> fetch_stream(const client_request& what, client_timeouts timeouts,
                                       const piece_handler& on_piece);

} // namespace troupe::http
