#define CATCH_CONFIG_EXTERNAL_INTERFACES
#include "harness.hpp"

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <thread>

#include <catch2/catch.hpp>
#include <fmt/format.h>
#include <unistd.h>

namespace troupe::process_tests {

namespace fs = std::filesystem;

namespace {

constexpr auto poll_interval = 10ms;
constexpr auto startup_limit = 60s;
constexpr auto shutdown_limit = 15s;
constexpr std::size_t log_tail_bytes = 4000;

/// Remembers that an assertion failed, for the logs to be printed.
class failure_listener : public Catch::TestEventListenerBase {
public:
  using Catch::TestEventListenerBase::TestEventListenerBase;
  bool assertionEnded(const Catch::AssertionStats& stats) override {
    failed = failed || !stats.assertionResult.isOk();
    return true;
  }
  void testCaseStarting(const Catch::TestCaseInfo&) override { failed = false; }

  static inline bool failed = false;
};
CATCH_REGISTER_LISTENER(failure_listener)

std::string read_all(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

std::string tail_of(const fs::path& path) {
  auto text = read_all(path);
  return text.size() > log_tail_bytes ? "..." + text.substr(text.size() - log_tail_bytes) : text;
}

std::string list_of(const std::vector<running_process>& processes) {
  std::string result;
  for (const auto& p : processes)
    result += fmt::format("{}: {}\n", p.pid, p.command);
  return result;
}

} // namespace

double milliseconds(steady::duration d) {
  return std::chrono::duration<double, std::milli>(d).count();
}

bool eventually(const std::function<bool()>& done, std::chrono::milliseconds limit) {
  auto end = steady::now() + limit;
  while (!done()) {
    if (steady::now() > end)
      return false;
    std::this_thread::sleep_for(poll_interval);
  }
  return true;
}

std::vector<running_process> processes_under(const fs::path& runtime_directory) {
  auto wanted = "XDG_RUNTIME_DIR=" + runtime_directory.string();
  wanted.push_back('\0');
  std::vector<running_process> result;
  std::error_code failed;
  for (const auto& entry : fs::directory_iterator("/proc", failed)) {
    auto pid = static_cast<pid_t>(std::atoi(entry.path().filename().c_str()));
    if (pid <= 0 || read_all(entry.path() / "environ").find(wanted) == std::string::npos)
      continue;
    auto command = read_all(entry.path() / "cmdline");
    std::replace(command.begin(), command.end(), '\0', ' ');
    result.push_back({pid, command});
  }
  return result;
}

long resident_kib(pid_t pid) {
  std::ifstream file(fmt::format("/proc/{}/status", pid));
  for (std::string line; std::getline(file, line);)
    if (line.starts_with("VmRSS:"))
      return std::atol(line.c_str() + 6);
  return 0;
}

program::program(std::string file, std::vector<std::string> arguments,
                 const fs::path& runtime_directory, fs::path log)
  : log_(std::move(log)) {
  auto children = child_processes::start([this](const child_exit& exit) {
    std::lock_guard lock(mutex_);
    exit_ = exit;
    ended_.notify_all();
  });
  if (!children)
    FAIL(children.error().text());
  children_ = std::move(*children);
  child_spec spec;
  spec.name = "program";
  spec.program = std::move(file);
  spec.arguments = std::move(arguments);
  spec.environment = {{"XDG_RUNTIME_DIR", runtime_directory.string()}};
  spec.log_path = log_.string();
  auto pid = children_->spawn(std::move(spec));
  if (!pid)
    FAIL(pid.error().text());
  pid_ = *pid;
}

void program::signal(int number) {
  children_->signal("program", number);
}

std::optional<child_exit> program::wait(std::chrono::milliseconds limit) {
  std::unique_lock lock(mutex_);
  ended_.wait_for(lock, limit, [this] { return exit_.has_value(); });
  return exit_;
}

std::string program::output() const {
  return read_all(log_);
}

std::string troupe_program() {
  return TROUPE_BINARY_DIR "/troupe";
}

fs::path source_path(std::string_view relative) {
  return fs::path(TROUPE_SOURCE_DIR) / relative;
}

cluster::cluster(std::string_view config, std::vector<std::string> settings) {
  static int count = 0;
  name_ = fmt::format("test-{}-{}", ::getpid(), ++count);
  std::vector<std::string> arguments{"up", source_path("configs") / config, "--quiet"};
  settings.insert(settings.begin(), {"serving.listen=127.0.0.1:0", "cluster=" + name_});
  for (const auto& setting : settings)
    arguments.insert(arguments.end(), {"--set", setting});
  launcher_ = std::make_unique<program>(troupe_program(), std::move(arguments), directory_.path(),
                                        directory_.path() / "up.log");
  auto state_path = directory_.path() / "troupe" / name_ / "state.json";
  bool ready = false;
  bool decided = eventually(
    [&] {
      if (launcher_->wait(0ms))
        return true;
      auto state = json::parse(read_all(state_path), nullptr, false);
      if (!state.is_object())
        return false;
      endpoint_ = state.value("endpoint", "");
      auto answer = http::fetch({"GET", endpoint_ + "/v1/cluster", {}, {}}, 2s);
      // The launcher's own word counts too: a signal that comes earlier stops an unready cluster.
      ready = answer && answer->status == 200 && settled(json::parse(answer->body, nullptr, false))
              && launcher_->output().find("is ready after") != std::string::npos;
      return ready;
    },
    startup_limit);
  if (!ready) {
    print_logs();
    ended_ = true; // the logs are out
    FAIL("troupe up " << config << (decided ? " ended: " : " is not ready in time: ")
                      << launcher_->output());
  }
}

cluster::~cluster() {
  if (failure_listener::failed && !ended_)
    print_logs();
}

void cluster::print_logs() const {
  std::error_code failed;
  for (const auto& entry : fs::recursive_directory_iterator(directory_.path(), failed))
    if (entry.path().extension() == ".log")
      fmt::print("---- the end of {}\n{}\n", entry.path().filename().string(),
                 tail_of(entry.path()));
  std::fflush(stdout);
}

http::client_response cluster::fetch(http::client_request what) const {
  auto answer = http::fetch(what, 30s);
  if (!answer)
    FAIL(what.method << " " << what.url << ": " << answer.error().text());
  return std::move(*answer);
}

http::client_response cluster::get(std::string_view path) const {
  return fetch({"GET", endpoint_ + std::string(path), {}, {}});
}

http::client_response cluster::post(std::string_view path, std::string body) const {
  return fetch({"POST",
                endpoint_ + std::string(path),
                {{"Content-Type", "application/json"}},
                std::move(body)});
}

json cluster::post_json(std::string_view path, const json& body, int status) const {
  auto answer = post(path, body.dump());
  INFO(path << " " << body.dump() << " -> " << answer.body);
  REQUIRE(answer.status == status);
  auto result = json::parse(answer.body, nullptr, false);
  REQUIRE(result.is_object());
  return result;
}

json cluster::status() const {
  auto answer = get("/v1/cluster");
  INFO(answer.body);
  REQUIRE(answer.status == 200);
  auto result = json::parse(answer.body, nullptr, false);
  REQUIRE(result.is_object());
  return result;
}

bool cluster::settled(const json& status) const {
  if (!status.is_object() || !status.value("ready", false))
    return false;
  for (const auto& node : status.at("nodes")) {
    if (node.at("state") != "up")
      return false;
    for (const auto& worker : node.at("workers"))
      if (worker.at("state") != "running" && worker.at("state") != "spare")
        return false;
  }
  for (const auto& recovery : status.at("recoveries"))
    if (recovery.at("phase") != "serving")
      return false;
  return true;
}

json cluster::wait_settled(std::size_t recoveries, std::chrono::milliseconds limit) const {
  json last;
  bool reached = eventually(
    [&] {
      last = status();
      return settled(last) && last.at("recoveries").size() >= recoveries;
    },
    limit);
  INFO(last.dump(1));
  REQUIRE(reached);
  return last;
}

json cluster::worker(const std::string& name) const {
  auto all = status();
  for (const auto& node : all.at("nodes"))
    for (const auto& worker : node.at("workers"))
      if (worker.at("name") == name)
        return worker;
  FAIL("there is no worker " << name);
  return {};
}

std::vector<std::string> cluster::worker_names() const {
  std::vector<std::string> result;
  auto all = status();
  for (const auto& node : all.at("nodes"))
    for (const auto& worker : node.at("workers"))
      result.push_back(worker.at("name"));
  return result;
}

pid_t cluster::worker_pid(const std::string& name) const {
  return worker(name).at("pid").get<pid_t>();
}

pid_t cluster::frontend_pid() const {
  return status().at("frontend").at("pid").get<pid_t>();
}

std::map<std::string, double> cluster::metrics() const {
  auto answer = get("/metrics");
  REQUIRE(answer.status == 200);
  std::map<std::string, double> result;
  std::istringstream lines(answer.body);
  for (std::string line; std::getline(lines, line);) {
    if (line.empty() || line.front() == '#')
      continue;
    // Prometheus' text format: the value is what follows the last space, as no timestamp is sent.
    auto space = line.rfind(' ');
    INFO("/metrics: " << line);
    REQUIRE(space != std::string::npos);
    std::size_t used = 0;
    auto value = std::stod(line.substr(space + 1), &used);
    REQUIRE(used == line.size() - space - 1);
    result[line.substr(0, space)] = value;
  }
  return result;
}

double cluster::metric(const std::string& name) const {
  double sum = 0;
  bool found = false;
  for (const auto& [key, value] : metrics()) {
    if (key == name || key.starts_with(name + "{")) {
      sum += value;
      found = true;
    }
  }
  INFO(name);
  REQUIRE(found);
  return sum;
}

void cluster::end() {
  launcher_->signal(SIGTERM);
  auto exit = launcher_->wait(shutdown_limit);
  INFO("troupe up said: " << launcher_->output());
  REQUIRE(exit);
  CHECK(exit->text() == "exited with code 0");
  auto left = processes_under(runtime_directory());
  INFO("left behind:\n" << list_of(left));
  CHECK(left.empty());
  CHECK_FALSE(fs::exists(runtime_directory() / "troupe" / name_ / "state.json"));
}

void cluster::end_by_killing_the_launcher(std::chrono::milliseconds limit) {
  auto begin = steady::now();
  launcher_->signal(SIGKILL);
  std::vector<running_process> left;
  bool gone = eventually(
    [&] {
      left = processes_under(runtime_directory());
      return left.empty();
    },
    limit);
  INFO("left behind:\n" << list_of(left));
  CHECK(gone);
  fmt::print("all processes are gone {:.0f} ms after the launcher's death\n",
             milliseconds(steady::now() - begin));
}

command_result run_troupe(std::vector<std::string> arguments, const fs::path& runtime_directory) {
  static int count = 0;
  auto begin = steady::now();
  program command(troupe_program(), std::move(arguments), runtime_directory,
                  runtime_directory / fmt::format("command-{}.log", ++count));
  auto exit = command.wait(10s);
  command_result result;
  result.seconds = milliseconds(steady::now() - begin) / 1000;
  result.output = command.output();
  INFO(result.output);
  if (!exit)
    FAIL("troupe has not ended in 10 s");
  result.code = exit->signalled ? 128 + exit->status : exit->status;
  return result;
}

} // namespace troupe::process_tests
