#pragma once

#include "troupe/base/error.hpp"

#include <chrono>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace troupe::tools::bench {

using steady = std::chrono::steady_clock;

double milliseconds(steady::duration d);

/// A completion of exactly `max_tokens` tokens, drawn greedily.
struct stream_request {
  std::string endpoint;
  std::vector<std::int32_t> prompt;
  unsigned max_tokens = 0;
};

/// What came of one, as its client saw it.
struct stream_record {
  steady::time_point sent;
  std::vector<steady::time_point> times; ///< of each token
  std::vector<std::int32_t> tokens;
};

/// Events of a stream as they came in, still to be read.
struct raw_stream {
  steady::time_point sent;
  std::vector<std::pair<steady::time_point, std::string>> events;
};

/// Streams one completion to its end over a connection of its own. Blocks; any thread. Fails
/// like http::fetch_stream, and with invalid_request for any status but 200.
expected<raw_stream> stream(const stream_request& what);

/// Reads the events. Apart from `stream`, so that it can be done when nothing is measured. Fails
/// with peer_lost if the answer is an error, broke off or has not `max_tokens` tokens.
expected<stream_record> read(const raw_stream& raw, unsigned max_tokens);

/// A prompt of `num_tokens` tokens: English text, begun at word `offset`, over and over. Fails if
/// the endpoint does not answer POST /tokenize.
class prompt_maker {
public:
  static expected<prompt_maker> make(const std::string& endpoint);
  std::vector<std::int32_t> prompt(std::size_t num_tokens, std::size_t offset) const;

private:
  std::vector<std::int32_t> text_;
};

} // namespace troupe::tools::bench
