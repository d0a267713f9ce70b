#pragma once

#include "troupe/base/error.hpp"
#include "troupe/base/fault_point.hpp"

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

/// Drills: disasters written down. A scenario names a cluster, a load, faults and what has to hold
/// all the while; `troupe drill` carries it out with real processes. This folder is the part
/// that needs none: reading scenarios, drawing times and targets, judging and reporting.
namespace troupe::drill {

using std::chrono::milliseconds;

/// A time to be drawn evenly from low to high.
struct time_range {
  milliseconds low{};
  milliseconds high{};
};

enum class fault_kind : std::uint8_t {
  kill,        ///< SIGKILL
  segv,        ///< SIGSEGV
  stop,        ///< SIGSTOP; SIGCONT after `lasting`
  resume,      ///< SIGCONT ("continue")
  kill_node,   ///< SIGKILL of a node's process and everything under it, at once
  partition,   ///< nothing arrives between two sides; connections stay open
  cut_journal, ///< SIGKILL, and the end of its journal is cut off at a random byte
  rule,        ///< a rule of the fault board
};

std::string_view to_string(fault_kind kind);

struct fault_spec {
  fault_kind kind = fault_kind::kill;
  /// Who, as written: a process ("node-0/worker-1", "controller"), an actor ("replica-0/stage-1"),
  /// a role ("any worker"), a pid. For rules and partitions a glob on process names will do.
  std::string target;
  std::string peer;     ///< partition: the other side, "*" for all others; rule: its peer
  bool one_way = false; ///< partition: only what `target` sends is lost
  faults::rule rule;    ///< of kind rule; its process is filled in from the target

  /// "kill", "frame.send corrupt".
  std::string text() const;
};

/// What an event may wait for instead of a time.
struct condition {
  enum class kind : std::uint8_t { worker_state, recovery_phase, epoch_raised };
  kind what = kind::worker_state;
  std::string worker; ///< worker_state: its name
  std::string state;  ///< the state, or the phase of the newest recovery

  std::string text() const;
};

struct event {
  time_range at; ///< after the run's start; with a condition: after that holds
  std::optional<condition> when;
  fault_spec fault;
  std::optional<time_range> lasting; ///< after which it is undone
  unsigned times = 1;                ///< repeated every `every`
  milliseconds every{0};
  int line = 0; ///< in the scenario's file

  /// "kill replica-0/stage-1": names the fault in tables.
  std::string label() const;
};

struct load_settings {
  unsigned streams = 48; ///< always in flight; with a rate: the burst that opens
  double rate_per_s = 0; ///< arrivals of an open loop; 0: closed loop
};

/// What has to hold.
struct check_settings {
  bool golden = true;                   ///< every answer is the known one
  std::uint32_t lost = 0;               ///< tokens that may be missing
  std::uint32_t duplicated = 0;         ///< tokens that may come twice
  bool leaks = true;                    ///< nothing may be left behind
  std::optional<double> longest_gap_ms; ///< of any stream
  std::optional<double> detect_ms;      ///< from a fault to its detection
  /// Whom records of recoveries must blame: "culprit" (those that were hit), "any", or a name.
  std::string cause = "any";
  std::uint32_t reconnects = 0; ///< connections of clients that may break
  std::uint32_t settle_s = 30;  ///< how long a cluster may take to be whole again
};

struct scenario {
  std::string name;
  std::string about;
  std::filesystem::path file;
  std::filesystem::path config;
  std::vector<std::string> settings; ///< put over the config
  load_settings load;
  std::uint64_t seed = 1;
  std::uint32_t runs = 1;
  std::vector<event> events;
  check_settings checks;
};

/// Reads a scenario. Fails with invalid_config; the cause lists every problem with line and key,
/// like that of a cluster file.
expected<scenario> parse(std::string_view text, const std::filesystem::path& file);

/// The same from a file. Its config is looked up beside it, then in the current directory.
expected<scenario> load(const std::filesystem::path& file);

/// "300ms", "1.5s", "2m"; nothing if it is none of them.
std::optional<milliseconds> parse_duration(std::string_view text);

/// "300ms..700ms" or one duration.
std::optional<time_range> parse_range(std::string_view text);

} // namespace troupe::drill
