#pragma once

#include "temporary_directory.hpp"

#include "troupe/base/child_processes.hpp"
#include "troupe/http/client.hpp"

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

/// What the tests with real processes share: a `troupe up` of their own, run beside the test, and
/// what is needed to look at it. For the test's main thread unless said otherwise: failures
/// are Catch2 assertions.
namespace troupe::process_tests {

using namespace std::chrono_literals;
using nlohmann::json;
using testing::temporary_directory;
using steady = std::chrono::steady_clock;

double milliseconds(steady::duration d);

/// Waits until `done`; false after `limit`.
bool eventually(const std::function<bool()>& done, std::chrono::milliseconds limit);

/// One of a cluster's processes.
struct running_process {
  pid_t pid = 0;
  std::string command;
};

/// Every process started under `runtime_directory`, whoever its parent is now: the environment
/// names it. Those that have ended and wait to be reaped do not count.
std::vector<running_process> processes_under(const std::filesystem::path& runtime_directory);

/// Resident memory (VmRSS), in KiB; 0 if there is no such process.
long resident_kib(pid_t pid);

/// A program, for instance `troupe`, as a child of the test. It dies with the test.
class program {
public:
  /// Runs `file` with output to `log`; `runtime_directory` becomes its XDG_RUNTIME_DIR.
  program(std::string file, std::vector<std::string> arguments,
          const std::filesystem::path& runtime_directory, std::filesystem::path log);

  pid_t pid() const { return pid_; }
  void signal(int number);
  /// How it ended; nothing if it still runs after `limit`. Any thread.
  std::optional<child_exit> wait(std::chrono::milliseconds limit);
  /// What it wrote.
  std::string output() const;

private:
  std::filesystem::path log_;
  std::mutex mutex_; // guards exit_
  std::condition_variable ended_;
  std::optional<child_exit> exit_;
  pid_t pid_ = 0;
  std::unique_ptr<child_processes> children_; // last: ends first
};

/// The `troupe` of this build.
std::string troupe_program();

/// The path of a file of the repository.
std::filesystem::path source_path(std::string_view relative);

/// A running cluster. Logs are printed when an assertion of the test failed.
class cluster {
public:
  /// `troupe up configs/CONFIG` with `settings` over it, on a free port. Returns when it is ready.
  explicit cluster(std::string_view config, std::vector<std::string> settings = {});
  ~cluster();

  const std::string& name() const { return name_; }
  const std::string& endpoint() const { return endpoint_; }
  const std::filesystem::path& runtime_directory() const { return directory_.path(); }
  program& launcher() { return *launcher_; }

  /// GET /v1/cluster.
  json status() const;
  /// All actors run, all replicas serve, and every recovery is over.
  bool settled(const json& status) const;
  /// Waits until `settled` with at least `recoveries` recoveries in all; returns that status.
  json wait_settled(std::size_t recoveries = 0, std::chrono::milliseconds limit = 20s) const;

  /// The worker as /v1/cluster shows it: name, pid, incarnation, state.
  json worker(const std::string& name) const;
  std::vector<std::string> worker_names() const;
  pid_t worker_pid(const std::string& name) const;
  pid_t frontend_pid() const;

  /// GET /metrics: the samples by "name" or "name{labels}".
  std::map<std::string, double> metrics() const;
  /// The sum over all label sets of one metric.
  double metric(const std::string& name) const;

  http::client_response get(std::string_view path) const;
  http::client_response post(std::string_view path, std::string body) const;
  /// Posts JSON and returns the answer's JSON; its status must be `status`.
  json post_json(std::string_view path, const json& body, int status = 200) const;

  /// SIGTERM, as Ctrl-C or `troupe down` do it: exit code 0, and nothing is left.
  void end();
  /// SIGKILL of the launcher: everything is gone within `limit`.
  void end_by_killing_the_launcher(std::chrono::milliseconds limit);

private:
  http::client_response fetch(http::client_request what) const;
  void print_logs() const;

  temporary_directory directory_;
  std::string name_;
  std::string endpoint_;
  bool ended_ = false;
  std::unique_ptr<program> launcher_;
};

/// A `troupe` command that ends by itself.
struct command_result {
  int code = 0; ///< the exit code; 128 + n after signal n
  std::string output;
  double seconds = 0;
};

/// Runs `troupe ARGUMENTS`, ten seconds at most, and sees to it that nothing of it is left.
command_result run_troupe(std::vector<std::string> arguments,
                          const std::filesystem::path& runtime_directory);

} // namespace troupe::process_tests
