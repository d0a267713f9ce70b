#pragma once

#include "troupe/base/error.hpp"
#include "troupe/transport/frame.hpp"
#include "troupe/transport/inbox.hpp"
#include "troupe/transport/ring_inlets.hpp"
#include "troupe/transport/send_operation.hpp"
#include "troupe/transport/ucx_worker.hpp"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace troupe::transport {

/// The sending half of an endpoint: which peers are connected, what is on its way to them,
/// and what happens to it when one is lost. Used by the thread that drives the endpoint.
///
/// A new peer gets a hello as soon as its TCP connection stands, and frames only when
/// its own hello has come as well. For the first frame makes UCX begin a handshake, and UCX 1.13
/// aborts the process (assertion in ucp_request_send_state_ff, gone in 1.14) when a peer dies
/// while the answer to that waits for a TCP connection. A peer that does not connect
/// back sends no hello; after a moment its frames go out all the same.
///
/// Where this process has a place on its host that a peer can reach, the hello offers a ring, and
/// frames go through it instead of UCX, all of a connection in one way. UCX stays connected: it is
/// by UCX that one hears of the other's death.
///
///     connect ──> waiting ──hello both ways, ring attached──> ready, by ring
///                    └──after a moment──────────────────────> ready, by ring if attached, or UCX
class peer_table {
public:
  using lost_callback = std::function<void(const std::string&, std::uint64_t, const error&)>;

  /// `own` holds this process's name and incarnation. `place` is where neighbours reach it; null:
  /// nowhere, frames go by UCX alone.
  peer_table(ucx_worker& worker, inbox& fences, const proto::FrameHeader& own,
             const proto::HostPlace* place, lost_callback on_lost);
  ~peer_table();

  /// Says once more who this process is. Before the first connect().
  void identify(const proto::FrameHeader& own) { own_header_ = own.SerializeAsString(); }

  /// Registers for hellos and goodbyes.
  expected<void> listen();

  void connect(const std::string& name, std::uint64_t incarnation, const std::string& address);
  void disconnect(const std::string& name);
  void send(std::unique_ptr<send_operation> operation);

  /// Acts on what was heard since the last call, outside UCX's callbacks: sends what waited
  /// for a hello, retires peers that failed, forgets those that are closed. True
  /// when there was something to do.
  bool settle();

  /// Reads what neighbours have sent and goes on with what waits for room in their rings. True when
  /// there was something to do.
  bool move_rings();

  /// move_rings() has something to do.
  bool has_ring_work() const;

  /// True if UCX was asked for anything since the last call, so that it wants to be moved on.
  bool take_ucx_use() { return std::exchange(ucx_used_, false); }

  /// Some peer is reached by UCX alone, or may be.
  bool needs_network() const;

  /// True while a hello is awaited, so that settle() is due again soon.
  bool awaits_hellos() const { return num_waiting_ != 0; }

  bool has_sends_in_flight() const;

  /// Begins to push out the last bytes of connections without sends in flight.
  void flush_all();
  bool all_flushed() const;

  /// Tells all peers that this process goes.
  void say_goodbyes();

  /// Closes all connections by force. What they carried fails with `unavailable`.
  void close_all();

  /// True when nothing that was asked of a connection given up or lost is open any more. UCX may
  /// still be busy with it (ucx_worker::finish).
  bool all_closed() const { return closing_.empty(); }

private:
  friend struct peer;

  using message_handler = void (peer_table::*)(const proto::FrameHeader&, std::string_view);

  template <message_handler Handler>
  expected<void> listen_for(unsigned message_id);
  void hear_hello(const proto::FrameHeader& from, std::string_view offer);
  void hear_goodbye(const proto::FrameHeader& from, std::string_view offer);
  bool say(unsigned message_id, peer& to);
  void offer_ring(peer& to, const proto::HostPlace& place);

  std::unique_ptr<peer> remove(const std::string& name);
  void start(peer& carrier, std::unique_ptr<send_operation> operation);
  bool start_those_ready();
  void close(std::unique_ptr<peer> finished, const error& why);

  ucx_worker& worker_;
  inbox& fences_;
  lost_callback on_lost_;
  std::string own_header_;
  std::unordered_map<std::string, std::unique_ptr<peer>> connected_;
  std::unordered_map<std::string, std::uint64_t> hellos_; ///< incarnations heard
  std::size_t num_waiting_ = 0;
  std::vector<std::unique_ptr<peer>> closing_;
  std::vector<std::string> failed_;

  const proto::HostPlace* place_;
  ring_inlets inlets_;
  /// A hello or a goodbye with a ring, in the order of their arrival.
  struct ring_news {
    bool is_hello = false;
    ring_inlets::sender from;
    proto::RingOffer offer;
  };
  void note_ring(bool is_hello, const proto::FrameHeader& from, std::string_view offer);
  std::vector<ring_news> news_;
  bool ucx_used_ = true;
};

} // namespace troupe::transport
