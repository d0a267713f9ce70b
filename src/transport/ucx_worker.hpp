#pragma once

#include "troupe/base/error.hpp"

#include <chrono>
#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <ucp/api/ucp.h>

namespace troupe::transport {

/// The active-message ids. Each message bears a FrameHeader that names its sender.
constexpr unsigned frame_message_id = 1;
constexpr unsigned hello_message_id = 2;   ///< the sender has opened its way to the receiver
constexpr unsigned goodbye_message_id = 3; ///< the sender gives the receiver up

/// What a UCX status means to the sender of a frame to `peer`.
error to_error(ucs_status_t status, std::string_view peer);

/// What a receiver tells the sender of a frame that it does not take: `to_error` of it is `code`.
ucs_status_t to_status(error_code code);

/// A UCX context with its one worker. Used by one thread at a time.
class ucx_worker {
public:
  /// `transports` as in UCX_TLS; `interface` as in UCX_NET_DEVICES, empty for all.
  static expected<ucx_worker> open(const std::string& transports, const std::string& interface);

  ucx_worker(ucx_worker&& other) noexcept;
  ucx_worker& operator=(ucx_worker&& other) noexcept;
  ~ucx_worker();

  /// Destroys worker and context; requests that are still open die with them.
  void close();

  ucp_worker_h get() const { return worker_; }
  int event_fd() const { return event_fd_; }
  std::size_t max_header() const { return max_header_; }

  /// How others reach this worker: bytes that UCX trusts, whoever has changed them.
  const std::string& address() const { return address_; }

  /// Opens a UCX endpoint towards `address`, made by address() of another worker.
  /// `on_error(context, ...)` is called in progress() when the peer is lost.
  expected<ucp_ep_h> open_endpoint(std::string_view address, ucp_err_handler_cb_t on_error,
                                   void* context);

  /// Moves communication on; true when something happened.
  bool progress();

  /// Moves communication on until UCX has nothing left to do, also for connections that it has
  /// closed already, or until `deadline`. False then: destroying the worker may abort the
  /// process.
  bool finish(std::chrono::steady_clock::time_point deadline);

  /// Arms event_fd(). False when events are pending, so that sleeping would miss them.
  bool arm();

private:
  ucx_worker() = default;
  expected<void> read_attributes();

  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  int event_fd_ = -1;
  std::size_t max_header_ = 0;
  std::string address_;
};

} // namespace troupe::transport
