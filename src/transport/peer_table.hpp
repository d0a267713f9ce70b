#pragma once

#include "troupe/base/error.hpp"
#include "troupe/transport/frame.hpp"
#include "troupe/transport/inbox.hpp"
#include "troupe/transport/ucx_worker.hpp"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

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

/// The sending half of an endpoint: which peers are connected, what is on its way to them,
/// and what happens to it when one is lost. Used by the thread that drives the endpoint.
///
/// A new peer gets a hello as soon as its TCP connection stands, and frames only when
/// its own hello has come as well. For the first frame makes UCX begin a handshake, and UCX 1.13
/// aborts the process (assertion in ucp_request_send_state_ff, gone in 1.14) when a peer dies
/// while the answer to that waits for a TCP connection. A peer that does not connect
/// back sends no hello; after a moment its frames go out all the same.
class peer_table {
public:
  using lost_callback = std::function<void(const std::string&, std::uint64_t, const error&)>;

  /// `own` holds this process's name and incarnation.
  peer_table(ucx_worker& worker, inbox& fences, const proto::FrameHeader& own,
             lost_callback on_lost);
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

  /// True when UCX has let go of every connection that was given up or lost.
  bool all_closed() const { return closing_.empty(); }

private:
  friend struct peer;

  using message_handler = void (peer_table::*)(const proto::FrameHeader&);

  template <message_handler Handler>
  expected<void> listen_for(unsigned message_id);
  void hear_hello(const proto::FrameHeader& from);
  void hear_goodbye(const proto::FrameHeader& from);
  bool say(unsigned message_id, peer& to);

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
};

} // namespace troupe::transport
