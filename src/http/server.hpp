#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "troupe/base/error.hpp"
#include "troupe/http/message.hpp"

namespace troupe::http {

class exchange;

/// The answer to one request. Every member may be called on any thread at any
/// time, also after the client or the server is gone; none of them blocks on
/// the network. One answer is either one `send`, or `begin_stream`, any number
/// of `write` and one `end`.
///
/// Whoever holds it owes an answer. When the last holder drops it without one,
/// the client gets status 500; when it is dropped between `begin_stream` and
/// `end`, the connection is cut so that the client sees an incomplete body.
class response {
public:
  explicit response(std::shared_ptr<exchange> exchange);
  ~response();
  response(const response&) = delete;
  response& operator=(const response&) = delete;

  /// Answers with a whole body. Content-Length, Date and Connection are added.
  /// Returns false, and does nothing, if an answer was begun or the client left.
  bool send(int status, std::string_view content_type, std::string body, header_list extra = {});

  /// Starts an answer whose body follows piece by piece (chunked, or until the
  /// end of the connection for HTTP/1.0). Returns false as `send` does.
  bool begin_stream(int status, std::string_view content_type, header_list extra = {});

  /// Appends a piece of body; pieces that wait are sent together. Returns false
  /// when nobody will read it: the client left, was too slow, or the stream is
  /// not open. Costs a short lock and a copy of the bytes.
  bool write(std::string_view piece);

  /// Completes a stream; without effect in any other state.
  void end();

  /// Asks for `callback` to run once, on the connection's io thread, when the
  /// client leaves before `send` or `end` was called (or was too slow, or the
  /// server was stopped). If it has left already, the callback runs here and now on the
  /// calling thread. A client that closes only its sending side counts as gone.
  /// The callback must not block and must not hold this response. A second call
  /// replaces the first callback.
  void on_disconnect(std::function<void()> callback);

  /// False once the client is known to have left before its answer was written.
  bool alive() const;

private:
  std::shared_ptr<exchange> exchange_;
};

/// Called on an io thread for each complete request. Must not block: hand the
/// work on and keep the response. An exception is answered with status 500.
using request_handler = std::function<void(request, std::shared_ptr<response>)>;

struct server_options {
  std::string host = "127.0.0.1"; ///< address or name to listen on
  std::uint16_t port = 0;         ///< 0 takes any free port
  unsigned num_threads = 1;       ///< io threads; a connection stays on one of them

  std::size_t header_limit = 32 << 10;           ///< bytes of request line and headers, else 431
  std::size_t body_limit = std::size_t{2} << 20; ///< bytes of a request body, else 413
  std::size_t max_connections = 20'000;          ///< further ones get 503 and are closed
  /// Pieces of a stream that may wait behind those being sent, else the client
  /// is too slow and is closed.
  std::size_t max_queued_chunks = 1'024;

  /// From the first byte of a request (or from accepting) to the end of its header: 408 beyond.
  std::chrono::milliseconds header_timeout{10'000};
  /// From the end of the header to the end of the body: 408 beyond.
  std::chrono::milliseconds body_timeout{30'000};
  /// How long a kept-alive connection may stay silent between two requests.
  std::chrono::milliseconds idle_timeout{75'000};
  /// How long a socket write may make no progress; closed beyond.
  std::chrono::milliseconds write_timeout{30'000};
};

/// An HTTP/1.1 and HTTP/1.0 server (RFC 9110, RFC 9112) without TLS, on its own
/// io threads. It does not limit how long a request waits for its answer:
/// deadlines of the work belong to the handler.
///
/// A connection stays readable while its answer is pending, so a client that
/// leaves is noticed at once. A client may send further requests meanwhile;
/// they are answered in order. One that sends more than a full request ahead
/// is closed.
class server {
public:
  /// Binds, listens and starts the threads. Raises this process's limit of open
  /// files to its hard limit. Fails with resource_exhausted when the port is
  /// taken, invalid_config when the host is not an address of this machine,
  /// io_failed otherwise; each names host and port.
  static expected<std::unique_ptr<server>> start(server_options options, request_handler handler);

  /// Stops at once, see `stop`.
  ~server();
  server(const server&) = delete;
  server& operator=(const server&) = delete;

  /// The port that it listens on.
  std::uint16_t port() const;

  /// Open connections at this moment; any thread.
  std::size_t num_connections() const;

  /// Stops listening, closes idle connections, gives answers under way until
  /// `drain` to complete, then closes what is left (their on_disconnect runs)
  /// and joins the threads. Requests that are still arriving get status 503.
  /// Any thread but an io thread; further calls do nothing.
  void stop(std::chrono::milliseconds drain);

private:
  struct state;
  explicit server(std::unique_ptr<state> state);

  std::unique_ptr<state> state_;
};

} // namespace troupe::http
