#include "troupe/base/fault_board.hpp"
#include "troupe/base/fault_point.hpp"
#include "troupe/base/identity.hpp"

#include <catch2/catch.hpp>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include <fmt/format.h>
#include <sys/wait.h>
#include <unistd.h>

using namespace troupe;
using namespace troupe::faults;

namespace {

/// A board that arms this process as "node-1/worker-0" while it lives.
struct armed_board {
  std::filesystem::path file =
    std::filesystem::temp_directory_path() / fmt::format("troupe-board-{}", ::getpid());
  std::string name_before = process_name();
  board rules = std::move(board::create(file).value());

  armed_board() {
    set_process_name("node-1/worker-0");
    ::setenv(board::variable, rules.value().c_str(), 1);
    REQUIRE(arm());
  }
  ~armed_board() {
    ::unsetenv(board::variable);
    (void)arm();
    set_process_name(name_before);
    std::filesystem::remove(file);
  }
};

rule dropping(std::string process = "*") {
  rule r;
  r.process = std::move(process);
  r.where = point::frame_send;
  r.what = kind::drop;
  return r;
}

/// Runs `body` in a child and returns its wait status; kills it after `patience`.
template <class Body>
int run_child(Body body, std::chrono::milliseconds patience = std::chrono::seconds(10)) {
  const auto pid = ::fork();
  if (pid == 0) {
    body();
    ::_exit(0);
  }
  int status = 0;
  for (auto left = patience; left.count() > 0; left -= std::chrono::milliseconds(5)) {
    if (::waitpid(pid, &status, WNOHANG) == pid)
      return status;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  ::kill(pid, SIGKILL);
  ::waitpid(pid, &status, 0);
  return status;
}

} // namespace

TEST_CASE("globs know the star only") {
  CHECK(detail::matches("*", ""));
  CHECK(detail::matches("*", "node-1"));
  CHECK(detail::matches("node-1", "node-1"));
  CHECK_FALSE(detail::matches("node-1", "node-10"));
  CHECK_FALSE(detail::matches("node-10", "node-1"));
  CHECK(detail::matches("node-1*", "node-10"));
  CHECK(detail::matches("node-1/*", "node-1/worker-0"));
  CHECK_FALSE(detail::matches("node-1/*", "node-1"));
  CHECK(detail::matches("*worker-0", "node-1/worker-0"));
  CHECK(detail::matches("*/*-0", "node-1/worker-0"));
  CHECK_FALSE(detail::matches("*/*-1", "node-1/worker-0"));
  CHECK(detail::matches("a*b*c", "a-b-b-c"));
  CHECK_FALSE(detail::matches("a*b*c", "a-b-b-d"));
  CHECK(detail::matches("**", "x"));
  CHECK(detail::matches("", ""));
  CHECK_FALSE(detail::matches("", "x"));
  CHECK_FALSE(detail::matches("?", "x"));
}

TEST_CASE("every point and kind has a name of its own that leads back to it") {
  for (std::size_t i = 0; i < num_points; ++i) {
    const auto where = static_cast<point>(i);
    CHECK(point_named(to_string(where)) == where);
  }
  for (std::size_t i = 0; i < num_kinds; ++i) {
    const auto what = static_cast<kind>(i);
    CHECK(kind_named(to_string(what)) == what);
  }
  CHECK(to_string(point::frontend_replaying) == "frontend.replaying");
  CHECK(to_string(kind::crash) == "crash");
  CHECK_FALSE(point_named("frame.sent"));
  CHECK_FALSE(kind_named(""));
}

TEST_CASE("without a board nothing goes wrong") {
  ::unsetenv(board::variable);
  REQUIRE(arm());
  CHECK_FALSE(hit(point::frame_send, "node-2"));
  CHECK_FALSE(is_cut_off("node-2"));
}

TEST_CASE("a rule strikes where process, peer and point match, until it is removed") {
  armed_board b;
  CHECK_FALSE(hit(point::frame_send, "node-2"));
  auto r = dropping("node-1/*");
  r.peer = "node-2*";
  r.delay_ms = 7;
  const auto number = b.rules.add(r);
  REQUIRE(number);
  CHECK_FALSE(hit(point::frame_send, "node-3"));
  CHECK_FALSE(hit(point::frame_send));
  CHECK_FALSE(hit(point::compute, "node-2"));
  const auto struck = hit(point::frame_send, "node-2/worker-1");
  REQUIRE(struck);
  CHECK(struck->what == kind::drop);
  CHECK(struck->delay_ms == 7);
  CHECK(b.rules.num_hits(*number) == 1);

  set_process_name("node-7/worker-0"); // a standby has taken another worker's name
  CHECK_FALSE(hit(point::frame_send, "node-2"));
  set_process_name("node-1/worker-9");
  CHECK(hit(point::frame_send, "node-2"));

  b.rules.remove(*number);
  CHECK_FALSE(hit(point::frame_send, "node-2"));
  CHECK(b.rules.num_hits(*number) == 2);
}

TEST_CASE("of two rules that match the first that strikes is carried out") {
  armed_board b;
  auto once = dropping();
  once.count = 1;
  auto then = dropping();
  then.what = kind::corrupt;
  REQUIRE(b.rules.add(once));
  REQUIRE(b.rules.add(then));
  CHECK(hit(point::frame_send)->what == kind::drop);
  CHECK(hit(point::frame_send)->what == kind::corrupt);
  CHECK(hit(point::frame_send)->what == kind::corrupt);
}

TEST_CASE("a cut has one direction") {
  armed_board b;
  const auto number = b.rules.cut("node-2*", "node-1*");
  REQUIRE(number);
  CHECK(is_cut_off("node-2/worker-0"));
  CHECK_FALSE(is_cut_off("node-3"));
  CHECK_FALSE(hit(point::frame_send, "node-2"));
  set_process_name("node-2/worker-0");
  CHECK_FALSE(is_cut_off("node-1/worker-0"));
  set_process_name("node-1/worker-0");
  b.rules.remove(*number);
  CHECK_FALSE(is_cut_off("node-2/worker-0"));
}

TEST_CASE("which passes are struck, and with what random bits, follows from the seed") {
  auto record = [](std::uint64_t seed) {
    armed_board b;
    auto r = dropping();
    r.probability = 0.25;
    r.seed = seed;
    REQUIRE(b.rules.add(r));
    std::vector<std::uint64_t> struck;
    for (int pass = 0; pass < 4000; ++pass) {
      const auto f = hit(point::frame_send);
      struck.push_back(f ? f->random : 0);
    }
    return struck;
  };
  const auto first = record(1);
  CHECK(first == record(1));
  CHECK(first != record(2));
  const auto misses = std::count(first.begin(), first.end(), 0U);
  CHECK(misses > 2850); // 3000 +- 5.5 sigma
  CHECK(misses < 3150);
}

TEST_CASE("probability 1 always strikes and 0 never") {
  armed_board b;
  auto r = dropping();
  r.probability = 0;
  const auto never = b.rules.add(r);
  for (int i = 0; i < 1000; ++i)
    REQUIRE_FALSE(hit(point::frame_send));
  b.rules.remove(*never);
  REQUIRE(b.rules.add(dropping()));
  for (int i = 0; i < 1000; ++i)
    REQUIRE(hit(point::frame_send));
}

TEST_CASE("the board says when it is full and when a name is too long") {
  armed_board b;
  for (std::size_t i = 0; i < board::max_rules; ++i)
    CHECK(b.rules.add(dropping()) == i);
  CHECK(b.rules.add(dropping()).error().code == error_code::resource_exhausted);
  b.rules.remove(17);
  CHECK(b.rules.cut("a", "b") == 17U);
  b.rules.clear();
  CHECK_FALSE(hit(point::frame_send));
  CHECK(b.rules.add(dropping(std::string(63, 'x'))) == 0U);
  CHECK(b.rules.add(dropping(std::string(64, 'x'))).error().code == error_code::invalid_request);
  auto r = dropping();
  r.what = kind::none;
  CHECK_FALSE(b.rules.add(r));
}

TEST_CASE("a file that is no board arms nothing") {
  const auto file =
    std::filesystem::temp_directory_path() / fmt::format("troupe-no-board-{}", ::getpid());
  std::filesystem::remove(file);
  ::setenv(board::variable, file.c_str(), 1);
  CHECK(arm().error().code == error_code::io_failed);
  std::ofstream(file) << "short";
  CHECK(arm().error().code == error_code::io_failed);
  std::ofstream(file) << std::string(sizeof(detail::board_page), 'x');
  CHECK(arm().error().code == error_code::io_failed);
  CHECK_FALSE(hit(point::frame_send));
  ::unsetenv(board::variable);
  REQUIRE(arm());
  std::filesystem::remove(file);
}

TEST_CASE("a rule strikes exactly count times in all processes and threads together") {
  armed_board b;
  auto r = dropping();
  r.count = 1000;
  r.probability = 0.5;
  const auto number = b.rules.add(r);
  std::vector<pid_t> children;
  for (int c = 0; c < 4; ++c) {
    const auto pid = ::fork();
    if (pid == 0) {
      std::atomic<std::uint64_t> struck{0};
      std::vector<std::thread> threads;
      for (int t = 0; t < 2; ++t)
        threads.emplace_back([&] {
          for (int i = 0; i < 20000; ++i)
            struck += hit(point::frame_send) ? 1U : 0U;
        });
      for (auto& t : threads)
        t.join();
      std::ofstream(fmt::format("{}.{}", b.file.string(), ::getpid())) << struck.load();
      ::_exit(0);
    }
    children.push_back(pid);
  }
  std::uint64_t total = 0;
  for (const auto pid : children) {
    int status = -1;
    ::waitpid(pid, &status, 0);
    REQUIRE(status == 0);
    const auto file = fmt::format("{}.{}", b.file.string(), pid);
    std::uint64_t struck = 0;
    std::ifstream(file) >> struck;
    std::filesystem::remove(file);
    total += struck;
  }
  CHECK(total == 1000);
  CHECK(b.rules.num_hits(*number) == 1000);
}

TEST_CASE("readers never act on half a rule while the board is rewritten") {
  armed_board b;
  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> wrong{0};
  std::atomic<std::uint64_t> struck{0};
  std::vector<std::thread> readers;
  for (int t = 0; t < 2; ++t)
    readers.emplace_back([&] {
      while (!stop.load()) {
        // Both rules match this process; each of their fields goes with its kind.
        if (const auto f = hit(point::frame_send, "peer")) {
          ++struck;
          if (f->delay_ms != (f->what == kind::drop ? 1U : 2U))
            ++wrong;
        }
      }
    });
  auto one = dropping("node-1/worker-0");
  one.delay_ms = 1;
  auto two = dropping("*");
  two.peer = "peer";
  two.what = kind::corrupt;
  two.delay_ms = 2;
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(300);
  for (bool odd = false; std::chrono::steady_clock::now() < end; odd = !odd) {
    const auto number = b.rules.add(odd ? one : two);
    REQUIRE(number == 0U);
    std::this_thread::yield();
    b.rules.remove(*number);
  }
  stop = true;
  for (auto& r : readers)
    r.join();
  CHECK(struck > 0);
  CHECK(wrong == 0);
}

TEST_CASE("a process suffers what a rule says") {
  armed_board b;
  auto r = dropping();
  r.where = point::process_init;
  auto status_of = [&](kind what) {
    r.what = what;
    const auto number = b.rules.add(r);
    const auto status = run_child([] { suffer(point::process_init); },
                                  what == kind::deadlock || what == kind::busy_loop
                                    ? std::chrono::milliseconds(200)
                                    : std::chrono::milliseconds(10000));
    CHECK(b.rules.num_hits(*number) == 1);
    b.rules.remove(*number);
    return status;
  };
  auto status = status_of(kind::exit);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 3);
  status = status_of(kind::crash);
  CHECK(WIFSIGNALED(status));
  CHECK(WTERMSIG(status) == SIGSEGV);
  for (const auto hang : {kind::deadlock, kind::busy_loop}) {
    status = status_of(hang);
    CHECK(WIFSIGNALED(status));
    CHECK(WTERMSIG(status) == SIGKILL);
  }
  CHECK(status_of(kind::drop) == 0); // not for `suffer` to know
  r.what = kind::delay;
  r.delay_ms = 30;
  REQUIRE(b.rules.add(r));
  const auto begin = std::chrono::steady_clock::now();
  suffer(point::process_init);
  CHECK(std::chrono::steady_clock::now() - begin >= std::chrono::milliseconds(30));
}

TEST_CASE("what passing a point costs", "[.benchmark]") {
  auto time = [](const char* what) {
    constexpr int turns = 100'000'000;
    std::uint64_t struck = 0;
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < turns / (what[0] == 'u' ? 1 : 100); ++i) {
      struck += hit(point::frame_send, "node-2") ? 1U : 0U;
      asm volatile("" ::: "memory");
    }
    const std::chrono::duration<double, std::nano> taken = std::chrono::steady_clock::now() - begin;
    WARN(what << ": " << taken.count() / turns * (what[0] == 'u' ? 1 : 100) << " ns a pass, "
              << struck << " struck");
  };
  time("unarmed");
  armed_board b;
  time("armed, no rule");
  REQUIRE(b.rules.add(dropping("node-2")));
  time("armed, one rule for others");
}
