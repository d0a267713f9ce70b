#include "troupe/actors/runtime.hpp"

#include "troupe/actors/child_watch.hpp"
#include "troupe/actors/cluster_plan.hpp"
#include "troupe/base/child_processes.hpp"
#include "troupe/base/startup_report.hpp"
#include "troupe/config/cluster_config.hpp"
#include "troupe/http/client.hpp"
#include "troupe/recovery/restart_policy.hpp"
#include "troupe/transport/endpoint.hpp"

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <optional>
#include <set>

#include <fcntl.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>
#include <spdlog/spdlog.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/signalfd.h>
#include <poll.h>
#include <unistd.h>

namespace troupe::actors {

using namespace std::chrono_literals;

namespace {

constexpr auto startup_patience = 20s; // for one process to say that it runs
constexpr auto shutdown_grace = 4s;    // for all of them to end
constexpr auto poll_interval = 20ms;   // while waiting for readiness

constexpr auto reminder_interval = 15s; // while not ready: who is waited for

/// "node-1 (has not joined), node-0/worker-1 (loading)", out of GET /v1/cluster.
std::string who_is_missing(const nlohmann::json& status) {
  std::vector<std::string> missing;
  for (const auto& node : status.value("nodes", nlohmann::json::array())) {
    if (node.value("state", "") != "up") {
      missing.push_back(node.value("name", "") + " (has not joined)");
      continue;
    }
    for (const auto& worker : node.value("workers", nlohmann::json::array()))
      if (auto state = worker.value("state", ""); state != "running" && state != "spare")
        missing.push_back(fmt::format("{} ({})", worker.value("name", ""), state));
  }
  return missing.empty() ? "its replicas" : fmt::format("{}", fmt::join(missing, ", "));
}

/// Removes state.json when the launcher returns, however it does.
struct state_file {
  std::filesystem::path path;
  ~state_file() {
    std::error_code ignored;
    std::filesystem::remove(path, ignored);
  }
};

struct supervised_child {
  child_spec spec;
  recovery::restart_policy restarts;
  bool is_node = false; ///< the cluster lives on without it
  std::uint64_t incarnation = 0;
  pid_t pid = 0;
  std::optional<child_watch> watch;
  std::optional<std::chrono::steady_clock::time_point> retry;
};

/// The running cluster as its launcher sees it.
class launcher {
public:
  launcher(const launch_options& options, config::cluster_config config)
    : options_(options), config_(std::move(config)) {}

  expected<void> run();

private:
  expected<void> claim_state_directory();
  expected<std::uint16_t> start_reporting(const std::string& name,
                                          std::vector<std::string> arguments);
  expected<void> start_all();
  expected<void> wait_until_ready();
  expected<void> supervise();
  expected<void> handle_exits();
  expected<void> handle_exit(const child_exit& exit);
  expected<pid_t> start(supervised_child& child, std::vector<std::string> arguments = {},
                        std::vector<int> inherited_fds = {});
  void look_at_pulses();
  std::chrono::milliseconds hang_time() const {
    return std::chrono::milliseconds(config_.recovery.hang_ms);
  }
  child_spec make_spec(const std::string& name, std::vector<std::string> arguments) const;
  std::vector<std::string> config_arguments() const;
  std::string join_command(const std::string& node) const;
  recovery::restart_policy policy() const {
    return {config_.recovery.max_restarts, std::chrono::seconds(config_.recovery.within_s)};
  }
  bool stop_requested();
  void say(const std::string& line) const {
    if (options_.say)
      options_.say(line);
  }

  const launch_options& options_;
  config::cluster_config config_;
  std::filesystem::path directory_;
  unique_fd lock_;
  unique_fd signals_;
  unique_fd wake_;
  std::mutex mutex_; // guards exits_, which the watching thread fills
  std::vector<child_exit> exits_;
  std::map<std::string, supervised_child> supervised_;
  std::string endpoint_;
  std::uint16_t controller_port_ = 0;
  std::uint16_t frontend_port_ = 0;
  std::unique_ptr<child_processes> children_; // last: ends first
};

std::vector<std::string> launcher::config_arguments() const {
  std::vector<std::string> result{"--config", options_.config.file.string()};
  for (const auto& setting : options_.config.settings) {
    result.push_back("--set");
    result.push_back(setting);
  }
  return result;
}

child_spec launcher::make_spec(const std::string& name, std::vector<std::string> arguments) const {
  child_spec spec;
  spec.name = name;
  spec.arguments = std::move(arguments);
  spec.arguments.insert(spec.arguments.end(), {"--log-level", options_.log_level});
  spec.environment = transport::required_environment();
  spec.log_path = (directory_ / (name + ".log")).string();
  return spec;
}

expected<void> launcher::claim_state_directory() {
  directory_ = state_directory(config_.cluster);
  std::error_code failed;
  std::filesystem::create_directories(directory_, failed);
  if (!failed)
    std::filesystem::permissions(directory_, std::filesystem::perms::owner_all, failed);
  if (failed)
    return fail(error_code::io_failed,
                fmt::format("cannot use {}: {}", directory_.string(), failed.message()),
                "XDG_RUNTIME_DIR names another place");
  auto lock_path = (directory_ / "lock").string();
  lock_ = unique_fd(::open(lock_path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (!lock_ || ::flock(lock_.get(), LOCK_EX | LOCK_NB) != 0)
    return fail(
      error_code::invalid_config,
      fmt::format("a cluster named {} is running already", config_.cluster),
      fmt::format("`troupe down {0}` ends it, `troupe status {0}` shows it", config_.cluster));
  for (const auto& entry : std::filesystem::directory_iterator(directory_, failed))
    if (auto name = entry.path().filename().string();
        name.ends_with(".log") || name.find(".journal") != std::string::npos)
      std::filesystem::remove(entry.path(), failed);
  return {};
}

expected<std::uint16_t> launcher::start_reporting(const std::string& name,
                                                  std::vector<std::string> arguments) {
  auto pipe = startup_pipe::open();
  if (!pipe)
    return tl::unexpected(pipe.error());
  auto& child =
    supervised_.emplace(name, supervised_child{make_spec(name, std::move(arguments)), policy()})
      .first->second;
  auto pid = start(child, {"--startup-fd", std::to_string(pipe->child_fd())}, {pipe->child_fd()});
  if (!pid)
    return tl::unexpected(pid.error());
  auto port = pipe->wait(startup_patience);
  if (!port && port.error().origin.empty())
    port.error().cause = name + ": " + port.error().cause;
  return port;
}

/// Starts the next incarnation of a process.
expected<pid_t> launcher::start(supervised_child& child, std::vector<std::string> arguments,
                                std::vector<int> inherited_fds) {
  auto spec = child.spec;
  ++child.incarnation;
  child.retry.reset();
  child.watch.reset();
  spec.arguments.insert(spec.arguments.end(), arguments.begin(), arguments.end());
  spec.arguments.insert(spec.arguments.end(), {"--incarnation", std::to_string(child.incarnation)});
  spec.inherited_fds = std::move(inherited_fds);
  if (config_.recovery.level == config::protection::full) {
    auto watch = child_watch::begin(spec, hang_time());
    if (!watch)
      return tl::unexpected(watch.error());
    child.watch = std::move(*watch);
  }
  auto pid = children_->spawn(std::move(spec));
  child.pid = pid.value_or(0);
  return pid;
}

/// What a user types on another host. Whatever it leaves out the node finds out there.
std::string launcher::join_command(const std::string& node) const {
  auto command = fmt::format("troupe node --name {} --controller {}", node,
                             http::host_port(config_.network.bind, controller_port_));
  if (config_.recovery.heartbeat_ms != config::recovery_settings{}.heartbeat_ms)
    command += fmt::format(" --heartbeat-ms {}", config_.recovery.heartbeat_ms);
  return command;
}

expected<void> launcher::start_all() {
  std::vector<std::string> arguments{"controller", "--state-directory", directory_.string(),
                                     "--port", std::to_string(config_.network.port)};
  auto config_part = config_arguments();
  arguments.insert(arguments.end(), config_part.begin(), config_part.end());
  auto controller = start_reporting("controller", arguments);
  if (!controller)
    return tl::unexpected(controller.error());
  controller_port_ = *controller;
  // A restarted controller is found where the first one was.
  auto& controller_spec = supervised_.at("controller").spec.arguments;
  *std::next(std::find(controller_spec.begin(), controller_spec.end(), "--port")) =
    std::to_string(controller_port_);

  arguments = {"frontend", "--controller-port", std::to_string(controller_port_),
               "--state-directory", directory_.string()};
  arguments.insert(arguments.end(), config_part.begin(), config_part.end());
  auto frontend = start_reporting("frontend", arguments);
  if (!frontend)
    return tl::unexpected(frontend.error());
  frontend_port_ = *frontend;
  auto& frontend_spec = supervised_.at("frontend").spec.arguments;
  frontend_spec.insert(frontend_spec.end(), {"--port", std::to_string(frontend_port_)});
  endpoint_ = "http://" + http::host_port(config_.serving.listen_host, frontend_port_);

  for (const auto& node : config_.nodes) {
    if (node.launch != config::launch_mode::local) {
      say(fmt::format("waiting for {} to join: run `{}` on {}", node.name, join_command(node.name),
                      node.host));
      continue;
    }
    auto spec = make_spec(
      node.name,
      {"node", "--name", node.name, "--bind", config_.network.bind, "--controller",
       fmt::format("{}:{}", config_.network.bind, controller_port_), "--heartbeat-ms",
       std::to_string(config_.recovery.heartbeat_ms), "--log-directory", directory_.string()});
    auto& child = supervised_.emplace(node.name, supervised_child{std::move(spec), policy(), true})
                    .first->second;
    if (auto pid = start(child); !pid)
      return tl::unexpected(pid.error());
  }
  return {};
}

bool launcher::stop_requested() {
  signalfd_siginfo info{};
  return ::read(signals_.get(), &info, sizeof(info)) == static_cast<ssize_t>(sizeof(info));
}

expected<void> launcher::handle_exits() {
  std::vector<child_exit> now;
  {
    std::lock_guard lock(mutex_);
    now.swap(exits_);
  }
  for (const auto& exit : now)
    if (auto handled = handle_exit(exit); !handled)
      return handled;
  auto time = std::chrono::steady_clock::now();
  for (auto& [name, child] : supervised_) {
    if (!child.retry || *child.retry > time)
      continue;
    if (auto pid = start(child); !pid) {
      say(fmt::format("{}; trying again", pid.error().cause));
      child.retry = time + recovery::restart_policy::spawn_retry_interval;
    }
  }
  return {};
}

expected<void> launcher::handle_exit(const child_exit& exit) {
  auto& child = supervised_.at(exit.name);
  auto now = std::chrono::steady_clock::now();
  bool was_judged = child.watch && !child.watch->verdict().empty();
  auto cause = was_judged    ? child.watch->verdict() + "; it was killed"
               : child.watch ? child.watch->cause_of(exit)
                             : exit.text();
  bool permanent = !exit.signalled && exit.status == exit_permanent;
  if (permanent || !child.restarts.allow(now)) {
    if (permanent || !child.is_node)
      return fail(
        error_code::unavailable,
        fmt::format("the {} process {}{}", exit.name, cause, permanent ? "" : ", too often"),
        fmt::format("see {}", child.spec.log_path));
    // The cluster moves what ran there, if there is room, and the node may come back later.
    say(fmt::format("the {} process (pid {}) {}, too often; the next attempt is in {} s, see {}",
                    exit.name, exit.pid, cause, config_.recovery.within_s, child.spec.log_path));
    child.retry = now + std::chrono::seconds(config_.recovery.within_s);
    return {};
  }
  say(fmt::format("the {} process (pid {}) {}; restarting it", exit.name, exit.pid, cause));
  if (auto pid = start(child); !pid) {
    say(fmt::format("{}; trying again", pid.error().cause));
    child.retry = now + recovery::restart_policy::spawn_retry_interval;
  }
  return {};
}

void launcher::look_at_pulses() {
  auto now = std::chrono::steady_clock::now();
  for (auto& [name, child] : supervised_)
    if (child.watch && !child.retry && child.watch->look(child.pid, now))
      children_->signal(name, SIGKILL);
}

expected<void> launcher::wait_until_ready() {
  auto begin = std::chrono::steady_clock::now();
  auto reminded = begin;
  const auto patience = std::chrono::seconds(config_.recovery.startup_s);
  std::set<std::string> said;
  std::string missing = "the frontend (does not answer)";
  for (;;) {
    if (stop_requested())
      return fail(error_code::cancelled, "stopped before the cluster was ready");
    if (auto handled = handle_exits(); !handled)
      return handled;
    look_at_pulses();
    auto answer = http::fetch({"GET", endpoint_ + "/v1/cluster", {}, {}}, 2000ms);
    if (answer && answer->status == 200) {
      auto status = nlohmann::json::parse(answer->body, nullptr, false);
      if (status.contains("error")) {
        const auto& e = status["error"];
        return fail(error_code::unavailable, e.value("cause", "unknown"), e.value("cure", ""));
      }
      for (const auto& node : status.value("nodes", nlohmann::json::array()))
        for (const auto& worker : node["workers"])
          if (auto state = worker.value("state", "");
              state != "starting" && said.insert(worker["name"].get<std::string>() + state).second)
            say(fmt::format("{} {}", worker["name"].get<std::string>(), state));
      if (status.value("ready", false)) {
        auto seconds =
          std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
        if (options_.on_ready)
          options_.on_ready({config_.cluster, endpoint_, ::getpid()}, seconds);
        return {};
      }
      missing = who_is_missing(status);
    }
    const auto now = std::chrono::steady_clock::now();
    if (now - begin > patience)
      return fail(error_code::deadline_exceeded,
                  fmt::format("the cluster was not ready after {} s: waited for {}",
                              patience.count(), missing),
                  fmt::format("the logs are in {}; recovery.startup_s gives it more time",
                              directory_.string()));
    if (now - reminded > reminder_interval) {
      reminded = now;
      say(fmt::format("still waiting for {}", missing));
    }
    std::this_thread::sleep_for(poll_interval);
  }
}

expected<void> launcher::supervise() {
  for (;;) {
    pollfd waiting[2] = {{signals_.get(), POLLIN, 0}, {wake_.get(), POLLIN, 0}};
    ::poll(waiting, 2, static_cast<int>(child_watch::interval(hang_time()).count()));
    if (stop_requested())
      return {};
    look_at_pulses();
    std::uint64_t count = 0;
    [[maybe_unused]] auto got = ::read(wake_.get(), &count, sizeof(count));
    if (auto handled = handle_exits(); !handled)
      return handled;
  }
}

expected<void> launcher::run() {
  if (auto plan = check_before_launch(config_); !plan)
    return tl::unexpected(plan.error());
  if (auto claimed = claim_state_directory(); !claimed)
    return claimed;
  sigset_t stop_signals;
  sigemptyset(&stop_signals);
  sigaddset(&stop_signals, SIGINT);
  sigaddset(&stop_signals, SIGTERM);
  signals_ = unique_fd(::signalfd(-1, &stop_signals, SFD_CLOEXEC | SFD_NONBLOCK));
  wake_ = unique_fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!signals_ || !wake_)
    return fail(error_code::resource_exhausted,
                fmt::format("descriptors: {}", std::strerror(errno)));
  auto children = child_processes::start([this](const child_exit& exit) {
    {
      std::lock_guard lock(mutex_);
      exits_.push_back(exit);
    }
    std::uint64_t one = 1;
    [[maybe_unused]] auto written = ::write(wake_.get(), &one, sizeof(one));
  });
  if (!children)
    return tl::unexpected(children.error());
  children_ = std::move(*children);

  state_file state{directory_ / "state.json"};
  auto outcome = start_all();
  if (outcome) {
    std::ofstream(state.path) << nlohmann::json{
      {"cluster", config_.cluster}, {"endpoint", endpoint_}, {"pid", ::getpid()}};
    outcome = wait_until_ready();
  }
  if (outcome)
    outcome = supervise();
  children_->stop_all(shutdown_grace);
  return outcome;
}

std::filesystem::path state_root() {
  if (const char* runtime = std::getenv("XDG_RUNTIME_DIR"); runtime != nullptr && *runtime != '\0')
    return std::filesystem::path(runtime) / "troupe";
  return fmt::format("/tmp/troupe-{}", ::getuid());
}

expected<cluster_state> read_state(const std::filesystem::path& directory) {
  std::ifstream file(directory / "state.json");
  auto json = nlohmann::json::parse(file, nullptr, false);
  if (!json.is_object() || !json.contains("pid") || !json.contains("endpoint"))
    return fail(error_code::not_found, fmt::format("no cluster runs from {}", directory.string()));
  cluster_state result{json.value("cluster", ""), json.value("endpoint", ""), json.value("pid", 0)};
  if (::kill(result.pid, 0) != 0)
    return fail(error_code::not_found, fmt::format("the launcher of {} is dead", result.cluster));
  return result;
}

} // namespace

std::filesystem::path state_directory(const std::string& cluster) {
  return state_root() / cluster;
}

expected<cluster_state> find_cluster(const std::string& cluster) {
  std::vector<cluster_state> running;
  std::error_code failed;
  for (const auto& entry : std::filesystem::directory_iterator(state_root(), failed))
    if (auto state = read_state(entry.path()))
      running.push_back(*state);
  std::string names;
  for (const auto& state : running) {
    if (state.cluster == cluster)
      return state;
    names += (names.empty() ? "" : ", ") + state.cluster;
  }
  if (running.empty())
    return fail(error_code::not_found, "no cluster is running",
                "start one: troupe up configs/local.yaml");
  if (cluster.empty() && running.size() == 1)
    return running.front();
  return fail(error_code::not_found,
              cluster.empty()
                ? "several clusters are running: " + names
                : fmt::format("no cluster named {} is running; {} is", cluster, names),
              "name one of them");
}

expected<void> launch(const launch_options& options) {
  auto config = config::load(options.config.file, options.config.settings);
  if (!config)
    return tl::unexpected(config.error());
  return launcher(options, std::move(*config)).run();
}

} // namespace troupe::actors
