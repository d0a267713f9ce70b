#pragma once

#include "troupe/base/error.hpp"

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <sys/types.h>

namespace troupe {

/// What to start.
struct child_spec {
  std::string name;                   ///< unique among the live children
  std::string program;                ///< path; empty: this very executable
  std::vector<std::string> arguments; ///< behind argv[0]
  std::vector<std::pair<std::string, std::string>> environment; ///< added to ours
  std::vector<int> inherited_fds; ///< stay open in the child under the same numbers
  std::string log_path; ///< stdout and stderr are appended here; empty, or it cannot be: inherited
};

/// What the kernel says of a thread: 'R' runs or waits for a processor, 'S' sleeps, 'D' waits in
/// the kernel, 'T' is stopped; '?' if there is none.
char task_state(pid_t process, pid_t thread);

/// How a child ended.
struct child_exit {
  std::string name;
  pid_t pid = 0;
  bool signalled = false;
  int status = 0;                                 ///< the signal, or the exit code
  std::chrono::steady_clock::time_point detected; ///< when the kernel's report was read

  /// "killed by signal 9", "exited with code 2".
  std::string text() const;
};

/// The child processes of this process. One thread starts, watches (pidfd) and reaps them all:
/// the kernel kills a child when the thread that forked it ends, so that no child
/// outlives this object or this process, however it dies.
class child_processes {
public:
  /// `on_exit` runs on the watching thread, once a child; it must not block.
  using exit_callback = std::function<void(const child_exit&)>;

  static expected<std::unique_ptr<child_processes>> start(exit_callback on_exit);

  /// Terminates what still runs (SIGTERM, then SIGKILL after `grace`) in the reverse order of
  /// starting, and joins.
  ~child_processes();

  /// Starts a child. Fails with io_failed when fork or exec do.
  expected<pid_t> spawn(child_spec spec);

  /// Sends a signal. Unknown names and children already gone are ignored.
  void signal(const std::string& name, int signal_number);

  /// Ends all children: SIGTERM in reverse order of starting, SIGKILL for what is left after
  /// `grace`. Returns when all are gone. No exit is reported for them.
  void stop_all(std::chrono::milliseconds grace);

private:
  struct state;
  explicit child_processes(std::unique_ptr<state> s);
  std::unique_ptr<state> state_;
};

} // namespace troupe
