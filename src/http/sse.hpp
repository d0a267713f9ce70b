#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "troupe/base/error.hpp"

namespace troupe::http {

/// Appends one server-sent event that carries `data` to `out`: a "data: " line
/// for each line of it, then an empty line (WHATWG HTML, section 9.2).
void append_sse(std::string& out, std::string_view data);

/// The same as a new string.
std::string sse_frame(std::string_view data);

/// One event as a client sees it.
struct sse_event {
  std::string event; ///< the event's type; empty means "message"
  std::string data;  ///< its data lines, joined with '\n'
  std::string id;    ///< the last event id seen so far

  bool operator==(const sse_event&) const = default;
};

/// Incremental parser of an event stream (WHATWG HTML, section 9.2.6): pieces
/// may be cut anywhere, also between the two bytes of a line end. Comments and
/// "retry" are ignored. For use by one thread.
class sse_parser {
public:
  /// An event may have at most `max_event_bytes` bytes, lines included.
  explicit sse_parser(std::size_t max_event_bytes = std::size_t{16} << 20);

  /// Takes the next piece of the stream and returns the events that it
  /// completes, in order. Fails with too_large when one event outgrows the
  /// limit; the parser is of no use after that.
  expected<std::vector<sse_event>> feed(std::string_view piece);

private:
  void end_line(std::vector<sse_event>& events);

  std::size_t max_event_bytes_;
  std::string line_;
  std::string data_;
  std::string event_;
  std::string id_;
  bool has_data_ = false;
  bool after_cr_ = false; // a '\n' that comes next belongs to the same line end
  bool first_line_ = true;
};

} // namespace troupe::http
