#include <atomic>
#include <ctime>
#include <map>
#include <random>

#include <sys/resource.h>

#include "server_fixture.hpp"
#include "troupe/http/server.hpp"
#include "troupe/http/sse.hpp"

using namespace troupe::http::testing;
using troupe::error_code;
using troupe::http::fetch;
using troupe::http::response;
using troupe::http::server;
using troupe::http::server_options;

namespace {

constexpr std::string_view hold_request = "GET /hold HTTP/1.1\r\nHost: x\r\n\r\n";

/// Counts calls of a disconnect callback and remembers the moment of the last.
struct disconnect_probe {
  void watch(response& answer) {
    answer.on_disconnect([this] {
      at = steady::now();
      ++count;
    });
  }
  bool wait() const {
    return eventually([this] { return count > 0; });
  }
  steady::time_point at;
  std::atomic<int> count{0};
};

} // namespace

TEST_CASE("200 concurrent streams of 100 events complete in order") {
  constexpr int num_streams = 200;
  constexpr int num_events = 100;
  server_options options;
  options.num_threads = 2;
  test_server site{options};
  std::vector<raw_client> clients;
  std::vector<std::shared_ptr<response>> answers;
  for (int i = 0; i < num_streams; ++i) {
    clients.emplace_back(site.port());
    REQUIRE(clients.back().send("GET /hold HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"));
  }
  for (int i = 0; i < num_streams; ++i) {
    answers.push_back(site.held.take());
    REQUIRE(answers.back());
    answers.back()->begin_stream(200, "text/event-stream");
  }
  std::atomic<int> num_refused{0};
  const auto produce = [&](int first) {
    for (int event = 0; event < num_events; ++event)
      for (int i = first; i < num_streams; i += 2)
        num_refused += !answers[i]->write(
          troupe::http::sse_frame(std::to_string(i) + ":" + std::to_string(event)));
    for (int i = first; i < num_streams; i += 2)
      answers[i]->end();
  };
  std::thread even{produce, 0};
  std::thread odd{produce, 1};
  std::map<std::string, int> seen;
  int num_complete = 0;
  for (auto& client : clients) {
    const auto all = client.read_all(5s);
    // Chunk sizes stand on lines of their own, which the event parser skips.
    troupe::http::sse_parser parser;
    const auto events = parser.feed(all.substr(all.find("\r\n\r\n") + 4));
    if (!client.ended() || !all.ends_with("0\r\n\r\n") || !events || events->size() != num_events)
      continue;
    const auto name = events->front().data.substr(0, events->front().data.find(':'));
    int num_in_order = 0;
    for (int event = 0; event < num_events; ++event)
      num_in_order += (*events)[event].data == name + ":" + std::to_string(event);
    num_complete += num_in_order == num_events;
    ++seen[name];
  }
  even.join();
  odd.join();
  CHECK(num_refused == 0);
  CHECK(num_complete == num_streams);
  CHECK(seen.size() == num_streams);
}

TEST_CASE("a client that leaves is noticed within 100 ms") {
  test_server site;
  const bool streaming = GENERATE(false, true);
  const bool closed = GENERATE(false, true);
  CAPTURE(streaming, closed);
  for (int round = 0; round < 10; ++round) {
    raw_client client{site.port()};
    client.send(hold_request);
    const auto answer = site.held.take();
    REQUIRE(answer);
    disconnect_probe probe;
    probe.watch(*answer);
    if (streaming) {
      answer->begin_stream(200, "text/event-stream");
      answer->write("x");
      client.read_to("x\r\n");
    }
    CHECK(answer->alive());
    const auto left = steady::now();
    if (closed)
      client.close();
    else
      client.shutdown_send();
    REQUIRE(probe.wait());
    CHECK(probe.at - left < 100ms);
    CHECK(probe.count == 1);
    CHECK_FALSE(answer->alive());
    CHECK_FALSE(answer->write("y"));
    CHECK_FALSE(answer->send(200, "text/plain", "y"));
    answer->end();
    // Too late to be called by the server: called here.
    disconnect_probe late;
    late.watch(*answer);
    CHECK(late.count == 1);
  }
  CHECK(eventually([&] { return site.running->num_connections() == 0; }));
}

TEST_CASE("a disconnect is not reported once the answer has ended") {
  test_server site;
  disconnect_probe probe;
  {
    raw_client client{site.port()};
    client.send(hold_request);
    const auto answer = site.held.take();
    REQUIRE(answer);
    probe.watch(*answer);
    answer->send(200, "text/plain", "done");
    client.read_to("done");
  }
  CHECK(eventually([&] { return site.running->num_connections() == 0; }));
  CHECK(probe.count == 0);
}

TEST_CASE("a client that reads too slowly is closed when its queue is full") {
  server_options options;
  options.max_queued_chunks = 64;
  test_server site{options};
  raw_client slow{site.port(), 4096};
  slow.send(hold_request);
  const auto answer = site.held.take();
  REQUIRE(answer);
  disconnect_probe probe;
  probe.watch(*answer);
  answer->begin_stream(200, "text/plain");
  const std::string piece(16 << 10, 'p');
  int num_taken = 0;
  while (num_taken < 20'000 && answer->write(piece)) {
    ++num_taken;
    if (num_taken % 16 == 0)
      std::this_thread::sleep_for(1ms);
  }
  CHECK(num_taken >= 64);
  CHECK(num_taken < 20'000);
  REQUIRE(probe.wait());
  CHECK(probe.count == 1);
  CHECK_FALSE(answer->alive());
  CHECK(eventually([&] { return site.running->num_connections() == 0; }));
  CHECK(site.answers());
}

TEST_CASE("a client that sends far ahead of its answers is closed") {
  server_options options;
  options.header_limit = options.body_limit = 4096;
  test_server site{options};
  raw_client eager{site.port()};
  eager.send(hold_request);
  const auto answer = site.held.take();
  REQUIRE(answer);
  disconnect_probe probe;
  probe.watch(*answer);
  eager.send(std::string(8000, 'a'));
  CHECK(eager.read_all(50ms).empty());
  CHECK(probe.count == 0);
  eager.send(std::string(1000, 'a'));
  CHECK(probe.wait());
  CHECK(site.answers());
}

TEST_CASE("a client that takes nothing of a large answer is closed by the deadline") {
  server_options options;
  options.write_timeout = 200ms;
  test_server site{options};
  raw_client slow{site.port(), 4096};
  slow.send("GET /size/30000000 HTTP/1.1\r\nHost: x\r\n\r\n");
  CHECK(eventually([&] { return site.num_requests == 1; }));
  CHECK(eventually([&] { return site.running->num_connections() == 0; }, 2s));

  // Slow but steady is fine, although the whole takes longer than the deadline.
  raw_client patient{site.port(), 65536};
  patient.send("GET /size/8000000 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
  const auto start = steady::now();
  std::size_t num_bytes = 0;
  for (std::size_t wanted = 500'000; !patient.ended(); wanted += 500'000) {
    num_bytes +=
      patient.read_until([&](const std::string& all) { return num_bytes + all.size() >= wanted; })
        .size();
    std::this_thread::sleep_for(20ms);
  }
  CHECK(steady::now() - start > 200ms);
  CHECK(num_bytes > 8'000'000);
}

TEST_CASE("a restarted server binds the same port at once") {
  server_options options;
  options.host = "localhost";
  auto first = std::make_unique<test_server>(options);
  options.port = first->port();
  raw_client busy{first->port()};
  busy.send("GET /echo HTTP/1.1\r\nHost: x\r\n\r\n");
  busy.read_to("GET /echo ");
  first.reset(); // closes first, so its side is left in TIME_WAIT
  test_server second{options};
  CHECK(second.port() == options.port);
  CHECK(second.answers());
}

TEST_CASE("a taken port and a foreign address are reported") {
  test_server site;
  server_options options;
  options.port = site.port();
  const auto handler = [](auto, auto) {};
  const auto taken = server::start(options, handler);
  REQUIRE_FALSE(taken);
  CHECK(taken.error().code == error_code::resource_exhausted);
  CHECK(taken.error().cause.find("127.0.0.1:" + std::to_string(site.port())) != std::string::npos);
  CHECK(taken.error().cure.find("ss -ltnp") != std::string::npos);
  CHECK(site.answers());

  options.port = 0;
  options.host = "192.0.2.1"; // reserved for documentation (RFC 5737)
  const auto foreign = server::start(options, handler);
  REQUIRE_FALSE(foreign);
  CHECK(foreign.error().code == error_code::invalid_config);
  CHECK(foreign.error().cause.find("192.0.2.1") != std::string::npos);
  CHECK_FALSE(server::start({}, {}));
}

TEST_CASE("stopping drains answers under way and closes the rest") {
  test_server site;
  raw_client idle{site.port()};
  idle.send("GET /echo HTTP/1.1\r\nHost: x\r\n\r\n");
  idle.read_to("GET /echo ");
  raw_client half{site.port()};
  half.send("GET /echo HTT");
  raw_client busy{site.port()};
  busy.send(hold_request);
  const auto answer = site.held.take();
  REQUIRE(answer);
  raw_client stuck{site.port()};
  stuck.send(hold_request);
  const auto unanswered = site.held.take();
  REQUIRE(unanswered);
  disconnect_probe probe;
  probe.watch(*unanswered);

  const auto port = site.port();
  const auto start = steady::now();
  std::thread stopper{[&] { site.running->stop(400ms); }};
  idle.read_all();
  CHECK(idle.ended());
  CHECK(half.read_all().find("503") != std::string::npos);
  CHECK_FALSE(raw_client{port}.connected());
  CHECK(probe.count == 0);
  answer->send(200, "text/plain", "finished");
  const auto got = busy.read_all();
  CHECK(got.ends_with("finished"));
  CHECK(got.find("Connection: close") != std::string::npos);
  stopper.join();
  CHECK(steady::now() - start >= 400ms);
  CHECK(steady::now() - start < 2s);
  CHECK(probe.count == 1);
  CHECK(stuck.read_all().empty());
  CHECK(stuck.ended());
  CHECK_FALSE(unanswered->send(200, "text/plain", "nobody is there"));
}

TEST_CASE("an idle server stops long before its drain deadline") {
  test_server site;
  CHECK(site.answers());
  const auto start = steady::now();
  site.running->stop(5s);
  CHECK(steady::now() - start < 1s);
}

TEST_CASE("responses may outlive their server") {
  std::shared_ptr<response> pending;
  std::shared_ptr<response> streaming;
  {
    test_server site;
    raw_client first{site.port()};
    first.send(hold_request);
    pending = site.held.take();
    raw_client second{site.port()};
    second.send(hold_request);
    streaming = site.held.take();
    REQUIRE((pending && streaming));
    streaming->begin_stream(200, "text/plain");
  }
  CHECK_FALSE(pending->send(200, "text/plain", "late"));
  CHECK_FALSE(streaming->write("late"));
  streaming->end();
}

TEST_CASE("answers race with leaving clients from many threads") {
  server_options options;
  options.num_threads = 2;
  test_server site{options};
  constexpr int num_rounds = 100;
  std::atomic<int> num_ended{0};
  std::atomic<int> num_told_twice{0};
  std::thread producer{[&] {
    for (int i = 0; i < num_rounds; ++i) {
      const auto answer = site.held.take();
      if (!answer)
        return;
      auto told = std::make_shared<std::atomic<bool>>(false);
      answer->on_disconnect([told, &num_told_twice] { num_told_twice += told->exchange(true); });
      answer->begin_stream(200, "text/plain");
      for (int k = 0; k < 50 && answer->write("piece"); ++k) {
      }
      answer->end();
      ++num_ended;
    }
  }};
  std::mt19937_64 random{3};
  for (int i = 0; i < num_rounds; ++i) {
    raw_client client{site.port()};
    client.send(hold_request);
    // A client that leaves at once may be gone before its request is read.
    client.read_until([&](const std::string& all) { return all.size() > random() % 300; }, 1s);
  }
  producer.join();
  CHECK(num_ended == num_rounds);
  CHECK(eventually([&] { return site.running->num_connections() == 0; }));
  CHECK(num_told_twice == 0);
  CHECK(site.answers());
}

TEST_CASE("connections over the limit get 503 and do no harm") {
  server_options options;
  options.max_connections = 4;
  test_server site{options};
  std::vector<raw_client> held;
  for (int i = 0; i < 4; ++i)
    held.emplace_back(site.port());
  REQUIRE(eventually([&] { return site.running->num_connections() == 4; }));
  const auto refused = fetch({"GET", site.url("/echo"), {}, {}}, 3s);
  REQUIRE(refused);
  CHECK(refused->status == 503);
  CHECK(refused->header("retry-after"));
  held.clear();
  CHECK(eventually([&] { return site.answers(); }));
}

TEST_CASE("a server out of descriptors waits instead of spinning") {
  test_server site;
  CHECK(site.answers());
  CHECK(eventually([&] { return site.running->num_connections() == 0; }));
  rlimit before{};
  REQUIRE(getrlimit(RLIMIT_NOFILE, &before) == 0);
  CHECK(before.rlim_cur == before.rlim_max); // raised by the server
  raw_client waiting{0};
  const int highest = dup(0);
  REQUIRE(highest > 0);
  close(highest);
  rlimit low = before;
  low.rlim_cur = static_cast<rlim_t>(highest);
  REQUIRE(setrlimit(RLIMIT_NOFILE, &low) == 0);
  REQUIRE(waiting.connect(site.port()));
  waiting.send("GET /echo HTTP/1.1\r\nHost: x\r\n\r\n");
  const auto cpu_before = std::clock();
  const auto early = waiting.read_all(400ms);
  const auto cpu_ms = (std::clock() - cpu_before) * 1000 / CLOCKS_PER_SEC;
  REQUIRE(setrlimit(RLIMIT_NOFILE, &before) == 0);
  CHECK(early.empty());
  CHECK(cpu_ms < 100);
  CHECK_FALSE(waiting.ended());
  CHECK(waiting.read_to("GET /echo ").find("200 OK") != std::string::npos);
}

TEST_CASE("random and mutated requests never harm the server") {
  server_options options;
  options.header_limit = 4096;
  options.body_limit = 4096;
  test_server site{options};
  std::mt19937_64 random{42};
  const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random() % n); };
  const std::vector<std::string> seeds{
    "GET /echo?a=b HTTP/1.1\r\nHost: x\r\nX-Header: y\r\n\r\n",
    "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n0123456789",
    "POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    "5;a=\"b\"\r\nhello\r\n0\r\nT: 1\r\n\r\n",
    "HEAD /stream HTTP/1.0\r\nConnection: keep-alive\r\nExpect: 100-continue\r\n\r\n",
    "GET http://h/stream HTTP/1.1\r\nHost: x\r\nConnection: close, te\r\nTE: trailers\r\n\r\n"};
  const std::vector<std::string> tokens{"\r\n",
                                        "\n",
                                        "\r",
                                        ":",
                                        " ",
                                        "\t",
                                        "%",
                                        "?",
                                        ",",
                                        "0",
                                        "-1",
                                        "ffffffffffffffff",
                                        "18446744073709551616",
                                        "chunked",
                                        "Content-Length: 5\r\n",
                                        "Transfer-Encoding: chunked\r\n",
                                        std::string(1, '\0'),
                                        "\xFF",
                                        "HTTP/1.1",
                                        "HTTP/9.9"};
  int num_answered = 0;
  for (int round = 0; round < 1500; ++round) {
    std::string bytes;
    if (below(5) == 0) {
      for (auto n = below(300); n > 0; --n)
        bytes.push_back(static_cast<char>(random()));
    } else {
      for (auto n = 1 + below(3); n > 0; --n)
        bytes += seeds[below(seeds.size())];
      for (auto n = 1 + below(4); n > 0 && !bytes.empty(); --n) {
        const auto at = below(bytes.size());
        switch (below(5)) {
        case 0: bytes[at] = static_cast<char>(random()); break;
        case 1: bytes.erase(at, 1 + below(8)); break;
        case 2: bytes.insert(at, tokens[below(tokens.size())]); break;
        case 3: bytes.insert(at, bytes.substr(below(bytes.size()), below(40))); break;
        default: bytes.resize(at); break;
        }
      }
    }
    raw_client client{site.port()};
    REQUIRE(client.connected());
    const auto cut = bytes.empty() ? 0 : below(bytes.size());
    client.send(std::string_view{bytes}.substr(0, cut));
    client.send(std::string_view{bytes}.substr(cut));
    if (round % 300 == 0)
      CHECK(site.answers());
    if (below(8) == 0)
      continue; // leaves
    client.shutdown_send();
    if (below(2) == 0)
      continue;
    const auto got = client.read_all(2s);
    CHECK(client.ended());
    CHECK((got.empty() || got.starts_with("HTTP/1.1 ")));
    num_answered += !got.empty();
  }
  CHECK(num_answered > 100);
  CHECK(site.answers());
  CHECK(eventually([&] { return site.running->num_connections() == 0; }));
}
