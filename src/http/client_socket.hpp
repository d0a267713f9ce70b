#pragma once

#include <chrono>
#include <cstddef>
#include <string>
#include <string_view>

#include "troupe/base/error.hpp"

namespace troupe::http {

/// A TCP connection of the blocking client: a non-blocking descriptor and
/// poll(2), so that every wait has a deadline. Owned and used by one thread.
class client_socket {
public:
  using clock = std::chrono::steady_clock;

  /// Connects to the first address of `host` that answers. Errors name `where`.
  static expected<client_socket> connect(const std::string& host, const std::string& port,
                                         clock::time_point deadline);

  client_socket(client_socket&& other) noexcept;
  client_socket& operator=(client_socket&&) = delete;
  ~client_socket();

  enum class event { ready, timed_out, interrupted };

  /// Waits until bytes or the end of the stream can be read, or, when
  /// `for_write` is set, until bytes can be written.
  expected<event> wait(bool for_write, clock::time_point deadline);

  enum class status { moved, blocked, closed, reset };
  struct progress {
    status result;
    std::size_t num_bytes = 0;
  };

  /// Writes what fits, without blocking. A connection that the peer closed is
  /// not an error here: its answer may still be readable.
  progress write_some(std::string_view bytes);

  /// Reads what is there, without blocking.
  progress read_some(char* data, std::size_t size);

  /// "host:port", as given.
  const std::string& where() const { return where_; }

private:
  client_socket(int fd, std::string where) : fd_(fd), where_(std::move(where)) {}

  int fd_;
  std::string where_;
};

} // namespace troupe::http
