#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <catch2/catch.hpp>

#include "troupe/http/client.hpp"
#include "troupe/http/server.hpp"

namespace troupe::http::testing {

using namespace std::chrono_literals;
using steady = std::chrono::steady_clock;

/// Waits until `done` is true; false if that took longer than `limit`.
inline bool eventually(const std::function<bool()>& done, std::chrono::milliseconds limit = 3s) {
  const auto end = steady::now() + limit;
  while (!done()) {
    if (steady::now() > end)
      return false;
    std::this_thread::sleep_for(1ms);
  }
  return true;
}

/// A client made of bytes, for what a well-behaved client does not do.
class raw_client {
public:
  explicit raw_client(std::uint16_t port, int receive_buffer = 0)
    : fd_(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    if (receive_buffer > 0)
      ::setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof receive_buffer);
    connected_ = port != 0 && connect(port);
  }
  raw_client(raw_client&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)), connected_(other.connected_) {}
  ~raw_client() { close(); }

  bool connect(std::uint16_t port) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return connected_ = ::connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0;
  }
  bool connected() const { return connected_; }

  bool send(std::string_view bytes) {
    while (!bytes.empty()) {
      const auto n = ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (n <= 0)
        return false;
      bytes.remove_prefix(static_cast<std::size_t>(n));
    }
    return true;
  }

  /// Reads until `done` says so, the connection ends or `limit` is over.
  std::string read_until(const std::function<bool(const std::string&)>& done,
                         std::chrono::milliseconds limit = 3s) {
    std::string result;
    const auto end = steady::now() + limit;
    while (!done(result)) {
      const auto left = std::chrono::ceil<std::chrono::milliseconds>(end - steady::now()).count();
      pollfd entry{fd_, POLLIN, 0};
      if (left <= 0 || ::poll(&entry, 1, static_cast<int>(left)) <= 0)
        break;
      char data[16384];
      const auto n = ::recv(fd_, data, sizeof data, 0);
      if (n <= 0) {
        ended_ = true;
        break;
      }
      result.append(data, static_cast<std::size_t>(n));
    }
    return result;
  }
  std::string read_all(std::chrono::milliseconds limit = 3s) {
    return read_until([](const std::string&) { return false; }, limit);
  }
  /// Reads until `text` was received.
  std::string read_to(std::string_view text, std::chrono::milliseconds limit = 3s) {
    return read_until([&](const std::string& all) { return all.find(text) != all.npos; }, limit);
  }
  /// True when the server closed the connection, as seen by the reads above.
  bool ended() const { return ended_; }

  void shutdown_send() { ::shutdown(fd_, SHUT_WR); }
  void close() {
    if (fd_ >= 0)
      ::close(std::exchange(fd_, -1));
  }

private:
  int fd_;
  bool connected_ = false;
  bool ended_ = false;
};

/// Requests whose handler leaves them to the test.
class held_responses {
public:
  void add(std::shared_ptr<response> answer) {
    const std::lock_guard lock{mutex_};
    held_.push_back(std::move(answer));
    changed_.notify_all();
  }
  /// The oldest held response, waited for; null after three seconds.
  std::shared_ptr<response> take() {
    std::unique_lock lock{mutex_};
    if (!changed_.wait_for(lock, 3s, [this] { return !held_.empty(); }))
      return nullptr;
    auto result = std::move(held_.front());
    held_.erase(held_.begin());
    return result;
  }

private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::shared_ptr<response>> held_;
};

/// A server with routes: /echo (method, target and body come back), /hold
/// (answered by the test), /drop (never answered), /throw, /size/N.
struct test_server {
  explicit test_server(server_options options = {}) {
    auto started =
      server::start(std::move(options), [this](request incoming, std::shared_ptr<response> answer) {
        handle(std::move(incoming), std::move(answer));
      });
    INFO((started ? std::string{} : started.error().text()));
    REQUIRE(started);
    running = std::move(*started);
  }

  void handle(request incoming, std::shared_ptr<response> answer) {
    ++num_requests;
    if (incoming.path == "/hold")
      return held.add(std::move(answer));
    if (incoming.path == "/drop")
      return;
    if (incoming.path == "/throw")
      throw std::runtime_error{"thrown on purpose"};
    if (incoming.path == "/empty") {
      answer->send(204, "", "");
      return;
    }
    if (incoming.path.starts_with("/size/")) {
      answer->send(200, "text/plain", std::string(std::stoul(incoming.path.substr(6)), 'x'));
      return;
    }
    if (incoming.path == "/stream") {
      answer->begin_stream(200, "text/event-stream", {{"Cache-Control", "no-cache"}});
      answer->write("one,");
      answer->write("two,");
      answer->write("");
      answer->write("three");
      answer->end();
      return;
    }
    answer->send(200, "text/plain", incoming.method + " " + incoming.target + " " + incoming.body,
                 {{"X-Header", std::string{incoming.header("x-header").value_or("none")}}});
  }

  std::uint16_t port() const { return running->port(); }
  std::string url(std::string_view path) const {
    return "http://127.0.0.1:" + std::to_string(port()) + std::string{path};
  }
  /// True when the server still answers a plain request on a new connection.
  bool answers() const {
    const auto got = fetch({"GET", url("/echo"), {}, {}}, 3s);
    return got && got->status == 200 && got->body == "GET /echo ";
  }

  std::atomic<int> num_requests{0};
  held_responses held;
  std::unique_ptr<server> running; // last: its threads use the members above
};

} // namespace troupe::http::testing
