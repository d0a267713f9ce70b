#include "troupe/base/life_line.hpp"

#include "troupe/base/child_processes.hpp"

#include <catch2/catch.hpp>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstddef>
#include <cstdio>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <thread>
#include <vector>

#include <poll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

using namespace troupe;
using namespace std::chrono_literals;

namespace {

/// Collects what is said of one child, in order.
struct both_ends {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<child_exit> seen;

  child_processes::exit_callback callback() {
    return [this](const child_exit& e) {
      std::lock_guard lock(mutex);
      seen.push_back(e);
      changed.notify_all();
    };
  }
  std::vector<child_exit> wait_until_gone() {
    std::unique_lock lock(mutex);
    REQUIRE(changed.wait_for(lock, 10s, [&] { return !seen.empty() && seen.back().is_gone; }));
    return seen;
  }
};

/// As a thread does that is killed: never lets go.
void hold_to_the_end(life_line& line) {
  alignas(life_line::holder) static std::byte room[sizeof(life_line::holder)];
  new (room) life_line::holder(line);
}

} // namespace

TEST_CASE("a life line is lost long before its process is gone") {
  // What it has takes the kernel a while to clear up.
  constexpr std::size_t bytes = std::size_t{1} << 30U;
  auto* page = ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  REQUIRE(page != MAP_FAILED);
  struct shared_page {
    life_line life;
    std::atomic<bool> is_held = false;
  };
  auto* shared = new (page) shared_page;
  auto pid = ::fork();
  if (pid == 0) {
    ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1,
           0);
    std::thread([shared] {
      life_line::holder mine(shared->life);
      shared->is_held = true;
      for (;;)
        ::pause();
    }).join();
  }
  REQUIRE(pid > 0);
  auto pidfd = static_cast<int>(::syscall(SYS_pidfd_open, pid, 0));
  REQUIRE(pidfd >= 0);
  std::atomic<bool> waits = false;
  std::chrono::steady_clock::time_point lost;
  std::optional<int> status;
  std::thread listener([&] {
    waits = true;
    if (!shared->life.wait())
      return;
    lost = std::chrono::steady_clock::now();
    status = ending_status(pid);
  });
  while (!waits || !shared->is_held)
    std::this_thread::yield();
  auto killed = std::chrono::steady_clock::now();
  ::kill(pid, SIGKILL);
  pollfd end{pidfd, POLLIN, 0};
  REQUIRE(::poll(&end, 1, 60'000) == 1);
  auto gone = std::chrono::steady_clock::now();
  shared->life.close();
  listener.join();
  ::waitpid(pid, nullptr, 0);
  ::close(pidfd);
  CHECK(shared->life.is_lost());
  using ms = std::chrono::duration<double, std::milli>;
  std::printf("lost after %.2f ms, gone after %.2f ms\n", ms(lost - killed).count(),
              ms(gone - killed).count());
  CHECK(lost - killed < (gone - killed) / 2);
  if (status)
    CHECK(*status == SIGKILL);
  ::munmap(page, 4096);
}

TEST_CASE("a life line tells of the thread that holds it, and of no good end") {
  life_line line;
  std::atomic<int> heard = -1;
  auto listen = [&] { return std::thread([&] { heard = line.wait() ? 1 : 0; }); };
  SECTION("its thread ends without a word, after and before somebody waits") {
    auto is_early = GENERATE(true, false);
    std::thread listener;
    if (is_early)
      listener = listen();
    std::thread holding([&] { hold_to_the_end(line); });
    holding.join();
    if (!is_early)
      listener = listen();
    listener.join();
    CHECK(heard == 1);
    CHECK(line.is_lost());
    line.close(); // changes nothing
    CHECK(line.is_lost());
    line.reset();
    CHECK_FALSE(line.is_lost());
  }
  SECTION("its thread lets go") {
    auto listener = listen();
    std::thread([&] { life_line::holder mine(line); }).join();
    listener.join();
    CHECK(heard == 0);
  }
  SECTION("another thread lets go, and then it ends") {
    std::thread([&] {
      hold_to_the_end(line);
      std::thread([&] { line.let_go(); }).join();
    }).join();
    auto listener = listen();
    listener.join();
    CHECK(heard == 0);
    CHECK_FALSE(line.is_lost());
  }
  SECTION("nobody ever held it") {
    auto listener = listen();
    line.close();
    listener.join();
    CHECK(heard == 0);
  }
}

TEST_CASE(
  "a child is told of twice where its life line is lost, once where it lets go or has none") {
  // Held by a process of ours in the place of the child's: what is tested is what is said.
  auto* page = ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  REQUIRE(page != MAP_FAILED);
  auto line =
    std::shared_ptr<life_line>(new (page) life_line, [](life_line* l) { ::munmap(l, 4096); });
  both_ends ends;
  auto children = child_processes::start(ends.callback());
  REQUIRE(children);
  child_spec spec;
  spec.name = "child";
  spec.program = "/bin/sleep";
  spec.arguments = {"60"};
  spec.life = line;
  auto pid = (*children)->spawn(spec);
  REQUIRE(pid);
  SECTION("lost: it is killed, whatever is left of it") {
    std::thread([&] { hold_to_the_end(*line); }).join();
    auto seen = ends.wait_until_gone();
    REQUIRE(seen.size() == 2);
    CHECK_FALSE(seen[0].is_gone);
    CHECK_FALSE(seen[0].is_status_known); // it lived
    CHECK(seen[0].text() == "ended");
    CHECK(seen[0].pid == *pid);
    CHECK(seen[0].detected <= seen[1].detected);
    CHECK(seen[1].text() == "killed by signal 9");
  }
  SECTION("let go") {
    std::thread([&] { life_line::holder mine(*line); }).join();
    ::kill(*pid, SIGTERM);
    CHECK(ends.wait_until_gone().size() == 1);
  }
  SECTION("never held") {
    ::kill(*pid, SIGTERM);
    auto seen = ends.wait_until_gone();
    REQUIRE(seen.size() == 1);
    CHECK(seen[0].text() == "killed by signal 15");
  }
  SECTION("stopped by its parent") {
    (*children)->stop_all(1s);
    CHECK(ends.seen.empty());
  }
}
