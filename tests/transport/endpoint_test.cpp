#include "support.hpp"

#include "troupe/transport/checksum.hpp"

#include <atomic>
#include <thread>

namespace troupe::transport::testing {

namespace {

constexpr std::size_t kib = 1024;
constexpr std::size_t mib = 1024 * kib;

/// The limit between UCX's protocols lies between these two here.
constexpr std::size_t eager_size = 2 * kib;
constexpr std::size_t rendezvous_size = 4 * mib;

} // namespace

TEST_CASE("XXH3 is the published function") {
  // Of the empty input, from the xxHash sanity checks (tests/sanity_test_vectors.h).
  CHECK(checksum({}) == 0x2D06800538D394C2ULL);
  const std::string text = "troupe";
  auto bytes = std::as_bytes(std::span{text.data(), text.size()});
  const auto before = checksum(bytes);
  CHECK(before != checksum(bytes.first(5)));
  CHECK(before == checksum(bytes));
}

TEST_CASE("frames of every size arrive exact and in order, both ways") {
  const carrier by{GENERATE(true, false)};
  party a{"a", 11};
  party b{"b", 22};
  connect_both(a, b);
  std::vector<tensor> sent;
  for (const std::size_t size : {std::size_t{0}, std::size_t{1}, 4 * kib, 64 * kib, 4 * mib,
                                 64 * mib, std::size_t{17}, std::size_t{0}})
    sent.emplace_back(size, size + 1);
  for (std::size_t i = 0; i < sent.size(); ++i) {
    a.send(b, i, sent[i]);
    b.send(a, i, sent[i]);
  }
  for (auto* each : {&a, &b}) {
    REQUIRE(each->heard.wait_frames(sent.size()));
    REQUIRE(each->heard.wait_outcomes(sent.size()));
    const auto& other = each == &a ? b : a;
    for (std::size_t i = 0; i < sent.size(); ++i) {
      const auto& [head, payload] = each->heard.frames[i];
      CHECK(head.step() == i);
      CHECK(head.kind() == proto::BOUNDARY);
      CHECK(head.sender() == other.name);
      CHECK(head.sender_incarnation() == other.incarnation);
      CHECK(sent[i].equals(payload));
      CHECK(each->heard.outcomes[i]);
    }
    CHECK(each->heard.drops.empty());
    CHECK(each->heard.losses.empty());
  }
  for (const auto& each : sent)
    CHECK(each.memory.use_count() == 1);
}

TEST_CASE("an endpoint may be opened before it is known whose it is") {
  const carrier by{GENERATE(true, false)};
  party a{"a"};
  party b{party::with_name("", 0)};
  b.end->identify("b", 5);
  b.name = "b";
  b.incarnation = 5;
  connect_both(a, b);
  tensor t(1000, 1);
  a.send(b, 1, t);
  b.send(a, 2, t);
  REQUIRE(b.heard.wait_frames(1));
  REQUIRE(a.heard.wait_frames(1));
  CHECK(a.heard.frames[0].header.sender() == "b");
  CHECK(a.heard.frames[0].header.sender_incarnation() == 5);
  b.send(b, 3, t); // to itself
  REQUIRE(b.heard.wait_frames(2));
  b.end.reset();
  REQUIRE(a.heard.wait_losses(1));
  CHECK(a.heard.losses[0].name == "b");
}

TEST_CASE("eager frames do not overtake a rendezvous before them") {
  const carrier by{GENERATE(true, false)};
  party a{"a"};
  party b{"b"};
  a.connect(b);
  std::mt19937_64 random{3};
  std::vector<tensor> sent;
  for (int i = 0; i < 300; ++i)
    sent.emplace_back(random() % (std::size_t{1} << (random() % 23)), i);
  for (std::size_t i = 0; i < sent.size(); ++i)
    a.send(b, i, sent[i]);
  REQUIRE(b.heard.wait_frames(sent.size()));
  for (std::size_t i = 0; i < sent.size(); ++i) {
    REQUIRE(b.heard.frames[i].header.step() == i);
    REQUIRE(sent[i].equals(b.heard.frames[i].payload));
  }
}

TEST_CASE("many threads send to several peers at once") {
  const carrier by{GENERATE(true, false)};
  constexpr int num_threads = 4;
  constexpr int num_frames = 400;
  party a{"a"};
  party b{"b"};
  party c{"c"};
  a.connect(b);
  a.connect(c);
  std::vector<std::thread> threads;
  for (int t = 0; t < num_threads; ++t)
    threads.emplace_back([&, t] {
      for (int i = 0; i < num_frames; ++i) {
        auto head = header(i);
        head.set_actor_index(t);
        const tensor content{static_cast<std::size_t>(i * 97 % 40000), t * 1000ULL + i};
        a.end->send(i % 2 == 0 ? "b" : "c", head, content.view(), a.heard.outcome());
      }
    });
  for (auto& each : threads)
    each.join();
  REQUIRE(a.heard.wait_outcomes(num_threads * num_frames));
  for (const auto& each : a.heard.outcomes)
    REQUIRE(each);
  for (auto* receiver : {&b, &c}) {
    REQUIRE(receiver->heard.wait_frames(num_threads * num_frames / 2));
    std::vector<std::int64_t> last(num_threads, -1);
    for (const auto& [head, payload] : receiver->heard.frames) {
      const auto t = head.actor_index();
      REQUIRE(static_cast<std::int64_t>(head.step()) > last[t]);
      last[t] = static_cast<std::int64_t>(head.step());
      REQUIRE(tensor{head.step() * 97 % 40000, t * 1000ULL + head.step()}.equals(payload));
    }
  }
}

TEST_CASE("a process sends to itself, and a callback may send") {
  const carrier by{GENERATE(true, false)};
  party a{"a", 5};
  const tensor content{64 * kib, 1};
  a.send(a, 1, content);
  a.send(a, 2, tensor{0, 0});
  REQUIRE(a.heard.wait_frames(2));
  REQUIRE(a.heard.wait_outcomes(2));
  CHECK(content.equals(a.heard.frames[0].payload));
  CHECK(a.heard.frames[0].header.sender() == "a");
  CHECK(a.heard.frames[0].header.sender_incarnation() == 5);
  CHECK(a.heard.frames[1].header.step() == 2);

  std::atomic<int> hops{0};
  endpoint* self = nullptr;
  auto relay = endpoint::start(party::with_name("relay"),
                               {[&](frame arrived) {
                                  if (++hops < 10)
                                    self->send("relay", arrived.header, {}, nullptr);
                                },
                                [](const std::string&, std::uint64_t, const error&) {},
                                {}});
  REQUIRE(relay);
  self = relay->get();
  self->send("relay", header(0), {}, nullptr);
  for (int i = 0; i < 2000 && hops < 10; ++i)
    std::this_thread::sleep_for(1ms);
  CHECK(hops == 10);
}

TEST_CASE("a send to an unknown peer fails") {
  const carrier by{GENERATE(true, false)};
  party a{"a"};
  a.end->send("nobody", header(1), {}, a.heard.outcome());
  REQUIRE(a.heard.wait_outcomes(1));
  REQUIRE_FALSE(a.heard.outcomes[0]);
  CHECK(a.heard.outcomes[0].error().code == error_code::peer_lost);
  CHECK_THAT(a.heard.outcomes[0].error().cause, Catch::Contains("nobody"));
}

TEST_CASE("frames over a limit are refused, and the next ones pass") {
  const carrier by{GENERATE(true, false)};
  auto strict = party::with_name("b");
  strict.max_payload = eager_size - 1;
  party a{"a"};
  party b{strict};
  connect_both(a, b);

  SECTION("an eager payload at its receiver") {
    a.send(b, 1, tensor{eager_size, 1});
    REQUIRE(b.heard.wait_drops(1));
    CHECK(b.heard.drops[0].why.code == error_code::too_large);
    CHECK(b.heard.drops[0].header.step() == 1);
    REQUIRE(a.heard.wait_outcomes(1));
  }
  SECTION("a large payload, of which the sender hears if it goes by rendezvous") {
    a.send(b, 1, tensor{rendezvous_size, 1});
    REQUIRE(b.heard.wait_drops(1));
    CHECK(b.heard.drops[0].why.code == error_code::too_large);
    REQUIRE(a.heard.wait_outcomes(1));
    REQUIRE(a.heard.outcomes[0].has_value() == carrier::rings);
    if (!carrier::rings)
      CHECK(a.heard.outcomes[0].error().code == error_code::too_large);
  }
  SECTION("a payload at its sender") {
    b.send(a, 1, tensor{eager_size, 1});
    REQUIRE(b.heard.wait_outcomes(1));
    REQUIRE_FALSE(b.heard.outcomes[0]);
    CHECK(b.heard.outcomes[0].error().code == error_code::too_large);
    b.heard.clear();
    a.send(b, 1, tensor{0, 0});
    REQUIRE(a.heard.wait_outcomes(1));
    REQUIRE(b.heard.wait_frames(1));
    b.heard.clear();
  }
  a.heard.clear();
  a.send(b, 2, tensor{eager_size - 1, 2});
  REQUIRE(b.heard.wait_frames(1));
  CHECK(b.heard.frames[0].header.step() == 2);
  CHECK(a.heard.losses.empty());
}

TEST_CASE("a header that does not fit is refused") {
  const carrier by{GENERATE(true, false)};
  party a{party::with_name(std::string(100000, 'x'))};
  party b{"b"};
  a.connect(b);
  a.send(b, 1, tensor{10, 1});
  REQUIRE(a.heard.wait_outcomes(1));
  REQUIRE_FALSE(a.heard.outcomes[0]);
  CHECK(a.heard.outcomes[0].error().code == error_code::too_large);
}

TEST_CASE("an older incarnation is fenced off") {
  const carrier by{GENERATE(true, false)};
  party b{"b"};
  party old_a{"a", 1};
  party new_a{"a", 2};
  connect_both(old_a, b);
  old_a.send(b, 1, tensor{10, 1});
  REQUIRE(b.heard.wait_frames(1));

  b.connect(new_a);
  new_a.connect(b);
  new_a.send(b, 2, tensor{10, 2});
  REQUIRE(b.heard.wait_frames(2));
  CHECK(b.heard.frames[1].header.sender_incarnation() == 2);
  // The old one was cut off, and reports so; it tries again.
  REQUIRE(old_a.heard.wait_losses(1));
  CHECK(old_a.heard.losses[0].name == "b");
  CHECK(old_a.heard.losses[0].why.code == error_code::peer_lost);
  old_a.heard.clear();
  old_a.connect(b);
  old_a.send(b, 3, tensor{eager_size, 3});
  old_a.send(b, 4, tensor{rendezvous_size, 4});
  REQUIRE(b.heard.wait_drops(2));
  for (const auto& each : b.heard.drops)
    CHECK(each.why.code == error_code::stale_epoch);
  REQUIRE(old_a.heard.wait_outcomes(2));
  REQUIRE_FALSE(old_a.heard.outcomes[1]);
  CHECK(old_a.heard.outcomes[1].error().code == error_code::stale_epoch);
  CHECK(b.heard.frames.size() == 2);

  b.connect(old_a);
  REQUIRE(b.heard.wait_losses(1));
  CHECK(b.heard.losses[0].incarnation == 1);
  CHECK(b.heard.losses[0].why.code == error_code::stale_epoch);
  b.send(new_a, 5, tensor{10, 5});
  REQUIRE(new_a.heard.wait_frames(1));
}

TEST_CASE("connecting the same incarnation again changes nothing") {
  const carrier by{GENERATE(true, false)};
  party a{"a"};
  party b{"b"};
  connect_both(a, b);
  for (int i = 0; i < 20; ++i) {
    a.send(b, i, tensor{static_cast<std::size_t>(i) * 20000, 1});
    connect_both(a, b);
  }
  REQUIRE(b.heard.wait_frames(20));
  CHECK(a.heard.losses.empty());
  CHECK(b.heard.losses.empty());
}

TEST_CASE("disconnect drops both ways until the peer is connected again") {
  const carrier by{GENERATE(true, false)};
  party a{"a"};
  party b{"b"};
  connect_both(a, b);
  a.send(b, 1, tensor{10, 1});
  b.send(a, 1, tensor{10, 1});
  REQUIRE(b.heard.wait_frames(1));
  REQUIRE(a.heard.wait_frames(1));
  a.end->disconnect("b");
  a.send(b, 2, tensor{10, 1});
  REQUIRE(a.heard.wait_outcomes(2));
  REQUIRE_FALSE(a.heard.outcomes[1]);
  CHECK(a.heard.outcomes[1].error().code == error_code::peer_lost);
  REQUIRE(b.heard.wait_losses(1));
  CHECK(a.heard.losses.empty());
  b.connect(a);
  b.send(a, 3, tensor{10, 1});
  REQUIRE(a.heard.wait_drops(1));
  CHECK(a.heard.drops[0].why.code == error_code::stale_epoch);
  connect_both(a, b);
  a.send(b, 4, tensor{10, 1});
  REQUIRE(b.heard.wait_frames(2)); // hence `a` has lifted its fence
  b.send(a, 4, tensor{10, 1});
  REQUIRE(a.heard.wait_frames(2));
  CHECK(a.heard.frames[1].header.step() == 4);
}

TEST_CASE("damage on the way is detected") {
  const carrier by{GENERATE(true, false)};
  const tensor content{GENERATE(eager_size, rendezvous_size), 1};
  const bool verified = GENERATE(true, false);
  auto damaging = party::with_name("a");
  damaging.tamper_header = [&](std::string&) { (*content.memory)[100] ^= std::byte{4}; };
  auto receiving = party::with_name("b");
  receiving.checksums = verified;
  party a{damaging};
  party b{receiving};
  a.connect(b);
  a.send(b, 7, content);
  if (verified) {
    REQUIRE(b.heard.wait_drops(1));
    CHECK(b.heard.drops[0].why.code == error_code::io_failed);
    CHECK(b.heard.drops[0].header.step() == 7);
    CHECK(b.heard.frames.empty());
  } else {
    REQUIRE(b.heard.wait_frames(1));
    CHECK(content.equals(b.heard.frames[0].payload));
  }
}

TEST_CASE("a sender may leave checksums out") {
  const carrier by{GENERATE(true, false)};
  auto plain = party::with_name("a");
  plain.checksums = false;
  party a{plain};
  party b{"b"};
  a.connect(b);
  a.send(b, 1, tensor{eager_size, 1});
  REQUIRE(b.heard.wait_frames(1));
  CHECK(b.heard.frames[0].header.checksum() == 0);
}

TEST_CASE("headers of garbage do no harm") {
  const carrier by{GENERATE(true, false)};
  std::mt19937_64 random{11};
  std::atomic<int> sent{0};
  auto garbling = party::with_name("a");
  garbling.tamper_header = [&](std::string& wire) {
    if (++sent > 200)
      return;
    wire.assign(sent == 1 ? 0 : random() % 300, '\0');
    for (auto& each : wire)
      each = static_cast<char>(random());
  };
  party a{garbling};
  party b{"b"};
  connect_both(a, b);
  for (int i = 0; i < 200; ++i)
    a.send(b, i, tensor{i % 10 == 0 ? rendezvous_size : eager_size, 1});
  a.send(b, 1000, tensor{eager_size, 2});
  REQUIRE(a.heard.wait_outcomes(201));
  // Some garbage may happen to be a message of Protobuf's; none names a connected sender.
  REQUIRE(b.heard.wait([&] { return b.heard.frames.size() + b.heard.drops.size() == 201; }));
  REQUIRE(b.heard.drops.size() > 150);
  CHECK(b.heard.frames.back().header.step() == 1000);
  CHECK(a.heard.losses.empty());
  CHECK(b.heard.losses.empty());
}

TEST_CASE("a damaged address is reported, not believed") {
  const carrier by{GENERATE(true, false)};
  party a{"a"};
  party b{"b"};
  auto address = b.end->address();
  std::mt19937_64 random{13};
  std::size_t expected_losses = 0;
  for (int i = 0; i < 50; ++i) {
    auto damaged = address;
    damaged[random() % damaged.size()] ^= static_cast<char>(1 + random() % 255);
    a.end->connect("b", 1, damaged);
    ++expected_losses;
  }
  for (const std::size_t length : {std::size_t{0}, std::size_t{8}, address.size() - 1}) {
    a.end->connect("b", 1, address.substr(0, length));
    ++expected_losses;
  }
  REQUIRE(a.heard.wait_losses(expected_losses));
  CHECK(a.heard.losses[0].name == "b");
  CHECK(a.heard.losses[0].why.code == error_code::invalid_request);
  a.connect(b);
  a.send(b, 1, tensor{10, 1});
  REQUIRE(b.heard.wait_frames(1));
}

TEST_CASE("stop delivers what was sent, ends every send and is noticed by the peer") {
  const carrier by{GENERATE(true, false)};
  party a{"a"};
  party b{"b"};
  connect_both(a, b);
  constexpr std::size_t count = 40;
  for (std::size_t i = 0; i < count; ++i)
    a.send(b, i, tensor{i % 2 == 0 ? eager_size : rendezvous_size, i});
  a.end->stop(10s);
  CHECK(a.heard.outcomes.size() == count);
  for (const auto& each : a.heard.outcomes)
    CHECK(each);
  REQUIRE(b.heard.wait_frames(count));
  REQUIRE(b.heard.wait_losses(1));
  CHECK(b.heard.losses[0].name == "a");

  a.send(b, 99, tensor{10, 1});
  a.send(a, 99, tensor{10, 1});
  REQUIRE(a.heard.outcomes.size() == count + 2);
  REQUIRE_FALSE(a.heard.outcomes[count]);
  CHECK(a.heard.outcomes[count].error().code == error_code::unavailable);
  CHECK(a.heard.outcomes[count + 1].error().code == error_code::unavailable);
  a.end->stop();
}

TEST_CASE("stopping while others send ends every send once") {
  const carrier by{GENERATE(true, false)};
  for (int round = 0; round < 12; ++round) {
    party a{"a"};
    party b{"b"};
    connect_both(a, b);
    std::atomic<int> posted{0};
    std::atomic<int> ended{0};
    std::atomic<bool> enough{false};
    std::vector<std::thread> threads;
    for (int t = 0; t < 2; ++t)
      threads.emplace_back([&] {
        const tensor content{256 * kib, 1};
        while (!enough) {
          ++posted;
          a.end->send("b", header(1), content.view(), [&](expected<void>) { ++ended; });
          while (posted - ended > 16 && !enough)
            std::this_thread::yield();
        }
      });
    std::this_thread::sleep_for(20ms);
    if (round % 3 == 2) { // one hears of the other's end while it ends itself
      std::thread ending{[&] { a.end->stop(0ms); }};
      std::this_thread::sleep_for(std::chrono::microseconds{round * 150});
      b.end->stop(0ms);
      ending.join();
    } else {
      (round % 3 == 0 ? a : b).end->stop(0ms);
    }
    std::this_thread::sleep_for(5ms);
    enough = true;
    for (auto& each : threads)
      each.join();
    a.end->stop(1s);
    CHECK(ended == posted);
  }
}

TEST_CASE("an endpoint that cannot start says why") {
  const carrier by{GENERATE(true, false)};
  auto wrong = party::with_name("a");
  wrong.interface = "no-such-device0";
  recorder heard;
  const auto started = endpoint::start(wrong, heard.callbacks());
  REQUIRE_FALSE(started);
  CHECK(started.error().code == error_code::unavailable);
  CHECK_THAT(started.error().cause, Catch::Contains("no-such-device0"));
  const auto deaf = endpoint::start(party::with_name("a"), {});
  REQUIRE_FALSE(deaf);
  CHECK(deaf.error().code == error_code::invalid_request);
}

TEST_CASE("spinning endpoints talk as well") {
  const carrier by{GENERATE(true, false)};
  auto options = party::with_name("a");
  options.spin = 50us;
  party a{options};
  party b{"b"};
  connect_both(a, b);
  for (int i = 0; i < 20; ++i) {
    a.send(b, i, tensor{eager_size, 1});
    b.send(a, i, tensor{eager_size, 1});
  }
  REQUIRE(a.heard.wait_frames(20));
  REQUIRE(b.heard.wait_frames(20));
}

} // namespace troupe::transport::testing
