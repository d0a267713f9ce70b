#pragma once

#include "troupe/actors/node_supervisor.hpp"
#include "troupe/actors/worker.hpp"
#include "troupe/base/error.hpp"

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

/// The processes of a cluster, and how one is launched. Each `run_…` is the life of one
/// process: it returns the exit code and is called last in main, with SIGINT and SIGTERM
/// blocked in all threads (see block_stop_signals).
namespace troupe::actors {

/// Where a cluster's config comes from: the file and what `--set` puts over it.
struct config_source {
  std::filesystem::path file;
  std::vector<std::string> settings;
};

/// The exit code of a process that found that restarting it cannot help (sysexits.h, EX_CONFIG).
inline constexpr int exit_permanent = 78;

/// Makes SIGINT and SIGTERM wait for whoever asks for them. Call before any thread starts.
void block_stop_signals();

/// What every process is told by its parent.
struct process_options {
  std::uint64_t incarnation = 1;
  std::filesystem::path state_directory; ///< for journals; empty: none are kept
  int startup_fd = -1;                   ///< see startup_report.hpp
  int pulse_fd = -1;                     ///< see pulse_page.hpp
};

struct controller_options {
  config_source config;
  process_options process;
  std::uint16_t port = 0; ///< 0: any; a restarted controller gets the port that others know
};

struct frontend_options {
  config_source config;
  process_options process;
  std::uint16_t controller_port = 0;
  std::uint16_t port = 0; ///< a restarted frontend gets its old port; 0: as configured
};

int run_controller(const controller_options& options);
int run_frontend(const frontend_options& options);
int run_node(node_options options, int pulse_fd);
int run_worker(worker_options options, std::uint32_t heartbeat_ms, int pulse_fd);

/// The files of a running cluster: its state, for `troupe status` and `down`, and its logs.
/// $XDG_RUNTIME_DIR/troupe or /tmp/troupe-UID, then the cluster's name.
std::filesystem::path state_directory(const std::string& cluster);

/// What `troupe up` leaves for the other commands in state.json.
struct cluster_state {
  std::string cluster;
  std::string endpoint;
  int pid = 0; ///< of `troupe up`
};

/// The state of a cluster of this user whose `troupe up` is alive; of the only one if `cluster` is
/// empty. Fails with not_found, naming those that run.
expected<cluster_state> find_cluster(const std::string& cluster);

struct launch_options {
  config_source config;
  std::string log_level = "info";
  std::function<void(const std::string&)> say; ///< progress, a line each
  std::function<void(const cluster_state&, double seconds)> on_ready;
};

/// `troupe up`: checks the config and the model, starts controller, nodes and frontend, restarts
/// those that die, and returns after SIGINT or SIGTERM when everything has been shut down,
/// or with what made it impossible.
expected<void> launch(const launch_options& options);

} // namespace troupe::actors
