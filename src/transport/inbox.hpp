#pragma once

#include "troupe/base/error.hpp"
#include "troupe/transport/frame.hpp"
#include "troupe/transport/ucx_worker.hpp"

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>

namespace troupe::transport {

/// The receiving half of an endpoint: turns active messages into frames, verifies them,
/// puts each sender's frames back in the order of their arrival (a rendezvous takes
/// longer than an eager message behind it) and drops what fenced senders send.
/// What comes through a ring is copied out of it elsewhere (frame_stream.hpp) and passes the same
/// checks. Used by the thread that drives the endpoint.
class inbox {
public:
  struct options {
    std::size_t max_payload = 0;
    bool checksums = true;
    std::function<void(frame)> on_frame;
    std::function<void(const proto::FrameHeader&, const error&)> on_dropped;
  };

  inbox(options configured, buffer_pool pool) : options_(std::move(configured)), pool_(pool) {}
  inbox(const inbox&) = delete;
  inbox& operator=(const inbox&) = delete;

  /// Registers for the frames of `worker`, which must be gone before the inbox.
  expected<void> listen(ucp_worker_h worker);

  /// From now on drops the frames of `sender` whose incarnation is below `lowest`.
  void fence(const std::string& sender, std::uint64_t lowest) { fences_[sender] = lowest; }

  /// The lowest incarnation of `sender` that is heard; 0 for an unknown sender.
  std::uint64_t lowest(const std::string& sender) const;

  /// From now on takes no more frames: a sender learns that this process is lost.
  void close() { closed_ = true; }

  /// True while UCX writes into buffers of this inbox.
  bool is_receiving() const { return num_receiving_ != 0; }

  /// Whether a frame with these bytes as its header and a payload of `length` bytes is taken: then
  /// with memory for it, to be filled and given to `arrive`. Otherwise its drop was reported.
  std::optional<frame> accept(std::string_view header, std::size_t length);
  void arrive(frame filled);

  /// Hands out a frame of this process to itself.
  void deliver(frame arrived) { options_.on_frame(std::move(arrived)); }

private:
  enum class state { receiving, complete, failed };

  struct line;

  /// A frame that waits for its payload or for the frames before it.
  struct slot {
    inbox* owner = nullptr;
    line* queue = nullptr;
    state progress = state::receiving;
    ucs_status_t failure = UCS_OK;
    frame content;
  };

  using line_key = std::pair<std::string, std::uint64_t>;

  /// The slots of one sender, in the order of arrival. Exists while a rendezvous runs.
  struct line {
    line_key key;
    std::deque<std::unique_ptr<slot>> slots;
  };

  ucs_status_t receive(std::string_view header, void* data, std::size_t length, bool rendezvous);
  ucs_status_t start_rendezvous(proto::FrameHeader header, buffer target, void* descriptor);
  void finish_rendezvous(slot& finished, ucs_status_t status);
  void hand_out_front(line& queue);
  void hand_out(slot& finished);
  void drop(const proto::FrameHeader& header, error_code code, std::string cause);
  expected<frame> admit(std::string_view header, std::size_t length);
  bool is_fenced(const proto::FrameHeader& header) const;

  options options_;
  buffer_pool pool_;
  ucp_worker_h worker_ = nullptr;
  bool closed_ = false;
  std::size_t num_receiving_ = 0;
  std::unordered_map<std::string, std::uint64_t> fences_;
  std::map<line_key, line> lines_;
};

} // namespace troupe::transport
