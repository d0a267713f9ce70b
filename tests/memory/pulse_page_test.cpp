#include "troupe/memory/pulse_page.hpp"

#include <catch2/catch.hpp>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstring>
#include <functional>
#include <string>
#include <thread>

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

using namespace std::chrono_literals;
using namespace troupe::memory;

namespace {

bool eventually(const std::function<bool()>& condition) {
  const auto end = std::chrono::steady_clock::now() + 10s;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end)
      return false;
    std::this_thread::sleep_for(1ms);
  }
  return true;
}

pulse_sample look(const pulse_page& page) {
  pulse_sample sample;
  page.sample(sample);
  return sample;
}

/// A process that runs `body` and is gone when this is.
class child {
public:
  template <class Body>
  explicit child(Body body) : pid_(::fork()) {
    if (pid_ != 0)
      return;
    body();
    ::_exit(0);
  }
  ~child() {
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
  }
  void signal(int number) { ::kill(pid_, number); }
  bool stopped() {
    int status = 0;
    return ::waitpid(pid_, &status, WUNTRACED) == pid_ && WIFSTOPPED(status);
  }
  bool alive() { return ::waitpid(pid_, nullptr, WNOHANG) == 0; }

private:
  pid_t pid_;
};

} // namespace

TEST_CASE("a parent reads what its child computes, and a stopped child's beat stands still") {
  auto page = pulse_page::create();
  REQUIRE(page);
  CHECK(look(*page).beat == 0);
  CHECK(look(*page).activities.empty());
  child computing([&] {
    auto heart = pulse::start(::dup(page->fd()), 2ms);
    (*heart)->on_beat([&] { (*heart)->answered(); });
    auto stage = (*heart)->add("replica-0/stage-1");
    auto experts = (*heart)->add("experts-3");
    stage->computing();
    experts->waiting();
    for (;;) {
      stage->tick();
      std::this_thread::sleep_for(1ms);
    }
  });
  REQUIRE(eventually([&] { return look(*page).activities.size() == 2; }));
  REQUIRE(eventually([&] { return look(*page).activities[1].state == activity_state::waiting; }));
  const auto first = look(*page);
  CHECK(first.activities[0].name == "replica-0/stage-1");
  CHECK(first.activities[0].state == activity_state::computing);
  CHECK(first.activities[1].name == "experts-3");
  CHECK(first.activities[1].progress == 0);
  const auto gets_on = [&](const pulse_sample& since) {
    const auto now = look(*page);
    return now.beat > since.beat + 2 && now.control > since.control + 2
           && now.activities[0].progress > since.activities[0].progress + 2;
  };
  CHECK(eventually([&] { return gets_on(first); }));

  computing.signal(SIGSTOP);
  REQUIRE(computing.stopped());
  const auto stopped = look(*page);
  std::this_thread::sleep_for(50ms);
  CHECK(look(*page).beat == stopped.beat);
  CHECK(look(*page).control == stopped.control);
  CHECK(look(*page).activities[0].progress == stopped.activities[0].progress);

  computing.signal(SIGCONT);
  CHECK(eventually([&] { return gets_on(stopped); }));
}

TEST_CASE("the beating thread leaves signals to others") {
  auto page = pulse_page::create();
  REQUIRE(page);
  child blocking([&] {
    auto heart = pulse::start(::dup(page->fd()), 1ms);
    sigset_t mine;
    ::sigemptyset(&mine);
    ::sigaddset(&mine, SIGUSR1);
    ::pthread_sigmask(SIG_BLOCK, &mine, nullptr);
    const auto blocked = (*heart)->add("blocked");
    for (;;)
      ::pause();
  });
  REQUIRE(eventually([&] { return look(*page).activities.size() == 1; }));
  blocking.signal(SIGUSR1); // would end a process that has a thread which takes it
  const auto before = look(*page).beat;
  CHECK(eventually([&] { return look(*page).beat > before + 20; }));
  CHECK(blocking.alive());
}

TEST_CASE("answers count only while somebody asks") {
  auto page = pulse_page::create();
  REQUIRE(page);
  auto heart = pulse::start(::dup(page->fd()), 1ms);
  REQUIRE(heart);
  (*heart)->answered();
  CHECK(look(*page).control == 0);
  std::atomic<int> knocks = 0;
  (*heart)->on_beat([&] { ++knocks; });
  CHECK(look(*page).control == 1); // expected from now on, though none has come
  CHECK(eventually([&] { return knocks > 3; }));
  CHECK(look(*page).control == 1);
  (*heart)->answered();
  CHECK(look(*page).control == 2);
  (*heart)->on_beat({});
  CHECK(look(*page).control == 0);
  const int asked = knocks;
  const auto beat = look(*page).beat;
  (*heart)->answered(); // late
  CHECK(look(*page).control == 0);
  CHECK(eventually([&] { return look(*page).beat > beat + 3; }));
  CHECK(knocks == asked);
}

TEST_CASE("beginning to compute counts as getting on") {
  auto page = pulse_page::create();
  REQUIRE(page);
  auto heart = pulse::start(::dup(page->fd()), 1h);
  REQUIRE(heart);
  auto stage = (*heart)->add("stage");
  REQUIRE(stage);
  CHECK(look(*page).activities[0].state == activity_state::idle);
  stage->computing();
  const auto first = look(*page).activities[0];
  CHECK(first.state == activity_state::computing);
  stage->idle();
  CHECK(look(*page).activities[0].progress == first.progress);
  stage->computing();
  CHECK(look(*page).activities[0].progress > first.progress);
  stage->counter()->fetch_add(1000);
  CHECK(look(*page).activities[0].progress == first.progress + 1001);
}

TEST_CASE("the page is wiped for the next process") {
  auto page = pulse_page::create();
  REQUIRE(page);
  {
    auto heart = pulse::start(::dup(page->fd()), 1ms);
    REQUIRE(heart);
    (*heart)->on_beat([] {});
    auto stage = (*heart)->add("a stage with a long name");
    stage->computing();
    stage->last_words("gone");
    REQUIRE(eventually([&] { return look(*page).beat > 0; }));
  }
  page->reset();
  CHECK(page->last_words().empty());
  auto sample = look(*page);
  CHECK(sample.beat == 0);
  CHECK(sample.control == 0);
  CHECK(sample.activities.empty());
  auto next = pulse::start(::dup(page->fd()), 1h);
  REQUIRE(next);
  CHECK((*next)->add("short"));
  page->sample(sample);
  REQUIRE(sample.activities.size() == 1);
  CHECK(sample.activities[0].name == "short");
  CHECK(sample.activities[0].progress == 0);
}

TEST_CASE("activities are bounded and their names are cut") {
  auto page = pulse_page::create();
  REQUIRE(page);
  auto heart = pulse::start(::dup(page->fd()), 1h);
  REQUIRE(heart);
  CHECK((*heart)->add(std::string(100, 'x')));
  for (std::size_t i = 1; i < pulse::max_activities; ++i)
    CHECK((*heart)->add("a" + std::to_string(i)));
  const auto refused = (*heart)->add("one too many");
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == troupe::error_code::resource_exhausted);
  const auto sample = look(*page);
  REQUIRE(sample.activities.size() == pulse::max_activities);
  CHECK(sample.activities[0].name == std::string(pulse::max_name_bytes, 'x'));
  CHECK(sample.activities[31].name == "a31");
}

TEST_CASE("the first of the last words count, and are there however the process ends") {
  auto page = pulse_page::create();
  REQUIRE(page);
  CHECK(page->last_words().empty());
  const pid_t dying = ::fork();
  if (dying == 0) {
    auto heart = pulse::start(::dup(page->fd()), 1h);
    auto stage = (*heart)->add("replica-0/stage-1");
    stage->last_words("the device failed:\n\x1b[31mout of order\xff");
    (*heart)->last_words("an actor died");
    ::kill(::getpid(), SIGKILL);
  }
  ::waitpid(dying, nullptr, 0);
  CHECK(page->last_words() == "replica-0/stage-1: the device failed:  [31mout of order ");
}

TEST_CASE("last words are cut") {
  auto page = pulse_page::create();
  REQUIRE(page);
  auto heart = pulse::start(::dup(page->fd()), 1h);
  REQUIRE(heart);
  (*heart)->last_words(std::string(2000, 'x'));
  CHECK(page->last_words() == std::string(pulse::max_word_bytes, 'x'));
}

TEST_CASE("a name is seen whole or not at all") {
  auto page = pulse_page::create();
  REQUIRE(page);
  for (int round = 0; round < 200; ++round) {
    page->reset();
    auto heart = pulse::start(::dup(page->fd()), 1h);
    REQUIRE(heart);
    std::thread adding([&] {
      for (std::size_t i = 0; i < pulse::max_activities; ++i)
        (void)(*heart)->add(std::string(40, static_cast<char>('A' + i)));
    });
    pulse_sample sample;
    bool torn = false;
    while (sample.activities.size() < pulse::max_activities) {
      page->sample(sample);
      for (std::size_t i = 0; i < sample.activities.size(); ++i)
        torn |= sample.activities[i].name != std::string(40, static_cast<char>('A' + i));
    }
    adding.join();
    REQUIRE_FALSE(torn);
  }
}

TEST_CASE("a process without a page works the same") {
  auto heart = pulse::start(-1, 1ms);
  REQUIRE(heart);
  (*heart)->on_beat([] { FAIL("nobody asks"); });
  (*heart)->last_words("nobody hears");
  (*heart)->answered();
  for (std::size_t i = 0; i < 2 * pulse::max_activities; ++i) {
    auto stage = (*heart)->add("stage");
    REQUIRE(stage);
    stage->computing();
    stage->tick();
    stage->last_words("nobody hears");
    REQUIRE(stage->counter() != nullptr);
  }
}

TEST_CASE("an activity may tick to its end, even behind the pulse") {
  auto page = pulse_page::create();
  REQUIRE(page);
  auto heart = pulse::start(::dup(page->fd()), 1ms);
  REQUIRE(heart);
  auto stage = (*heart)->add("stage");
  REQUIRE(stage);
  heart->reset();
  stage->tick();
  CHECK(look(*page).activities[0].progress == 1);
}

TEST_CASE("what is not a pulse page is refused") {
  CHECK_FALSE(pulse_page::attach(-1));
  for (const auto bytes : {0, 4096, 8192}) {
    const int fd = ::memfd_create("other", 0);
    REQUIRE(::ftruncate(fd, bytes) == 0);
    const auto refused = pulse::start(fd, 1ms);
    REQUIRE_FALSE(refused);
    CHECK(refused.error().code == troupe::error_code::io_failed);
  }
}

TEST_CASE("a page that a process gone mad wrote over is read without harm") {
  auto page = pulse_page::create();
  REQUIRE(page);
  void* raw = ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, page->fd(), 0);
  REQUIRE(raw != MAP_FAILED);
  std::memset(raw, 0xff, 4096);
  const auto sample = look(*page);
  CHECK(sample.activities.size() == pulse::max_activities);
  for (const auto& activity : sample.activities) {
    CHECK(activity.name.size() <= pulse::max_name_bytes + 1);
    CHECK(activity.state == activity_state::idle);
  }
  CHECK(page->last_words() == std::string(pulse::max_word_bytes + 1, ' '));
  ::munmap(raw, 4096);
}
