#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>

#include "troupe/http/message.hpp"

namespace troupe::http {

/// The connection as its exchange sees it.
class exchange_owner {
public:
  virtual ~exchange_owner() = default;

  /// Schedules a `take` on the connection's thread; any thread.
  virtual void wake() = 0;
};

struct response_head {
  int status = 0;
  std::string content_type;
  header_list extra;
  bool streamed = false;
};

/// What a connection takes out of its exchange to write it.
struct outgoing {
  std::optional<response_head> head;
  bool end = false;    ///< the body ends with these bytes
  bool broken = false; ///< the body will never be completed: close after these bytes
};

/// Where a response, on any thread, and its connection, on an io thread, meet:
/// bytes gather here until the connection has finished its last write.
///
///   fresh --send--> ended          any --client_gone--> gone
///   fresh --begin_stream--> streaming --end--> ended
class exchange {
public:
  exchange(std::shared_ptr<exchange_owner> owner, std::size_t max_queued_chunks);

  // The response's side; see class response.
  bool send(int status, std::string_view content_type, std::string body, header_list extra);
  bool begin_stream(int status, std::string_view content_type, header_list extra);
  bool write(std::string_view piece);
  void end();
  void dropped();
  void on_disconnect(std::function<void()> callback);
  bool alive() const;

  // The connection's side, on its thread.

  /// Moves out what waits; the bytes of the body replace those in `data`.
  outgoing take(std::string& data);

  /// True when a piece had to be refused because too many wait.
  bool overflowed() const;

  /// True when the response called `send` or `end`.
  bool ended() const;

  /// The answer was written completely.
  void finish();

  /// The connection is closed; runs the callback if the answer had not ended.
  void client_gone();

private:
  enum class phase { fresh, streaming, ended, gone };

  void wake_owner();

  mutable std::mutex mutex_;
  std::shared_ptr<exchange_owner> owner_; // reset when the connection lets go
  std::function<void()> callback_;
  std::optional<response_head> head_;
  std::string data_;
  std::size_t num_queued_ = 0;
  const std::size_t max_queued_chunks_;
  phase phase_ = phase::fresh;
  bool end_ = false;
  bool broken_ = false;
  bool overflowed_ = false;
  bool awake_ = false; // a wake is under way: spares further ones
};

} // namespace troupe::http
