#include "support.hpp"

#include <algorithm>
#include <atomic>
#include <thread>

namespace troupe::transport::testing {

namespace {

using clock = std::chrono::steady_clock;

/// An endpoint that notes which thread heard how many frames.
struct listener {
  explicit listener(const std::string& name) {
    endpoint_callbacks callbacks;
    callbacks.on_frame = [this](const frame& arrived) {
      in_order = in_order && arrived.header.step() == num_heard;
      heard_by = std::this_thread::get_id();
      ++num_heard;
    };
    callbacks.on_peer_lost = [](const std::string&, std::uint64_t, const error&) {};
    auto started = endpoint::start(party::with_name(name), std::move(callbacks));
    if (!started)
      FAIL(started.error().text());
    end = std::move(*started);
  }

  bool drive_for(std::uint64_t frames, std::chrono::milliseconds limit = 20s) {
    return end->drive([&] { return num_heard >= frames; }, clock::now() + limit);
  }

  std::atomic<std::uint64_t> num_heard{0};
  std::atomic<bool> in_order{true};
  std::atomic<std::thread::id> heard_by{};
  std::unique_ptr<endpoint> end;
};

/// Two that know each other.
struct pair {
  listener a{"a"};
  listener b{"b"};

  pair() {
    a.end->connect("b", 1, b.end->address());
    b.end->connect("a", 1, a.end->address());
  }
};

void send(listener& from, const std::string& to, std::uint64_t step, const tensor& content,
          completion done = {}) {
  from.end->send(to, header(step), content.view(), std::move(done));
}

void wait_for(const std::atomic<std::uint64_t>& count, std::uint64_t wanted) {
  const auto deadline = clock::now() + 20s;
  while (count < wanted && clock::now() < deadline)
    std::this_thread::sleep_for(50us);
  REQUIRE(count >= wanted);
}

/// The median of `count` times that `work` took.
template <class Work>
std::chrono::milliseconds median_of(int count, Work&& work) {
  std::vector<clock::duration> times;
  for (int i = 0; i < count; ++i) {
    const auto begin = clock::now();
    work(i);
    times.push_back(clock::now() - begin);
  }
  std::nth_element(times.begin(), times.begin() + count / 2, times.end());
  return std::chrono::duration_cast<std::chrono::milliseconds>(times[count / 2]);
}

} // namespace

TEST_CASE("who drives hears frames of every size itself, and the progress thread does so again") {
  const carrier by{GENERATE(true, false)};
  pair both;
  const tensor small(2000, 1), large(3 << 20, 2);
  std::uint64_t step = 0;
  for (int round = 0; round < 20; ++round) {
    for (const auto* each : {&small, &large, &small}) {
      std::atomic<bool> is_inside = false;
      std::thread sender([&, step] {
        while (!is_inside)
          std::this_thread::yield();
        send(both.b, "a", step, *each);
      });
      ++step;
      CHECK(both.a.end->drive(
        [&] {
          is_inside = true;
          return both.a.num_heard >= step;
        },
        clock::now() + 20s));
      sender.join();
      CHECK(both.a.heard_by.load() == std::this_thread::get_id());
    }
    send(both.b, "a", step++, small);
    wait_for(both.a.num_heard, step);
    CHECK(both.a.heard_by.load() != std::this_thread::get_id());
  }
  CHECK(both.a.in_order);
}

TEST_CASE("after a drive the progress thread is woken by frames, not by its timer") {
  const carrier by{GENERATE(true, false)};
  pair both;
  const tensor t(2000, 1);
  std::uint64_t step = 0;
  send(both.b, "a", step++, t);
  REQUIRE(both.a.drive_for(step));
  const auto median = median_of(9, [&](int) {
    CHECK(!both.a.drive_for(step + 1, 2ms));
    send(both.b, "a", step++, t);
    wait_for(both.a.num_heard, step);
  });
  CHECK(median < 50ms); // the timer's period is 100
}

TEST_CASE("a drive ends at its deadline and when it is interrupted") {
  const carrier by{GENERATE(true, false)};
  pair both;
  const auto begin = clock::now();
  CHECK(!both.a.drive_for(1, 30ms));
  CHECK(clock::now() - begin >= 30ms);

  std::atomic<bool> flag = false;
  const auto median = median_of(9, [&](int) {
    flag = false;
    std::thread other([&] {
      std::this_thread::sleep_for(5ms);
      flag = true;
      both.a.end->interrupt();
    });
    CHECK(both.a.end->drive([&] { return flag.load(); }, clock::now() + 20s));
    other.join();
  });
  CHECK(median < 50ms);
}

TEST_CASE("a second one that would drive is sent away at once") {
  const carrier by{GENERATE(true, false)};
  pair both;
  std::atomic<bool> flag = false, is_inside = false;
  std::thread first([&] {
    both.a.end->drive(
      [&] {
        is_inside = true;
        return flag.load();
      },
      clock::now() + 20s);
  });
  while (!is_inside)
    std::this_thread::yield();
  const auto begin = clock::now();
  CHECK(!both.a.drive_for(1));
  CHECK(clock::now() - begin < 10s);
  flag = true;
  both.a.end->interrupt();
  first.join();
}

TEST_CASE("commands are carried out while somebody drives") {
  const carrier by{GENERATE(true, false)};
  pair both;
  std::atomic<bool> flag = false;
  std::thread driver([&] { both.a.end->drive([&] { return flag.load(); }, clock::now() + 20s); });
  const tensor t(100, 1);
  std::uint64_t step = 0;
  const auto median = median_of(9, [&](int) {
    send(both.a, "b", step++, t);
    wait_for(both.b.num_heard, step);
  });
  CHECK(median < 50ms);
  std::atomic<int> num_failed = 0;
  both.a.end->disconnect("b");
  send(both.a, "b", step, t, [&](const expected<void>& sent) { num_failed += !sent; });
  const auto deadline = clock::now() + 20s;
  while (num_failed == 0 && clock::now() < deadline)
    std::this_thread::sleep_for(1ms);
  CHECK(num_failed == 1);
  flag = true;
  both.a.end->interrupt();
  driver.join();
}

TEST_CASE("a driver is woken by a frame of another thread of its own process") {
  const carrier by{GENERATE(true, false)};
  listener own{"own"};
  const tensor t(100, 1);
  std::uint64_t step = 0;
  const auto median = median_of(9, [&](int) {
    std::thread sender([&, step] {
      std::this_thread::sleep_for(5ms); // the driver sleeps by then
      send(own, "own", step, t);
    });
    ++step;
    CHECK(own.drive_for(step));
    sender.join();
  });
  CHECK(median < 50ms);
}

TEST_CASE("a driver keeps its deadline while frames pour in") {
  const carrier by{GENERATE(true, false)};
  pair both;
  const tensor t(2000, 1);
  std::atomic<bool> over = false;
  std::thread sender([&] {
    for (std::uint64_t step = 0; !over; ++step)
      send(both.b, "a", step, t);
  });
  const auto begin = clock::now();
  CHECK(!both.a.end->drive([] { return false; }, begin + 100ms));
  CHECK(clock::now() - begin < 10s);
  over = true;
  sender.join();
}

TEST_CASE("stop ends a drive") {
  const carrier by{GENERATE(true, false)};
  for (int round = 0; round < 10; ++round) {
    pair both;
    std::atomic<bool> is_inside = false;
    std::thread driver([&] {
      both.a.end->drive(
        [&] {
          is_inside = true;
          return false;
        },
        clock::now() + 20s);
    });
    while (!is_inside)
      std::this_thread::yield();
    const auto begin = clock::now();
    both.a.end->stop(0ms);
    driver.join();
    CHECK(clock::now() - begin < 10s);
    CHECK(!both.a.drive_for(1, 20s)); // and after it nobody can
    CHECK(clock::now() - begin < 10s);
  }
}

TEST_CASE("a completion may send, whichever thread it runs on") {
  const carrier by{GENERATE(true, false)};
  pair both;
  const tensor t(100, 1);
  std::uint64_t step = 0;
  const auto median = median_of(9, [&](int) {
    const auto first = step;
    step += 3;
    send(both.a, "b", first, t, [&, first](const expected<void>&) {
      send(both.a, "b", first + 1, t,
           [&, first](const expected<void>&) { send(both.a, "b", first + 2, t); });
    });
    wait_for(both.b.num_heard, step);
  });
  CHECK(median < 50ms);
  CHECK(both.b.in_order);
}

TEST_CASE("nothing is lost or doubled while drivers come and go and everybody sends") {
  const carrier by{GENERATE(true, false)};
  std::mt19937_64 seeds{71};
  pair both;
  constexpr std::uint64_t per_sender = 400;
  std::atomic<std::uint64_t> num_sent = 0;
  std::atomic<bool> over = false;
  const tensor small(700, 1), large(200000, 2);
  struct side {
    listener* own;
    std::string other;
  };
  std::vector<std::thread> threads;
  for (const auto& one : {side{&both.a, "b"}, side{&both.b, "a"}}) {
    // Frames of one sending thread stay in order; several would mix their steps.
    threads.emplace_back([&, one, seed = seeds()] {
      std::mt19937_64 random{seed};
      for (std::uint64_t step = 0; step < per_sender; ++step) {
        send(*one.own, one.other, step, random() % 8 == 0 ? large : small,
             [&](const expected<void>& sent) { num_sent += sent.has_value(); });
        if (random() % 4 == 0)
          std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
      }
    });
    for (int i = 0; i < 2; ++i)
      threads.emplace_back([&, one, seed = seeds()] {
        std::mt19937_64 random{seed};
        while (!over) {
          one.own->drive_for(one.own->num_heard + random() % 20,
                             std::chrono::milliseconds(random() % 4));
          if (random() % 3 == 0)
            one.own->end->interrupt();
          std::this_thread::sleep_for(std::chrono::microseconds(random() % 200));
        }
      });
  }
  wait_for(both.a.num_heard, per_sender);
  wait_for(both.b.num_heard, per_sender);
  wait_for(num_sent, 2 * per_sender);
  over = true;
  for (auto& each : threads)
    each.join();
  CHECK(both.a.num_heard == per_sender);
  CHECK(both.b.num_heard == per_sender);
  CHECK(both.a.in_order);
  CHECK(both.b.in_order);
}

} // namespace troupe::transport::testing
