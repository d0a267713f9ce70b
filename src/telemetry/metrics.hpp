#pragma once

#include "cluster.pb.h"

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace troupe::telemetry {

/// State of one replica's scheduler, as gauges.
struct replica_gauges {
  std::uint32_t queued = 0;
  std::uint32_t running = 0;
  std::uint32_t free_pages = 0;
  std::uint32_t in_flight = 0;
  std::uint64_t preemptions = 0;
  std::uint64_t drafted_tokens = 0;
  std::uint64_t accepted_tokens = 0;
  bool serving = false;
};

/// The frontend's metrics, for Prometheus. All names are in metrics.cpp, those of GPUs in
/// gpu_metrics.cpp. Belongs to one thread.
class metrics {
public:
  metrics();
  ~metrics();

  /// An HTTP answer was begun.
  void count_response(std::string_view route, int status);

  /// A request's first token came this long after its arrival.
  void first_token(std::chrono::duration<double> after);

  /// Two tokens of a request came this far apart.
  void between_tokens(std::chrono::duration<double> gap);

  void count_tokens(std::uint64_t prompt, std::uint64_t generated);
  void set_replica(std::uint32_t replica, const replica_gauges& gauges);
  void set_epoch(std::uint64_t epoch);
  void set_open_requests(std::uint64_t count);

  /// Writes of the request journal that have failed, in all.
  void set_journal_errors(std::uint64_t count);

  /// Calls that were taken up from an earlier frontend.
  void count_resumed(std::uint64_t calls);

  /// How the GPUs of all nodes are; one that is not named any more has no metrics any more.
  void set_devices(std::vector<proto::DeviceReport> reports);

  /// Prometheus' text format, version 0.0.4.
  std::string text() const;

private:
  struct state;
  std::unique_ptr<state> state_;
};

} // namespace troupe::telemetry
