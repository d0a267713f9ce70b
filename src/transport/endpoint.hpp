#pragma once

#include "troupe/base/error.hpp"
#include "troupe/transport/buffer_pool.hpp"
#include "troupe/transport/frame.hpp"

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace troupe::transport {

/// What UCX reads from the environment while it is being loaded, so that no
/// process can set it for itself: whoever starts a process that uses an endpoint
/// gives it these variables. Without them UCX installs handlers for SIGSEGV and the
/// like and patches the code of mmap. Everything else is set by `endpoint::start`.
std::vector<std::pair<std::string, std::string>> required_environment();

struct endpoint_options {
  std::string name; ///< this process, as its peers call it; empty: `identify` says it later
  std::uint64_t incarnation = 0; ///< higher for each process that bears the name
  std::string interface = "lo";  ///< network devices, as in UCX_NET_DEVICES; empty: all
  /// As in UCX_TLS. UCX's shared memory (posix, sysv) cannot report the death of
  /// a peer and does not work here: between processes of a host frames go through rings of our own
  /// instead, and UCX tells of deaths. "tcp,self" where CMA is forbidden (ptrace policy).
  std::string transports = "tcp,cma,self";
  std::size_t max_payload = std::size_t{256} << 20;      ///< of one frame, either way
  std::size_t max_cached_bytes = std::size_t{512} << 20; ///< idle memory of the pool
  bool checksums = true;                                 ///< compute on send, verify on arrival
  bool rings = true; ///< frames to processes of the same host and user go through shared memory
  /// Poll this long after the last event before sleeping; at most 50 us is used. It
  /// shortens round trips where a core is to spare and ruins them where none is.
  std::chrono::microseconds spin{0};
  /// For tests: may change a frame's serialised header on the progress thread, just
  /// before UCX gets it.
  std::function<void(std::string&)> tamper_header;
};

/// Called one at a time, on the thread that moves communication on: the progress thread, or one
/// that is in `drive` or `send`. They must neither block nor throw; they may call any function of
/// the endpoint but stop() and drive().
struct endpoint_callbacks {
  /// A frame arrived. The frames of one sender arrive in the order of its sends.
  std::function<void(frame)> on_frame;
  /// A connected peer died or was cut off, or a connect failed. Called once a connection,
  /// not for disconnect() and not for an incarnation replaced by connect(). From here on
  /// frames of that incarnation are dropped.
  std::function<void(const std::string& name, std::uint64_t incarnation, const error&)>
    on_peer_lost;
  /// A frame was dropped: damaged (io_failed), fenced off (stale_epoch), larger than
  /// max_payload (too_large), broken off by its sender's death (peer_lost), without a header
  /// (invalid_request; the header given is empty then) or without memory
  /// (resource_exhausted). Left empty, it is logged as a warning.
  std::function<void(const proto::FrameHeader&, const error&)> on_dropped;
};

/// A process's end of all tensor connections. Owns the UCX context, its worker
/// and a progress thread that drives them while nobody else does. Functions may be called on any
/// thread.
class endpoint {
public:
  static constexpr std::chrono::milliseconds default_drain{500};

  /// Takes milliseconds to tens of them. Fails with unavailable when UCX finds no such transport or
  /// interface.
  static expected<std::unique_ptr<endpoint>> start(endpoint_options options,
                                                   endpoint_callbacks callbacks);

  endpoint(const endpoint&) = delete;
  endpoint& operator=(const endpoint&) = delete;
  ~endpoint(); ///< stop(default_drain)

  /// Says who this process is, where `options.name` was empty. Once, before the first connect() or
  /// send(), and before any other thread uses the endpoint.
  void identify(std::string name, std::uint64_t incarnation);

  /// How peers reach this endpoint: opaque bytes to be passed to their connect().
  const std::string& address() const;

  /// Opens the way to a peer and hears its frames. Both ends connect to each other, in any
  /// order; frames to a peer that does not connect back start half a second late. An older
  /// incarnation is replaced: its sends fail with peer_lost. The connected incarnation again:
  /// nothing happens. A failure, an incarnation older than the known one included, comes as
  /// on_peer_lost. Frames of peers that were never connected are heard too, but their death
  /// is not noticed.
  void connect(std::string peer, std::uint64_t incarnation, std::string address);

  /// Gives a peer up at once, also one that is stopped or cut off: sends in flight fail with
  /// peer_lost, its frames are dropped until a later connect(). It sees this end as lost.
  void disconnect(std::string peer);

  /// Sends to a connected peer, or to this endpoint's own name. `sender`,
  /// `sender_incarnation` and `checksum` of the header are filled in here. `done` is
  /// called exactly once, on a thread as callbacks are, which may be this one. Errors:
  /// peer_lost (gone, given up or never connected), stale_epoch (the receiver has
  /// fenced this process off), too_large (payload or header), unavailable (stopping),
  /// resource_exhausted, invalid_request. What the receiver refuses of a small frame, which
  /// goes without a rendezvous, or of one through a ring, only the receiver hears of (on_dropped).
  /// There is no bound on what is queued: a caller bounds it by waiting for completions.
  void send(std::string_view peer, proto::FrameHeader header, payload_view payload,
            completion done);

  /// Moves communication on, in place of the progress thread, until `done` holds or the deadline
  /// has passed (by a millisecond at most). Returns what `done` says last. For a thread that has
  /// nothing to do until a frame arrives: it hears it itself and need not be woken by another.
  /// `done` is asked often, must be cheap and must not call the endpoint; who makes it true other
  /// than by on_frame or on_peer_lost calls interrupt(). Returns at once where another thread is in
  /// here already, and after stop(). Nobody may be in here when the endpoint is destroyed.
  bool drive(const std::function<bool()>& done, std::chrono::steady_clock::time_point deadline);

  /// Makes whoever is in drive() ask its `done` again.
  void interrupt();

  /// Blocks for at most `drain`, and a moment, while sends in flight end; what has not ended by
  /// then fails with unavailable. All completions have been called and no callback runs
  /// any more when it returns. May be called again. If transfers were cut off, UCX's worker
  /// stays until the process ends: UCX 1.13 cannot destroy it safely.
  void stop(std::chrono::milliseconds drain = default_drain);

  /// Memory for payloads, the same that arriving frames use.
  buffer_pool& pool();

private:
  class engine;
  explicit endpoint(std::unique_ptr<engine> started);

  std::unique_ptr<engine> engine_;
};

} // namespace troupe::transport
