#include "troupe/base/child_processes.hpp"

#include "troupe/base/fault_point.hpp"
#include "troupe/base/unique_fd.hpp"

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <future>
#include <iterator>
#include <mutex>
#include <system_error>
#include <thread>

#include <fcntl.h>
#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

extern char** environ;

namespace troupe {

namespace {

/// Everything that the child needs between fork and exec, prepared beforehand, since
/// only async-signal-safe calls are allowed there.
struct launch {
  std::string program = "/proc/self/exe";
  std::vector<std::string> argument_storage;
  std::vector<std::string> environment_storage;
  std::vector<char*> argv;
  std::vector<char*> envp;
  std::vector<int> inherited_fds;
  int log_fd = -1;
  int failure_fd = -1;
  pid_t parent = 0;
};

std::vector<char*> pointers(std::vector<std::string>& strings) {
  std::vector<char*> result;
  for (auto& s : strings)
    result.push_back(s.data());
  result.push_back(nullptr);
  return result;
}

[[noreturn]] void run_child(const launch& l) {
  auto give_up = [&l] {
    int code = errno;
    // The parent reads the reason; if even this write fails, the exit code still tells.
    [[maybe_unused]] auto written = ::write(l.failure_fd, &code, sizeof(code));
    ::_exit(127);
  };
  if (::prctl(PR_SET_PDEATHSIG, SIGKILL) != 0)
    give_up();
  // The parent may have died before the line above took effect.
  if (::getppid() != l.parent)
    ::_exit(127);
  sigset_t none;
  ::sigemptyset(&none);
  ::sigprocmask(SIG_SETMASK, &none, nullptr);
  for (int number : {SIGPIPE, SIGINT, SIGTERM, SIGHUP, SIGCHLD})
    ::signal(number, SIG_DFL);
  // Ctrl-C in a terminal goes to the whole foreground group; the children are stopped in order by
  // their parents instead.
  ::setpgid(0, 0);
  if (l.log_fd >= 0) {
    ::dup2(l.log_fd, STDOUT_FILENO);
    ::dup2(l.log_fd, STDERR_FILENO);
  }
  ::syscall(SYS_close_range, 3U, ~0U, 1U << 2 /* CLOSE_RANGE_CLOEXEC */);
  for (int fd : l.inherited_fds)
    ::fcntl(fd, F_SETFD, 0);
  ::execve(l.program.c_str(), l.argv.data(), l.envp.data());
  give_up();
  ::_exit(127);
}

/// Its directory may be gone, for temporary ones are tidied up by strangers.
unique_fd open_log(const std::string& path) {
  constexpr int flags = O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC;
  unique_fd log(::open(path.c_str(), flags, 0600));
  if (log || errno != ENOENT)
    return log;
  std::error_code failed;
  std::filesystem::create_directories(std::filesystem::path(path).parent_path(), failed);
  return unique_fd(::open(path.c_str(), flags, 0600));
}

int open_pidfd(pid_t pid) {
  return static_cast<int>(::syscall(SYS_pidfd_open, pid, 0));
}

} // namespace

char task_state(pid_t process, pid_t thread) {
  std::ifstream file(fmt::format("/proc/{}/task/{}/stat", process, thread));
  std::string text((std::istreambuf_iterator<char>(file)), {});
  auto behind_name = text.rfind(')');
  return behind_name == std::string::npos || behind_name + 2 >= text.size() ? '?'
                                                                            : text[behind_name + 2];
}

std::optional<int> ending_status(pid_t process) {
  // proc(5), /proc/pid/stat: the 52nd field and last one, of which the name in brackets is the 2nd.
  std::ifstream file(fmt::format("/proc/{}/stat", process));
  std::string text((std::istreambuf_iterator<char>(file)), {});
  auto begin = text.find_last_of(' ');
  if (begin == std::string::npos
      || std::count(text.begin() + text.rfind(')'), text.end(), ' ') != 50)
    return std::nullopt;
  auto status = std::atoi(text.c_str() + begin);
  return status == 0 ? std::nullopt : std::optional(status);
}

std::string child_exit::text() const {
  if (!is_status_known)
    return "ended";
  return signalled ? fmt::format("killed by signal {}", status)
                   : fmt::format("exited with code {}", status);
}

void child_exit::take(int wait_status) {
  signalled = WIFSIGNALED(wait_status);
  status = signalled ? WTERMSIG(wait_status) : WEXITSTATUS(wait_status);
}

struct child_processes::state {
  struct child {
    std::string name;
    pid_t pid = 0;
    unique_fd pidfd;
    bool reported = true;
    std::uint64_t number = 0; ///< of all that were started
    std::shared_ptr<life_line> life;
    std::thread listener; ///< waits for the loss of `life`
  };

  exit_callback on_exit;
  unique_fd wake_fd;
  std::mutex mutex; // guards commands and stopping
  std::vector<std::function<void()>> commands;
  bool stopping = false;
  std::vector<child> children; // of the watching thread only, like the next one
  std::uint64_t num_started = 0;
  std::thread thread;

  void wake() {
    std::uint64_t one = 1;
    [[maybe_unused]] auto written = ::write(wake_fd.get(), &one, sizeof(one));
  }

  void post(std::function<void()> command) {
    {
      std::lock_guard lock(mutex);
      commands.push_back(std::move(command));
    }
    wake();
  }

  /// Runs a function on the watching thread and waits for its result.
  template <class F>
  auto call(F f) -> decltype(f()) {
    std::promise<decltype(f())> promise;
    auto future = promise.get_future();
    post([&] { promise.set_value(f()); });
    return future.get();
  }

  expected<pid_t> spawn(child_spec spec) {
    launch l;
    l.parent = ::getpid();
    if (!spec.program.empty())
      l.program = spec.program;
    l.argument_storage.push_back(spec.program.empty() ? "troupe" : spec.program);
    l.argument_storage.insert(l.argument_storage.end(), spec.arguments.begin(),
                              spec.arguments.end());
    for (char** entry = environ; *entry != nullptr; ++entry)
      l.environment_storage.emplace_back(*entry);
    for (const auto& [key, value] : spec.environment) {
      std::erase_if(l.environment_storage,
                    [&](const std::string& e) { return e.starts_with(key + "="); });
      l.environment_storage.push_back(key + "=" + value);
    }
    l.argv = pointers(l.argument_storage);
    l.envp = pointers(l.environment_storage);
    l.inherited_fds = spec.inherited_fds;

    unique_fd log;
    if (!spec.log_path.empty()) {
      log = open_log(spec.log_path);
      // Bringing a process back matters more than what it has to say.
      if (log)
        l.log_fd = log.get();
      else
        spdlog::error("cannot open the log {} of {}: {}; it goes on without", spec.log_path,
                      spec.name, std::strerror(errno));
    }
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0)
      return fail(error_code::resource_exhausted, fmt::format("pipe: {}", std::strerror(errno)));
    unique_fd read_end(ends[0]);
    unique_fd write_end(ends[1]);
    l.failure_fd = write_end.get();

    auto injected = faults::hit(faults::point::process_spawn, spec.name);
    if (injected && injected->what == faults::kind::delay)
      std::this_thread::sleep_for(std::chrono::milliseconds(injected->delay_ms));
    pid_t pid = -1;
    if (injected && injected->what == faults::kind::fail)
      errno = EAGAIN;
    else
      pid = ::fork();
    if (pid < 0)
      return fail(error_code::resource_exhausted,
                  fmt::format("cannot start {}: fork: {}", spec.name, std::strerror(errno)));
    if (pid == 0)
      run_child(l);
    write_end.reset();
    int code = 0;
    // Ends with end-of-file as soon as exec succeeded.
    if (::read(read_end.get(), &code, sizeof(code)) > 0) {
      ::waitpid(pid, nullptr, 0);
      return fail(error_code::io_failed,
                  fmt::format("cannot start {}: exec: {}", spec.name, std::strerror(code)));
    }
    unique_fd pidfd(open_pidfd(pid));
    if (!pidfd) {
      auto reason = std::strerror(errno);
      ::kill(pid, SIGKILL);
      ::waitpid(pid, nullptr, 0);
      return fail(error_code::resource_exhausted,
                  fmt::format("pidfd of {}: {}", spec.name, reason));
    }
    auto& started = children.emplace_back();
    started.name = spec.name;
    started.pid = pid;
    started.pidfd = std::move(pidfd);
    started.number = ++num_started;
    if (spec.life)
      listen(started, std::move(spec.life));
    return pid;
  }

  void listen(child& c, std::shared_ptr<life_line> life) {
    auto wait = [this, life, number = c.number] {
      ::pthread_setname_np(::pthread_self(), "life line");
      if (!life->wait())
        return;
      auto now = std::chrono::steady_clock::now();
      post([this, number, now] { lose(number, now); });
    };
    // Signals are handled by the threads that expect them.
    sigset_t all;
    sigset_t before;
    ::sigfillset(&all);
    ::pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      c.listener = std::thread(std::move(wait));
      c.life = std::move(life);
    } catch (const std::system_error& e) {
      spdlog::warn("the end of {} will be heard of late: {}", c.name, e.what());
    }
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  /// A child is as good as dead; where only a part of it is, all of it has to be.
  void lose(std::uint64_t number, std::chrono::steady_clock::time_point detected) {
    for (const auto& c : children) {
      if (c.number != number)
        continue;
      child_exit e;
      auto status = ending_status(c.pid);
      // Before Linux 5.17 it is that of the first thread, which may be a moment behind.
      for (int i = 0; i < 10 && !status; ++i) {
        std::this_thread::sleep_for(std::chrono::microseconds(100));
        status = ending_status(c.pid);
      }
      ::syscall(SYS_pidfd_send_signal, c.pidfd.get(), SIGKILL, nullptr, 0);
      e.name = c.name;
      e.pid = c.pid;
      e.detected = detected;
      e.is_gone = false;
      e.is_status_known = status.has_value();
      e.take(status.value_or(0));
      if (c.reported)
        on_exit(e);
      return;
    }
  }

  void reap(std::size_t index) {
    child c = std::move(children[index]);
    children.erase(children.begin() + static_cast<std::ptrdiff_t>(index));
    child_exit e;
    e.name = c.name;
    e.pid = c.pid;
    e.detected = std::chrono::steady_clock::now();
    int status = 0;
    ::waitpid(c.pid, &status, 0);
    e.take(status);
    if (c.life) {
      c.life->close();
      c.listener.join();
    }
    if (c.reported)
      on_exit(e);
  }

  /// Waits for exits and commands, `timeout_ms` at most.
  void poll_once(int timeout_ms) {
    std::vector<pollfd> fds;
    fds.push_back({wake_fd.get(), POLLIN, 0});
    for (const auto& c : children)
      fds.push_back({c.pidfd.get(), POLLIN, 0});
    if (::poll(fds.data(), fds.size(), timeout_ms) <= 0)
      return;
    for (std::size_t i = fds.size(); i-- > 1;)
      if (fds[i].revents != 0)
        reap(i - 1);
    if (fds[0].revents != 0) {
      std::uint64_t count = 0;
      [[maybe_unused]] auto got = ::read(wake_fd.get(), &count, sizeof(count));
    }
  }

  void run_commands() {
    std::vector<std::function<void()>> now;
    {
      std::lock_guard lock(mutex);
      now.swap(commands);
    }
    for (auto& command : now)
      command();
  }

  void stop_children(std::chrono::milliseconds grace) {
    for (auto& c : children)
      c.reported = false;
    auto deadline = std::chrono::steady_clock::now() + grace;
    while (!children.empty()) {
      pid_t last = children.back().pid;
      ::kill(last, std::chrono::steady_clock::now() < deadline ? SIGTERM : SIGKILL);
      ::kill(last, SIGCONT); // a stopped process would not see SIGTERM
      while (!children.empty() && children.back().pid == last) {
        auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
          deadline - std::chrono::steady_clock::now());
        if (left.count() <= 0)
          ::kill(last, SIGKILL);
        poll_once(static_cast<int>(std::clamp<long>(left.count(), 1, 50)));
      }
    }
  }

  void run() {
    for (;;) {
      run_commands();
      {
        std::lock_guard lock(mutex);
        if (stopping)
          break;
        if (!commands.empty())
          continue;
      }
      poll_once(-1);
    }
    stop_children(std::chrono::seconds(2));
  }
};

child_processes::child_processes(std::unique_ptr<state> s) : state_(std::move(s)) {
  state_->thread = std::thread([s = state_.get()] { s->run(); });
}

expected<std::unique_ptr<child_processes>> child_processes::start(exit_callback on_exit) {
  auto s = std::make_unique<state>();
  s->on_exit = std::move(on_exit);
  s->wake_fd = unique_fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!s->wake_fd)
    return fail(error_code::resource_exhausted, fmt::format("eventfd: {}", std::strerror(errno)));
  return std::unique_ptr<child_processes>(new child_processes(std::move(s)));
}

child_processes::~child_processes() {
  {
    std::lock_guard lock(state_->mutex);
    state_->stopping = true;
  }
  state_->wake();
  state_->thread.join();
}

expected<pid_t> child_processes::spawn(child_spec spec) {
  return state_->call([&] { return state_->spawn(std::move(spec)); });
}

void child_processes::signal(const std::string& name, int signal_number) {
  state_->call([&] {
    for (const auto& c : state_->children)
      if (c.name == name)
        ::syscall(SYS_pidfd_send_signal, c.pidfd.get(), signal_number, nullptr, 0);
    return true;
  });
}

void child_processes::stop_all(std::chrono::milliseconds grace) {
  state_->call([&] {
    state_->stop_children(grace);
    return true;
  });
}

} // namespace troupe
