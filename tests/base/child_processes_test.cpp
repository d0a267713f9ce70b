#include "troupe/base/child_processes.hpp"
#include "troupe/base/startup_report.hpp"

#include "temporary_directory.hpp"

#include <catch2/catch.hpp>

#include <condition_variable>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>
#include <sstream>
#include <thread>

#include <sys/wait.h>
#include <unistd.h>

using namespace troupe;
using namespace std::chrono_literals;

namespace {

/// Collects exits and waits for them.
struct exits {
  std::mutex mutex;
  std::condition_variable changed;
  std::map<std::string, child_exit> seen;

  child_processes::exit_callback callback() {
    return [this](const child_exit& e) {
      std::lock_guard lock(mutex);
      seen[e.name] = e;
      changed.notify_all();
    };
  }

  child_exit wait(const std::string& name) {
    std::unique_lock lock(mutex);
    REQUIRE(changed.wait_for(lock, 10s, [&] { return seen.count(name) == 1; }));
    return seen[name];
  }
};

child_spec shell(const std::string& name, const std::string& script) {
  child_spec spec;
  spec.name = name;
  spec.program = "/bin/sh";
  spec.arguments = {"-c", script};
  return spec;
}

} // namespace

TEST_CASE("exit codes and signals are told apart, and found at once") {
  exits seen;
  auto children = child_processes::start(seen.callback());
  REQUIRE(children);
  REQUIRE((*children)->spawn(shell("code", "exit 7")));
  CHECK(seen.wait("code").text() == "exited with code 7");
  auto pid = (*children)->spawn(shell("signal", "exec sleep 60"));
  REQUIRE(pid);
  auto killed = std::chrono::steady_clock::now();
  ::kill(*pid, SIGKILL);
  auto exit = seen.wait("signal");
  CHECK(exit.text() == "killed by signal 9");
  CHECK(exit.pid == *pid);
  CHECK(exit.detected - killed < 100ms);
}

TEST_CASE("a program that is not there is an error of spawn") {
  exits seen;
  auto children = child_processes::start(seen.callback());
  REQUIRE(children);
  child_spec spec;
  spec.name = "nothing";
  spec.program = "/does/not/exist";
  auto pid = (*children)->spawn(spec);
  REQUIRE_FALSE(pid);
  CHECK(pid.error().code == error_code::io_failed);
  CHECK(pid.error().cause.find("nothing") != std::string::npos);
}

TEST_CASE("children get their environment, their log and only the descriptors named") {
  exits seen;
  auto children = child_processes::start(seen.callback());
  REQUIRE(children);
  int ends[2];
  REQUIRE(::pipe(ends) == 0);
  char path[] = "/tmp/troupe-test-XXXXXX";
  ::close(::mkstemp(path));
  auto spec = shell("child", "echo $GREETING; echo inherited >&" + std::to_string(ends[1])
                               + "; ls /proc/self/fd | wc -l");
  spec.environment = {{"GREETING", "hello"}};
  spec.inherited_fds = {ends[1]};
  spec.log_path = path;
  REQUIRE((*children)->spawn(spec));
  CHECK(seen.wait("child").text() == "exited with code 0");
  char buffer[64] = {};
  CHECK(::read(ends[0], buffer, sizeof(buffer)) == 10);
  CHECK(std::string(buffer) == "inherited\n");
  std::ifstream log(path);
  std::stringstream text;
  text << log.rdbuf();
  CHECK(text.str().starts_with("hello\n"));
  // Standard ones, the inherited one and the one that ls itself opens.
  CHECK(std::stoi(text.str().substr(6)) <= 6);
  ::close(ends[0]);
  ::close(ends[1]);
  ::unlink(path);
}

TEST_CASE("stopping is in order and does not wait for the stubborn for ever") {
  exits seen;
  auto children = child_processes::start(seen.callback());
  REQUIRE(children);
  REQUIRE((*children)->spawn(shell("polite", "exec sleep 60")));
  auto stubborn =
    (*children)->spawn(shell("stubborn", "trap '' TERM; while true; do sleep 0.2; done"));
  REQUIRE(stubborn);
  std::this_thread::sleep_for(100ms); // let the trap be set
  auto begin = std::chrono::steady_clock::now();
  (*children)->stop_all(300ms);
  CHECK(std::chrono::steady_clock::now() - begin < 5s);
  CHECK(::kill(*stubborn, 0) != 0);
  CHECK(seen.seen.empty()); // what was stopped on purpose is not reported
}

TEST_CASE("children die with their parent, even when it is killed") {
  int ends[2];
  REQUIRE(::pipe(ends) == 0);
  pid_t parent = ::fork();
  if (parent == 0) {
    auto children = child_processes::start([](const child_exit&) {});
    auto pid = (*children)->spawn(shell("child", "exec sleep 60"));
    pid_t value = *pid;
    [[maybe_unused]] auto written = ::write(ends[1], &value, sizeof(value));
    ::pause();
  }
  pid_t child = 0;
  REQUIRE(::read(ends[0], &child, sizeof(child)) == sizeof(child));
  REQUIRE(::kill(child, 0) == 0);
  ::kill(parent, SIGKILL);
  ::waitpid(parent, nullptr, 0);
  auto is_gone = [child] {
    // An orphan in this container may stay a zombie; it runs no more all the same.
    std::ifstream stat("/proc/" + std::to_string(child) + "/stat");
    std::string text;
    std::getline(stat, text);
    return text.empty() || text.find(") Z ") != std::string::npos;
  };
  for (int i = 0; i < 200 && !is_gone(); ++i)
    std::this_thread::sleep_for(10ms);
  CHECK(is_gone());
  ::close(ends[0]);
  ::close(ends[1]);
}

TEST_CASE("a startup pipe carries the port, the error, or the silence of a child") {
  auto pipe = startup_pipe::open();
  REQUIRE(pipe);
  report_started(::dup(pipe->child_fd()), 4711);
  CHECK(pipe->wait(1s).value() == 4711);

  pipe = startup_pipe::open();
  report_not_started(::dup(pipe->child_fd()),
                     error{error_code::invalid_config, "port taken", "use another", "host/x"});
  auto told = pipe->wait(1s);
  REQUIRE_FALSE(told);
  CHECK(told.error().code == error_code::invalid_config);
  CHECK(told.error().cause == "port taken");
  CHECK(told.error().cure == "use another");
  CHECK(told.error().origin == "host/x");

  pipe = startup_pipe::open();
  CHECK(pipe->wait(1s).error().code == error_code::unavailable); // closed without a word

  pipe = startup_pipe::open();
  int held = ::dup(pipe->child_fd());
  CHECK(pipe->wait(20ms).error().code == error_code::deadline_exceeded);
  ::close(held);
}

TEST_CASE("a child is started though the directory of its log is gone, or cannot be") {
  exits seen;
  auto children = child_processes::start(seen.callback());
  REQUIRE(children);
  const testing::temporary_directory directory;
  auto spec = shell("tidied", "echo here");
  spec.log_path = (directory.path() / "deep" / "a.log").string();
  REQUIRE((*children)->spawn(spec));
  CHECK(seen.wait("tidied").text() == "exited with code 0");
  CHECK(std::filesystem::file_size(spec.log_path) == 5);
  spec = shell("impossible", "exit 0");
  spec.log_path = "/proc/nowhere/a.log";
  REQUIRE((*children)->spawn(spec));
  CHECK(seen.wait("impossible").text() == "exited with code 0");
}
