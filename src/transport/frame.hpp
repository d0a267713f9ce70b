#pragma once

#include "troupe/base/error.hpp"
#include "troupe/transport/buffer_pool.hpp"

#include <cstddef>
#include <functional>
#include <memory>
#include <span>

#include <serving.pb.h>

namespace troupe::transport {

/// A tensor as it arrived. Its sender is header.sender(), header.sender_incarnation().
struct frame {
  proto::FrameHeader header;
  buffer payload;
};

/// A tensor to be sent from where it lies. The bytes must neither move nor change
/// before the completion; `owner` is held until nobody reads them any more.
struct payload_view {
  std::span<const std::byte> bytes;
  std::shared_ptr<const void> owner;
};

/// Receives the outcome of one send, exactly once. Success means that the payload's memory
/// is free again, not that the receiver has the frame: only an answer says that.
using completion = std::function<void(expected<void>)>;

} // namespace troupe::transport
