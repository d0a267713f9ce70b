#pragma once

#include "troupe/transport/frame.hpp"

#include <cstddef>
#include <string>

namespace troupe::transport {

struct peer;

/// One send on its way. The header must live as long as UCX works on it.
struct send_operation {
  std::string to;
  std::string header; ///< a serialised FrameHeader
  payload_view payload;
  completion done;
  peer* carrier = nullptr; ///< set once UCX has it
  std::size_t place = 0;   ///< index among the operations of `carrier`
};

} // namespace troupe::transport
