#pragma once

#include "troupe/base/error.hpp"
#include "troupe/base/life_line.hpp"

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
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
  /// Of memory that it shares: its end is told of when this is lost, and again when it is gone.
  std::shared_ptr<life_line> life;
};

/// What the kernel says of a thread: 'R' runs or waits for a processor, 'S' sleeps, 'D' waits in
/// the kernel, 'T' is stopped; '?' if there is none.
char task_state(pid_t process, pid_t thread);

/// How a process ends that is on its way out, as waitpid will say: its end may take a while.
/// Nothing where the kernel does not tell, or where it says 0, as it does of those
/// that live.
std::optional<int> ending_status(pid_t process);

/// How a child ended.
struct child_exit {
  std::string name;
  pid_t pid = 0;
  bool signalled = false;
  int status = 0;              ///< the signal, or the exit code
  bool is_status_known = true; ///< false: only that it ended
  bool is_gone = true;         ///< false: it computes no more, and the kernel clears up behind it
  std::chrono::steady_clock::time_point detected; ///< when the kernel's report was read

  /// "killed by signal 9", "exited with code 2", "ended".
  std::string text() const;
  /// Takes over what waitpid said.
  void take(int wait_status);
};

/// The child processes of this process. One thread starts, watches (pidfd) and reaps them all:
/// the kernel kills a child when the thread that forked it ends, so that no child
/// outlives this object or this process, however it dies.
class child_processes {
public:
  /// `on_exit` runs on the watching thread, once a child and before that once more for one whose
  /// life line is lost; it must not block.
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
