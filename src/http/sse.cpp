#include "troupe/http/sse.hpp"

#include <utility>

#include <fmt/format.h>

namespace troupe::http {

void append_sse(std::string& out, std::string_view data) {
  for (;;) {
    const auto end = data.find_first_of("\r\n");
    out.append("data: ").append(data.substr(0, end)).push_back('\n');
    if (end == data.npos)
      break;
    data.remove_prefix(end + (data.substr(end, 2) == "\r\n" ? 2 : 1));
  }
  out.push_back('\n');
}

std::string sse_frame(std::string_view data) {
  std::string out;
  out.reserve(data.size() + 8);
  append_sse(out, data);
  return out;
}

sse_parser::sse_parser(std::size_t max_event_bytes) : max_event_bytes_(max_event_bytes) {}

expected<std::vector<sse_event>> sse_parser::feed(std::string_view piece) {
  std::vector<sse_event> events;
  while (!piece.empty()) {
    if (std::exchange(after_cr_, false) && piece.front() == '\n') {
      piece.remove_prefix(1);
      continue;
    }
    const auto end = piece.find_first_of("\r\n");
    line_.append(piece.substr(0, end));
    if (line_.size() + data_.size() + event_.size() > max_event_bytes_)
      return fail(error_code::too_large,
                  fmt::format("a server-sent event is longer than {} bytes", max_event_bytes_),
                  "raise the parser's limit if events of this size are expected");
    if (end == piece.npos)
      break;
    after_cr_ = piece[end] == '\r';
    piece.remove_prefix(end + 1);
    end_line(events);
  }
  return events;
}

void sse_parser::end_line(std::vector<sse_event>& events) {
  std::string_view line = line_;
  if (std::exchange(first_line_, false) && line.substr(0, 3) == "\xEF\xBB\xBF")
    line.remove_prefix(3);
  if (line.empty()) {
    // An event without any data line is dropped, its type with it.
    if (has_data_)
      events.push_back({std::move(event_), std::move(data_), id_});
    event_.clear();
    data_.clear();
    has_data_ = false;
  } else {
    const auto colon = line.find(':');
    const auto field = line.substr(0, colon);
    auto value = colon == line.npos ? std::string_view{} : line.substr(colon + 1);
    if (!value.empty() && value.front() == ' ')
      value.remove_prefix(1);
    if (field == "data") {
      if (std::exchange(has_data_, true))
        data_.push_back('\n');
      data_.append(value);
    } else if (field == "event") {
      event_.assign(value);
    } else if (field == "id" && value.find('\0') == value.npos) {
      id_.assign(value);
    }
  }
  line_.clear();
}

} // namespace troupe::http
