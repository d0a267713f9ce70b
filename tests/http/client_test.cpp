#include "troupe/http/client.hpp"

#include <csignal>

#include <pthread.h>

#include "server_fixture.hpp"
#include "troupe/http/sse.hpp"

using namespace troupe::http::testing;
using troupe::error_code;
using troupe::http::fetch;
using troupe::http::fetch_stream;

namespace {

/// A listener that speaks only the bytes it is told to.
class scripted_server {
public:
  /// Accepts one connection, waits for a request's header, sends `answer`, and
  /// closes unless `hold_open`.
  scripted_server(std::string answer, bool hold_open) : fd_(::socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    REQUIRE(::bind(fd_, reinterpret_cast<sockaddr*>(&address), size) == 0);
    REQUIRE(::listen(fd_, 1) == 0);
    REQUIRE(::getsockname(fd_, reinterpret_cast<sockaddr*>(&address), &size) == 0);
    port_ = ntohs(address.sin_port);
    thread_ = std::thread{[this, answer = std::move(answer), hold_open] {
      const int peer = ::accept(fd_, nullptr, nullptr);
      std::string received;
      char data[4096];
      while (received.find("\r\n\r\n") == received.npos) {
        const auto n = ::recv(peer, data, sizeof data, 0);
        if (n <= 0)
          break;
        received.append(data, static_cast<std::size_t>(n));
      }
      ::send(peer, answer.data(), answer.size(), MSG_NOSIGNAL);
      while (hold_open && ::recv(peer, data, sizeof data, 0) > 0) {
      }
      ::close(peer);
    }};
  }
  ~scripted_server() {
    ::shutdown(fd_, SHUT_RDWR);
    thread_.join();
    ::close(fd_);
  }
  std::string where() const { return "127.0.0.1:" + std::to_string(port_); }
  std::string url() const { return "http://" + where() + "/path"; }

private:
  int fd_;
  std::uint16_t port_ = 0;
  std::thread thread_;
};

} // namespace

TEST_CASE("the client refuses URLs that it cannot use") {
  for (const auto* url : {"", "https://x/", "x", "http://", "http://:80/", "http://x:0/",
                          "http://x:99999/", "http://x:1a/", "http://[::1/", "http://x/a b"}) {
    CAPTURE(url);
    const auto got = fetch({"GET", url, {}, {}}, 1s);
    REQUIRE_FALSE(got);
    CHECK(got.error().code == error_code::invalid_request);
    CHECK(got.error().cause.find(std::string{"\""} + url + "\"") != std::string::npos);
  }
}

TEST_CASE("the client names who refused, was silent or hung up") {
  std::uint16_t free_port = 0;
  {
    test_server site;
    free_port = site.port();
  }
  const auto refused =
    fetch({"GET", "http://127.0.0.1:" + std::to_string(free_port) + "/", {}, {}}, 1s);
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == error_code::unavailable);
  CHECK(refused.error().cause.find("127.0.0.1:" + std::to_string(free_port)) != std::string::npos);

  scripted_server silent{"", true};
  const auto start = steady::now();
  const auto timed_out = fetch({"GET", silent.url(), {}, {}}, 150ms);
  REQUIRE_FALSE(timed_out);
  CHECK(timed_out.error().code == error_code::deadline_exceeded);
  CHECK(timed_out.error().cause.find(silent.where()) != std::string::npos);
  CHECK(steady::now() - start < 1s);
  CHECK(steady::now() - start >= 150ms);

  for (const auto* part :
       {"", "HTTP/1.1 200 OK\r\nContent-", "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        "SSH-2.0-OpenSSH\r\n\r\n"}) {
    CAPTURE(part);
    scripted_server rude{part, false};
    const auto lost = fetch({"GET", rude.url(), {}, {}}, 3s);
    REQUIRE_FALSE(lost);
    CHECK(lost.error().code == error_code::peer_lost);
    CHECK(lost.error().cause.find(rude.where()) != std::string::npos);
  }
}

TEST_CASE("the client reads every kind of body") {
  for (const auto* answer : {"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-A: 1\r\n\r\nhello",
                             "HTTP/1.1 200 OK\r\nX-A: 1\r\nTransfer-Encoding: chunked\r\n\r\n"
                             "2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
                             "HTTP/1.0 200 OK\r\nX-A: 1\r\n\r\nhello",
                             "HTTP/1.1 100 Continue\r\n\r\n"
                             "HTTP/1.1 200 OK\r\nX-A: 1\r\nContent-Length: 5\r\n\r\nhello"}) {
    CAPTURE(answer);
    scripted_server peer{answer, false};
    const auto got = fetch({"GET", peer.url(), {}, {}}, 3s);
    REQUIRE(got);
    CHECK(got->status == 200);
    CHECK(got->body == "hello");
    CHECK(got->header("x-a") == "1");
    CHECK(got->complete);
  }
  test_server site;
  const auto head = fetch({"HEAD", site.url("/size/100"), {}, {}}, 3s);
  REQUIRE(head);
  CHECK(head->header("content-length") == "100");
  CHECK(head->body.empty());
  const auto named = "http://localhost:" + std::to_string(site.port());
  const auto by_name = fetch({"GET", named, {}, {}}, 3s);
  REQUIRE(by_name);
  CHECK(by_name->body == "GET / ");
}

TEST_CASE("the client hands on a stream piece by piece") {
  test_server site;
  std::thread producer{[&] {
    const auto answer = site.held.take();
    if (!answer)
      return;
    answer->begin_stream(200, "text/event-stream");
    for (int i = 0; i < 20; ++i) {
      answer->write(troupe::http::sse_frame(std::to_string(i)));
      std::this_thread::sleep_for(2ms);
    }
    answer->end();
  }};
  troupe::http::sse_parser parser;
  std::vector<std::string> data;
  int num_pieces = 0;
  const auto take = [&](std::string_view piece) {
    ++num_pieces;
    const auto events = parser.feed(piece);
    for (const auto& event : *events)
      data.push_back(event.data);
    return true;
  };
  const auto got = fetch_stream({"GET", site.url("/hold"), {}, {}}, {}, take);
  producer.join();
  REQUIRE(got);
  CHECK(got->complete);
  CHECK(got->body.empty());
  CHECK(num_pieces > 5);
  REQUIRE(data.size() == 20);
  for (int i = 0; i < 20; ++i)
    CHECK(data[static_cast<std::size_t>(i)] == std::to_string(i));
}

TEST_CASE("a streamed error is collected, silence ends a stream, giving up closes it") {
  test_server site;
  const auto error = fetch_stream({"GET", site.url("/drop"), {}, {}}, {}, [](std::string_view) {
    FAIL("an error's body is no piece of the stream");
    return true;
  });
  REQUIRE(error);
  CHECK(error->status == 500);
  CHECK(error->body.find("server_error") != std::string::npos);

  troupe::http::client_timeouts timeouts;
  timeouts.silence = 150ms;
  std::atomic<int> num_left{0};
  const auto serve_one = [&] {
    const auto answer = site.held.take();
    if (!answer)
      return;
    answer->on_disconnect([&] { ++num_left; });
    answer->begin_stream(200, "text/plain");
    answer->write("first");
    const int before = num_left;
    eventually([&] { return num_left > before; });
  };
  std::thread silent{serve_one};
  const auto quiet = fetch_stream({"GET", site.url("/hold"), {}, {}}, timeouts,
                                  [](std::string_view) { return true; });
  silent.join();
  REQUIRE_FALSE(quiet);
  CHECK(quiet.error().code == error_code::deadline_exceeded);

  std::thread talking{serve_one};
  const auto given_up = fetch_stream({"GET", site.url("/hold"), {}, {}}, timeouts,
                                     [](std::string_view piece) { return piece != "first"; });
  talking.join();
  REQUIRE(given_up);
  CHECK_FALSE(given_up->complete);
  CHECK(num_left == 2);
}

TEST_CASE("a signal gives a waiting stream the chance to stop") {
  struct sigaction action {};
  struct sigaction before {};
  action.sa_handler = [](int) {};
  REQUIRE(sigaction(SIGUSR1, &action, &before) == 0);
  scripted_server silent{"HTTP/1.1 200 OK\r\n\r\n", true};
  const auto waiter = pthread_self();
  std::atomic<bool> stop{false};
  std::thread interrupter{[&] {
    std::this_thread::sleep_for(50ms);
    stop = true;
    pthread_kill(waiter, SIGUSR1);
  }};
  const auto start = steady::now();
  const auto got =
    fetch_stream({"GET", silent.url(), {}, {}}, {}, [&](std::string_view) { return !stop; });
  interrupter.join();
  sigaction(SIGUSR1, &before, nullptr);
  REQUIRE(got);
  CHECK_FALSE(got->complete);
  CHECK(steady::now() - start < 2s);
}
