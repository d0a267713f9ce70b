#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <ctime>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <unordered_set>

#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>

#include "troupe/http/server.hpp"

namespace troupe::http {

using clock = std::chrono::steady_clock;

/// What a shard knows of its connections; all of it runs on the shard's thread.
class shard_member {
public:
  virtual ~shard_member() = default;

  /// Gives up whatever should have happened before `now`.
  virtual void check_deadline(clock::time_point now) = 0;

  /// Closes now if idle, else after the answer under way.
  virtual void drain() = 0;

  /// Closes now.
  virtual void close() = 0;
};

/// One io thread and the connections that live on it. Connections keep a
/// deadline each; a single timer sweeps them, which is far cheaper than a timer
/// for every write.
class shard {
public:
  shard(const server_options& options, const request_handler& handler,
        std::atomic<std::size_t>& num_connections);
  ~shard();

  void start();

  // Any thread.

  boost::asio::io_context& context() { return context_; }

  /// Drains every connection; the thread ends when the last one is closed.
  void drain();

  /// Closes every connection.
  void close_all();

  /// True when the thread ended in time.
  bool wait_until(clock::time_point deadline);
  void join();

  // The shard's own thread, called by its connections.

  void add(std::shared_ptr<shard_member> member);
  void remove(const std::shared_ptr<shard_member>& member);

  const server_options& options() const { return options_; }
  const request_handler& handler() const { return handler_; }
  bool draining() const { return draining_; }

  /// Room to receive into, shared by all connections of this thread.
  std::array<char, 64 << 10>& scratch() { return scratch_; }

  /// Now, as an HTTP date (RFC 9110, section 5.6.7).
  std::string_view date();

private:
  template <class F>
  void for_each(F visit);
  void schedule_sweep();

  const server_options& options_;
  const request_handler& handler_;
  std::atomic<std::size_t>& num_connections_;
  boost::asio::io_context context_{1};
  boost::asio::executor_work_guard<boost::asio::io_context::executor_type> work_;
  boost::asio::steady_timer sweep_timer_;
  std::unordered_set<std::shared_ptr<shard_member>> members_;
  std::array<char, 64 << 10> scratch_;
  std::string date_;
  std::time_t date_second_ = 0;
  bool sweeping_ = false;
  bool draining_ = false;
  std::mutex ended_mutex_;
  std::condition_variable ended_changed_;
  bool ended_ = false; // guarded by ended_mutex_
  std::thread thread_;
};

/// Starts to serve an accepted socket of the shard's context; the shard's thread.
/// With `refuse`, every request is answered with 503 at once.
void serve(shard& owner, boost::asio::ip::tcp::socket socket, bool refuse);

} // namespace troupe::http
