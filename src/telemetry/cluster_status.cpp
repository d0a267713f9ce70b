#include "troupe/telemetry/cluster_status.hpp"

#include "troupe/base/error.hpp"

#include <cmath>
#include <string_view>

#include <nlohmann/json.hpp>

namespace troupe::telemetry {

namespace {

using nlohmann::ordered_json;

/// Milliseconds with three decimals: a status is read by people too.
double rounded(double milliseconds) {
  return std::round(milliseconds * 1000) / 1000;
}

std::string_view phase_name(proto::RecoveryPhase phase) {
  switch (phase) {
  case proto::DETECTING: return "detecting";
  case proto::FENCING: return "fencing";
  case proto::RESTORING: return "restoring";
  case proto::REPLAYING: return "replaying";
  case proto::SERVING: return "serving";
  default: return "unknown";
  }
}

ordered_json to_json(const proto::Error& e) {
  return {{"code", to_string(static_cast<error_code>(e.code()))},
          {"cause", e.cause()},
          {"cure", e.cure()},
          {"origin", e.origin()}};
}

ordered_json to_json(const proto::ActorPlan& actor, proto::ProcessState state) {
  ordered_json result;
  result["id"] = actor.id();
  if (actor.kind() == proto::STAGE) {
    result["kind"] = "stage";
    result["layers"] = {actor.first_layer(), actor.end_layer()};
  } else {
    result["kind"] = "expert_group";
    result["experts"] = {actor.first_expert(), actor.end_expert()};
  }
  result["state"] = state_name(state);
  return result;
}

ordered_json to_json(const proto::WorkerView& worker) {
  ordered_json result{{"name", worker.plan().name()},        {"pid", worker.pid()},
                      {"incarnation", worker.incarnation()}, {"state", state_name(worker.state())},
                      {"device", worker.plan().device()},    {"actors", ordered_json::array()}};
  for (const auto& actor : worker.plan().actors())
    result["actors"].push_back(to_json(actor, worker.state()));
  if (worker.error().code() != 0)
    result["error"] = to_json(worker.error());
  return result;
}

ordered_json to_json(const proto::KeeperView& keeper) {
  ordered_json result{{"name", keeper.name()}, {"device", keeper.device()}};
  if (keeper.pid() != 0)
    result["pid"] = keeper.pid();
  if (keeper.has_kept_bytes())
    result["kept_bytes"] = keeper.kept_bytes();
  if (keeper.has_num_blocks())
    result["blocks"] = keeper.num_blocks();
  return result;
}

ordered_json to_json(const proto::GpuReading& gpu) {
  ordered_json result{{"device", gpu.device()}, {"name", gpu.name()}, {"uuid", gpu.uuid()}};
  auto put = [&](const char* name, bool is_there, auto value) {
    if (is_there)
      result[name] = value;
  };
  put("utilization", gpu.has_utilization(), gpu.utilization());
  put("memory_utilization", gpu.has_memory_utilization(), gpu.memory_utilization());
  put("memory_used_bytes", gpu.has_memory_used_bytes(), gpu.memory_used_bytes());
  put("memory_total_bytes", gpu.has_memory_total_bytes(), gpu.memory_total_bytes());
  put("temperature_celsius", gpu.has_temperature_celsius(), gpu.temperature_celsius());
  put("sm_clock_hz", gpu.has_sm_clock_hz(), gpu.sm_clock_hz());
  put("memory_clock_hz", gpu.has_memory_clock_hz(), gpu.memory_clock_hz());
  put("power_watts", gpu.has_power_watts(), gpu.power_watts());
  put("ecc_corrected", gpu.has_ecc_corrected(), gpu.ecc_corrected());
  put("ecc_uncorrected", gpu.has_ecc_uncorrected(), gpu.ecc_uncorrected());
  put("nvlink_active_links", gpu.has_nvlink_active_links(), gpu.nvlink_active_links());
  put("nvlink_sent_bytes", gpu.has_nvlink_sent_bytes(), gpu.nvlink_sent_bytes());
  put("nvlink_received_bytes", gpu.has_nvlink_received_bytes(), gpu.nvlink_received_bytes());
  put("nvlink_replay_errors", gpu.has_nvlink_replay_errors(), gpu.nvlink_replay_errors());
  put("nvlink_recovery_errors", gpu.has_nvlink_recovery_errors(), gpu.nvlink_recovery_errors());
  put("nvlink_crc_flit_errors", gpu.has_nvlink_crc_flit_errors(), gpu.nvlink_crc_flit_errors());
  put("nvlink_crc_data_errors", gpu.has_nvlink_crc_data_errors(), gpu.nvlink_crc_data_errors());
  return result;
}

/// Of a node with GPUs; one without has neither list.
void put_devices(const proto::ClusterStatus& status, const std::string& node, ordered_json& to) {
  for (const auto& report : status.devices()) {
    if (report.node() != node)
      continue;
    to["keepers"] = ordered_json::array();
    to["gpus"] = ordered_json::array();
    for (const auto& keeper : report.keepers())
      to["keepers"].push_back(to_json(keeper));
    for (const auto& gpu : report.gpus())
      to["gpus"].push_back(to_json(gpu));
  }
}

ordered_json to_json(const proto::RecoveryRecord& r) {
  return {{"id", r.id()},
          {"level", r.level()},
          {"cause", r.cause()},
          {"epoch", r.epoch()},
          {"phase", phase_name(r.phase())},
          {"detected_by", r.detected_by()},
          {"detected_ns", r.detected_ns()},
          {"restored_by", r.restored_by()},
          {"detect_ms", rounded(r.detect_ms())},
          {"fence_ms", rounded(r.fence_ms())},
          {"restore_ms", rounded(r.restore_ms())},
          {"first_token_ms", rounded(r.first_token_ms())},
          {"requests", r.requests()},
          {"tokens_replayed", r.tokens_replayed()}};
}

} // namespace

std::string_view state_name(proto::ProcessState state) {
  switch (state) {
  case proto::STARTING: return "starting";
  case proto::LOADING: return "loading";
  case proto::RUNNING: return "running";
  case proto::LOST: return "lost";
  case proto::FAILED: return "failed";
  case proto::IDLE: return "spare";
  default: return "unknown";
  }
}

std::string status_json(const proto::ClusterStatus& status, bool ready) {
  ordered_json result;
  result["cluster"] = status.cluster();
  result["ready"] = ready;
  result["epoch"] = status.view().epoch();
  result["endpoint"] = status.frontend().endpoint();
  result["controller"] = {{"pid", status.controller_pid()},
                          {"incarnation", status.controller_incarnation()}};
  result["frontend"] = {{"pid", status.frontend().pid()},
                        {"incarnation", status.frontend().incarnation()}};
  result["nodes"] = ordered_json::array();
  for (const auto& node : status.view().nodes()) {
    ordered_json n{{"name", node.name()},
                   {"host", node.host()},
                   {"state", node.state() == proto::RUNNING ? "up" : state_name(node.state())},
                   {"pid", node.pid()},
                   {"workers", ordered_json::array()},
                   {"standbys", ordered_json::array()}};
    for (const auto& worker : status.view().workers())
      if (worker.plan().node() == node.name())
        n["workers"].push_back(to_json(worker));
    for (const auto& standby : node.standbys())
      n["standbys"].push_back(
        {{"name", standby.name()},
         {"pid", standby.pid()},
         {"state", standby.state() == proto::RUNNING ? "ready" : "starting"}});
    put_devices(status, node.name(), n);
    result["nodes"].push_back(std::move(n));
  }
  result["recoveries"] = ordered_json::array();
  for (const auto& record : status.recoveries())
    result["recoveries"].push_back(to_json(record));
  result["warnings"] = ordered_json::array();
  for (const auto& warning : status.warnings())
    result["warnings"].push_back(warning);
  if (status.error().code() != 0)
    result["error"] = to_json(status.error());
  return result.dump(-1, ' ', false, ordered_json::error_handler_t::replace);
}

} // namespace troupe::telemetry
