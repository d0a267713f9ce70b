#include "drill_cluster.hpp"

#include "troupe/http/client.hpp"

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <sstream>

#include <arpa/inet.h>
#include <fmt/format.h>
#include <netinet/in.h>
#include <nlohmann/json.hpp>
#include <sys/socket.h>
#include <unistd.h>

namespace troupe::tools::drills {

namespace fs = std::filesystem;

namespace {

constexpr auto startup_patience = 120s;
constexpr auto shutdown_patience = 20s;
constexpr auto poll_interval = 20ms;
constexpr auto close_interval = 2ms;
constexpr auto fetch_deadline = 1000ms;
constexpr std::size_t shown_output = 2000;

std::string read_all(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

std::vector<std::string> arguments_of(int pid) {
  std::vector<std::string> result;
  std::istringstream all(read_all(fmt::format("/proc/{}/cmdline", pid)));
  for (std::string part; std::getline(all, part, '\0');)
    result.push_back(part);
  return result;
}

/// "node-0/worker-1" for `troupe worker --name node-0/worker-1 …`, "controller" for `troupe
/// controller …`.
std::string name_of(int pid) {
  auto arguments = arguments_of(pid);
  for (std::size_t i = 1; i + 1 < arguments.size(); ++i)
    if (arguments[i] == "--name")
      return arguments[i + 1];
  if (arguments.size() < 2)
    return fmt::format("pid {}", pid);
  return arguments[1] == "up" ? "launcher" : arguments[1];
}

double descriptors_of(int pid) {
  std::error_code failed;
  double count = 0;
  for (const auto& entry : fs::directory_iterator(fmt::format("/proc/{}/fd", pid), failed)) {
    (void)entry;
    ++count;
  }
  return count;
}

double private_kib(int pid) {
  const auto status = read_all(fmt::format("/proc/{}/status", pid));
  constexpr std::string_view key = "\nRssAnon:";
  const auto at = status.find(key);
  return at == std::string::npos ? 0 : std::atof(status.c_str() + at + key.size());
}

bool is_alive(int pid) {
  auto stat = read_all(fmt::format("/proc/{}/stat", pid));
  auto name_end = stat.rfind(')');
  return name_end != std::string::npos && stat.size() > name_end + 2 && stat[name_end + 2] != 'Z';
}

bool port_is_free(const std::string& endpoint) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port =
    htons(static_cast<std::uint16_t>(std::atoi(endpoint.substr(endpoint.rfind(':') + 1).c_str())));
  int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  int on = 1;
  ::setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  bool free = ::bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0;
  ::close(fd);
  return free;
}

/// True if a process has the file mapped or open: it belongs to somebody who lives.
bool is_in_use(const fs::path& file) {
  std::error_code failed;
  for (const auto& process : fs::directory_iterator("/proc", failed)) {
    if (std::atoi(process.path().filename().c_str()) <= 0)
      continue;
    if (read_all(process.path() / "maps").find(file.string()) != std::string::npos)
      return true;
    for (const auto& fd : fs::directory_iterator(process.path() / "fd", failed))
      if (fs::read_symlink(fd.path(), failed) == file)
        return true;
  }
  return false;
}

bool may_stay(const fs::path& file) {
  auto name = file.filename().string();
  return file.extension() == ".log" || file.extension() == ".gpu-core"
         || name.find(".journal") != std::string::npos || name == "lock";
}

} // namespace

std::int64_t now_ns() {
  timespec t{};
  ::clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<std::int64_t>(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

cluster::cluster(cluster_options options) : options_(std::move(options)) {}

expected<std::unique_ptr<cluster>> cluster::launch(cluster_options options) {
  std::unique_ptr<cluster> made(new cluster(std::move(options)));
  if (auto started = made->start(); !started)
    return tl::unexpected(started.error());
  return made;
}

expected<void> cluster::start() {
  auto children = child_processes::start([this](const child_exit& exit) {
    std::lock_guard lock(mutex_);
    ended_ = exit.text();
    seen_.notify_all();
  });
  if (!children)
    return tl::unexpected(children.error());
  children_ = std::move(*children);
  launched_ = fs::file_time_type::clock::now();
  const auto begin = now_ns();
  child_spec spec;
  spec.name = "launcher";
  spec.program = options_.program;
  spec.arguments = {"up", options_.config.string(), "--set", "serving.listen=127.0.0.1:0"};
  for (const auto& setting : options_.settings)
    spec.arguments.insert(spec.arguments.end(), {"--set", setting});
  spec.environment = options_.environment;
  spec.environment.emplace_back("XDG_RUNTIME_DIR", options_.directory.string());
  const auto log = options_.directory / "up.log";
  spec.log_path = log.string();
  auto pid = children_->spawn(std::move(spec));
  if (!pid)
    return tl::unexpected(pid.error());
  launcher_pid_ = *pid;
  const auto refuse = [&](error_code code, std::string_view what) {
    auto output = read_all(log);
    return fail(code, fmt::format("troupe up {} {}:\n{}", options_.config.string(), what,
                                  output.size() > shown_output
                                    ? output.substr(output.size() - shown_output)
                                    : output));
  };
  for (;;) {
    if (auto end = ended())
      return refuse(error_code::unavailable, *end);
    if (read_all(log).find("is ready after") != std::string::npos)
      break;
    if (now_ns() - begin > std::chrono::nanoseconds(startup_patience).count())
      return refuse(error_code::deadline_exceeded, "is not ready after two minutes");
    std::this_thread::sleep_for(poll_interval);
  }
  ready_s_ = static_cast<double>(now_ns() - begin) / 1e9;
  std::error_code failed;
  for (const auto& entry : fs::directory_iterator(options_.directory / "troupe", failed)) {
    auto state = nlohmann::json::parse(read_all(entry.path() / "state.json"), nullptr, false);
    if (!state.is_object())
      continue;
    endpoint_ = state.value("endpoint", "");
    state_directory_ = entry.path();
  }
  if (endpoint_.empty())
    return refuse(error_code::internal, "left no state.json");
  watcher_ = std::thread([this] { watch(); });
  return {};
}

cluster::~cluster() {
  stopping_ = true;
  if (watcher_.joinable())
    watcher_.join();
  children_.reset();
}

void cluster::watch() {
  while (!stopping_) {
    const auto asked = now_ns();
    auto answer = http::fetch({"GET", endpoint_ + "/v1/cluster", {}, {}}, fetch_deadline);
    if (answer && answer->status == 200) {
      auto shown = drill::read_topology(nlohmann::json::parse(answer->body, nullptr, false));
      if (shown)
        take(std::move(*shown), asked);
    }
    std::this_thread::sleep_for(closely_ ? std::chrono::milliseconds(close_interval)
                                         : std::chrono::milliseconds(poll_interval));
  }
}

void cluster::take(drill::topology seen, std::int64_t asked_ns) {
  const auto now = now_ns();
  seen.launcher.pid = launcher_pid_;
  std::lock_guard lock(mutex_);
  for (auto& r : seen.records) {
    // A controller that lost its past may use a number again.
    auto known = std::ranges::find_if(records_, [&](const auto& k) {
      return k.id == r.id && k.cause == r.cause && k.detected_ns == r.detected_ns;
    });
    r.first_seen_ns = known == records_.end() ? now : known->first_seen_ns;
    if (known == records_.end())
      records_.push_back(r);
    else
      *known = r;
  }
  const auto look = [&](const std::string& name, int pid) {
    auto& last = last_pids_[name];
    if (pid > 0 && pid != last)
      changes_.push_back({name, pid, now});
    last = pid;
  };
  look("controller", seen.controller.pid);
  look("frontend", seen.frontend.pid);
  for (const auto& n : seen.nodes)
    look(n.name, n.pid);
  for (const auto& w : seen.workers)
    look(w.name, w.pid);
  newest_ = {std::move(seen), asked_ns};
  seen_.notify_all();
}

cluster::view cluster::newest() const {
  std::lock_guard lock(mutex_);
  return newest_;
}

bool cluster::wait(const std::function<bool(const drill::topology&)>& done, std::int64_t after_ns,
                   std::chrono::milliseconds limit, const std::function<bool()>& meanwhile,
                   bool closely) {
  const auto end = now_ns() + std::chrono::nanoseconds(limit).count();
  closely_ = closely;
  bool reached = false;
  for (;;) {
    {
      std::unique_lock lock(mutex_);
      seen_.wait_for(lock, closely ? 2ms : 10ms);
      reached = newest_.asked_ns > after_ns && done(newest_.shown);
    }
    if (reached || now_ns() > end || !meanwhile())
      break;
  }
  closely_ = false;
  return reached;
}

std::vector<drill::record_seen> cluster::records() const {
  std::lock_guard lock(mutex_);
  return records_;
}

std::optional<std::int64_t> cluster::replaced_ns(const std::string& name, int old_pid,
                                                 std::int64_t after_ns) const {
  std::lock_guard lock(mutex_);
  for (const auto& c : changes_)
    if (c.name == name && c.pid != old_pid && c.seen_ns > after_ns)
      return c.seen_ns;
  return std::nullopt;
}

std::optional<std::string> cluster::ended() const {
  std::lock_guard lock(mutex_);
  return ended_;
}

bool cluster::owns(int pid) const {
  auto wanted = "XDG_RUNTIME_DIR=" + options_.directory.string();
  wanted.push_back('\0');
  return read_all(fmt::format("/proc/{}/environ", pid)).find(wanted) != std::string::npos;
}

std::vector<int> cluster::pids() const {
  std::vector<int> result;
  std::error_code failed;
  for (const auto& entry : fs::directory_iterator("/proc", failed)) {
    int pid = std::atoi(entry.path().filename().c_str());
    if (pid > 0 && owns(pid) && is_alive(pid))
      result.push_back(pid);
  }
  return result;
}

void cluster::sample() {
  if (series_.empty())
    series_.push_back({"all processes together", 0, {}, {}});
  double all_kib = 0, all_fds = 0;
  for (int pid : pids()) {
    auto known = std::ranges::find(series_, pid, &drill::process_series::pid);
    if (known == series_.end()) {
      series_.push_back({name_of(pid), pid, {}, {}});
      known = std::prev(series_.end());
    }
    known->private_kib.push_back(private_kib(pid));
    known->fds.push_back(descriptors_of(pid));
    all_kib += known->private_kib.back();
    all_fds += known->fds.back();
  }
  series_.front().private_kib.push_back(all_kib);
  series_.front().fds.push_back(all_fds);
}

std::vector<drill::process_series> cluster::series() const {
  return series_;
}

std::vector<std::string> cluster::end() {
  stopping_ = true;
  if (watcher_.joinable())
    watcher_.join();
  std::vector<std::string> left;
  // What a drill stopped could not obey.
  for (int pid : pids())
    ::kill(pid, SIGCONT);
  if (auto early = ended(); early)
    left.push_back("troupe up " + *early + " before it was told to");
  else
    children_->signal("launcher", SIGTERM);
  const auto begin = now_ns();
  while (!ended() && now_ns() - begin < std::chrono::nanoseconds(shutdown_patience).count())
    std::this_thread::sleep_for(poll_interval);
  auto exit = ended();
  if (!exit)
    left.push_back("troupe up has not ended in 20 s");
  else if (*exit != "exited with code 0")
    left.push_back("troupe up " + *exit);
  for (int pid : pids())
    left.push_back(fmt::format("process {} ({})", pid, name_of(pid)));
  children_.reset();
  if (!port_is_free(endpoint_))
    left.push_back("the port of " + endpoint_);
  std::error_code failed;
  for (const auto& entry : fs::recursive_directory_iterator(options_.directory / "troupe", failed))
    if (!entry.is_directory() && !may_stay(entry.path()))
      left.push_back("file " + entry.path().string());
  for (const auto& entry : fs::directory_iterator("/dev/shm", failed))
    if (entry.last_write_time(failed) >= launched_ && !is_in_use(entry.path()))
      left.push_back("shared memory " + entry.path().string());
  return left;
}

} // namespace troupe::tools::drills
