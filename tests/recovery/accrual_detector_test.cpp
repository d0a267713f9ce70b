#include "troupe/recovery/accrual_detector.hpp"

#include <catch2/catch.hpp>

#include <algorithm>
#include <cmath>
#include <random>

using namespace std::chrono_literals;
using troupe::recovery::accrual_detector;

namespace {

using duration = accrual_detector::duration;

constexpr accrual_detector::time_point start{1h};

/// Silence behind the last heartbeat at which phi reaches `level`, to a millisecond.
duration patience(const accrual_detector& peer, accrual_detector::time_point last,
                  double level = 8) {
  for (auto silent = 0ms; silent < 1min; ++silent)
    if (peer.phi(last + silent) >= level)
      return silent;
  return 1h;
}

} // namespace

TEST_CASE("phi has the values of the logistic approximation") {
  // One heartbeat: mean 100 ms, deviation 25 ms. Values by hand of
  // log10(1 + exp(y (1.5976 + 0.070566 y^2))); the exact normal tail in brackets.
  accrual_detector peer(100ms, 0ms);
  peer.heartbeat(start);
  CHECK(peer.phi(start + 50ms) == Approx(0.0100).margin(0.0005));    // y = -2 (0.0100)
  CHECK(peer.phi(start + 100ms) == Approx(0.30103).margin(0.00001)); // y = 0 (0.3010)
  CHECK(peer.phi(start + 125ms) == Approx(0.79951).margin(0.0001));  // y = 1 (0.7995)
  CHECK(peer.phi(start + 150ms) == Approx(1.6429).margin(0.0005));   // y = 2 (1.6430)
  CHECK(peer.phi(start + 200ms) == Approx(4.7367).margin(0.0005));   // y = 4 (4.4993)
  CHECK(peer.phi(start + 250ms) == Approx(10.7826).margin(0.001));   // y = 6 (9.0059)
  // Far out it is still a number and still grows.
  CHECK(std::isfinite(peer.phi(start + 24h)));
  CHECK(peer.phi(start + 24h) > peer.phi(start + 23h));
}

TEST_CASE("nobody is suspected before the first heartbeat, and one is enough to begin") {
  accrual_detector peer(100ms, 300ms);
  CHECK(peer.phi(start + 1h) == 0);
  CHECK(peer.silence(start + 1h) == 0ms);
  peer.heartbeat(start);
  CHECK(peer.silence(start + 250ms) == 250ms);
  CHECK(peer.phi(start + 300ms) == 0);
  CHECK(peer.phi(start + 301ms) > 8);
  peer.reset();
  CHECK(peer.phi(start + 1h) == 0);
  CHECK(peer.silence(start + 1h) == 0ms);
  peer.heartbeat(start + 1h);
  CHECK(peer.phi(start + 1h + 100ms) == 0);
}

TEST_CASE("regular heartbeats are never suspicious, their end soon is") {
  accrual_detector peer(100ms, 0ms);
  auto now = start;
  for (int i = 0; i < 1000; ++i) {
    peer.heartbeat(now);
    for (auto silent = 0ms; silent <= 100ms; silent += 10ms)
      REQUIRE(peer.phi(now + silent) < 0.5);
    now += 100ms;
  }
  const auto last = now - 100ms;
  const auto found = patience(peer, last);
  CHECK(found > 120ms);
  CHECK(found < 200ms);
}

TEST_CASE("jittery heartbeats need longer") {
  auto previous = 0ns;
  for (const int jitter : {0, 40, 80, 160, 320}) {
    std::mt19937 random(7);
    std::uniform_int_distribution<> late(0, jitter);
    accrual_detector peer(100ms, 0ms);
    auto now = start;
    double worst = 0;
    peer.heartbeat(now);
    for (int i = 0; i < 500; ++i) {
      const auto next = now + 100ms + late(random) * 1ms;
      if (i > 100) // it knows its peer
        worst = std::max(worst, peer.phi(next));
      now = next;
      peer.heartbeat(now);
    }
    const auto found = patience(peer, now);
    INFO("jitter " << jitter << " ms: " << found / 1ms << " ms, worst phi " << worst);
    CHECK(worst < 4);
    CHECK(found > previous);
    previous = found;
  }
  CHECK(previous < 1s);
}

TEST_CASE("a peer that is quicker than agreed may be as slow as agreed") {
  accrual_detector peer(100ms, 0ms);
  auto now = start;
  for (int i = 0; i < 200; ++i)
    peer.heartbeat(now += 1ms);
  CHECK(peer.phi(now + 100ms) < 0.5);
}

TEST_CASE("one long failure does not hide the next") {
  accrual_detector peer(50ms, 400ms);
  auto now = start;
  for (int i = 0; i < 50; ++i)
    peer.heartbeat(now += 50ms);
  peer.heartbeat(now += 1h);
  for (int i = 0; i < 5; ++i)
    peer.heartbeat(now += 50ms);
  CHECK(patience(peer, now) <= 600ms);
}

TEST_CASE("suspicion never falls in silence, for any history") {
  for (std::uint32_t seed = 0; seed < 200; ++seed) {
    std::mt19937 random(seed);
    const auto any = [&](int from, int to) {
      return std::uniform_int_distribution<>(from, to)(random);
    };
    accrual_detector peer(any(10, 500) * 1ms, any(0, 1000) * 1ms);
    auto now = start;
    for (int i = any(1, 300); i > 0; --i)
      peer.heartbeat(now += any(0, any(1, 5000)) * 1ms);
    double before = 0;
    for (auto silent = 0ms; silent < 10s; silent += 5ms) {
      const auto phi = peer.phi(now + silent);
      INFO("seed " << seed << ", silent for " << silent / 1ms << " ms");
      REQUIRE(std::isfinite(phi));
      REQUIRE(phi >= before);
      before = phi;
    }
    // However unsteady the peer has been, the end comes: at worst in about four least patiences.
    CHECK(before > 8);
  }
}

TEST_CASE("an observer that paused suspects nobody for it") {
  accrual_detector peer(50ms, 200ms);
  accrual_detector twin(50ms, 200ms);
  auto now = start;
  for (int i = 0; i < 100; ++i) {
    now += 50ms;
    peer.heartbeat(now);
    twin.heartbeat(now);
  }
  peer.observer_paused(10s);
  CHECK(peer.silence(now + 5s) == 0ms);
  CHECK(peer.phi(now + 10s + 150ms) == 0);
  for (auto silent = 0ms; silent < 1s; silent += 10ms)
    CHECK(peer.phi(now + 10s + silent) == twin.phi(now + silent));
  // The pause is no lesson either.
  peer.heartbeat(now + 10s + 50ms);
  twin.heartbeat(now + 50ms);
  CHECK(patience(peer, now + 10s + 50ms) == patience(twin, now + 50ms));
}
