#pragma once

#include "troupe/base/child_processes.hpp"
#include "troupe/base/error.hpp"
#include "troupe/drill/outcome.hpp"

#include <atomic>
#include <condition_variable>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

/// `troupe drill`: carries out the scenarios of src/drill with real processes.
namespace troupe::tools::drills {

using namespace std::chrono_literals;

/// CLOCK_MONOTONIC, the clock of all times in drills and recovery records.
std::int64_t now_ns();

struct cluster_options {
  std::string program; ///< the `troupe` to launch
  std::filesystem::path config;
  std::vector<std::string> settings;
  std::vector<std::pair<std::string, std::string>> environment;
  std::filesystem::path directory; ///< becomes its XDG_RUNTIME_DIR; must exist
};

/// A `troupe up` of the drill's own, on a free port, and a thread that watches what it says about
/// itself. It dies with this object and with this process.
class cluster {
public:
  /// Returns when it is ready. Fails with what `troupe up` wrote.
  static expected<std::unique_ptr<cluster>> launch(cluster_options options);
  ~cluster();
  cluster(const cluster&) = delete;
  cluster& operator=(const cluster&) = delete;

  const std::string& endpoint() const { return endpoint_; }
  const std::filesystem::path& state_directory() const { return state_directory_; }
  double ready_s() const { return ready_s_; }

  /// The newest view, and when it was asked for.
  struct view {
    drill::topology shown;
    std::int64_t asked_ns = 0;
  };
  view newest() const;

  /// Waits until a view that was asked for after `after_ns` fulfils `done`; false at the limit, or
  /// when `give_up` says so. Runs `meanwhile` about every 10 ms, 2 ms if `closely`.
  bool wait(const std::function<bool(const drill::topology&)>& done, std::int64_t after_ns,
            std::chrono::milliseconds limit, const std::function<bool()>& meanwhile,
            bool closely = false);

  /// All recoveries ever seen, as last seen.
  std::vector<drill::record_seen> records() const;

  /// When the process `name` was first seen with another pid than `old_pid` after `after_ns`.
  std::optional<std::int64_t> replaced_ns(const std::string& name, int old_pid,
                                          std::int64_t after_ns) const;

  /// How the launcher ended, if it has.
  std::optional<std::string> ended() const;

  /// True if that is one of this cluster's processes.
  bool owns(int pid) const;

  /// Adds one sample of memory and descriptors of every process.
  void sample();
  std::vector<drill::process_series> series() const;

  /// Ends it like `troupe down`; what is left behind, a line each. Once.
  std::vector<std::string> end();

private:
  explicit cluster(cluster_options options);
  expected<void> start();
  void watch();
  void take(drill::topology seen, std::int64_t asked_ns);
  std::vector<int> pids() const;

  cluster_options options_;
  std::string endpoint_;
  std::filesystem::path state_directory_;
  double ready_s_ = 0;
  int launcher_pid_ = 0;
  std::filesystem::file_time_type launched_;
  std::vector<drill::process_series> series_;

  mutable std::mutex mutex_; // guards what follows
  std::condition_variable seen_;
  view newest_;
  std::vector<drill::record_seen> records_;
  struct change {
    std::string name;
    int pid = 0;
    std::int64_t seen_ns = 0;
  };
  std::vector<change> changes_;
  std::map<std::string, int> last_pids_;
  std::optional<std::string> ended_;

  std::atomic<bool> stopping_{false};
  std::atomic<bool> closely_{false};
  std::thread watcher_;
  std::unique_ptr<child_processes> children_; // last: ends first
};

} // namespace troupe::tools::drills
