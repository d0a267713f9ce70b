#include "troupe/telemetry/cluster_status.hpp"
#include "troupe/telemetry/metrics.hpp"
#include "troupe/telemetry/status_text.hpp"

#include <catch2/catch.hpp>

#include <algorithm>
#include <string>

#include <nlohmann/json.hpp>

using namespace troupe;

namespace {

constexpr std::uint64_t gib = std::uint64_t{1} << 30;

/// Everything that a driver can tell.
proto::GpuReading whole_reading(const std::string& device) {
  proto::GpuReading gpu;
  gpu.set_device(device);
  gpu.set_name("NVIDIA H100 80GB HBM3");
  gpu.set_uuid("GPU-ab22");
  gpu.set_utilization(0.875);
  gpu.set_memory_utilization(0.25);
  gpu.set_memory_used_bytes(20 * gib);
  gpu.set_memory_total_bytes(80 * gib);
  gpu.set_temperature_celsius(54);
  gpu.set_sm_clock_hz(1'980'000'000);
  gpu.set_memory_clock_hz(2'619'000'000);
  gpu.set_power_watts(412.5);
  gpu.set_ecc_corrected(3);
  gpu.set_ecc_uncorrected(1);
  gpu.set_nvlink_active_links(18);
  gpu.set_nvlink_sent_bytes(1024);
  gpu.set_nvlink_received_bytes(2048);
  gpu.set_nvlink_replay_errors(5);
  gpu.set_nvlink_recovery_errors(6);
  gpu.set_nvlink_crc_flit_errors(7);
  gpu.set_nvlink_crc_data_errors(8);
  return gpu;
}

/// Two nodes: one with two GPUs, of which one tells little and whose keeper is busy; one without.
proto::ClusterStatus cluster() {
  proto::ClusterStatus status;
  status.set_cluster("gpu");
  status.set_controller_pid(11);
  status.mutable_frontend()->set_pid(12);
  status.mutable_frontend()->set_endpoint("http://127.0.0.1:8000");
  status.mutable_view()->set_epoch(1);
  for (int i = 0; i < 2; ++i) {
    auto* node = status.mutable_view()->add_nodes();
    node->set_name("node-" + std::to_string(i));
    node->set_host("here");
    node->set_pid(20 + static_cast<std::uint32_t>(i));
    node->set_state(proto::RUNNING);
  }
  auto* worker = status.mutable_view()->add_workers();
  worker->mutable_plan()->set_name("node-0/worker-0");
  worker->mutable_plan()->set_node("node-0");
  worker->mutable_plan()->set_device("cuda:0");
  worker->set_incarnation(1);
  worker->set_pid(30);
  worker->set_state(proto::RUNNING);
  auto* report = status.add_devices();
  report->set_node("node-0");
  *report->add_gpus() = whole_reading("cuda:0");
  report->add_gpus()->set_device("cuda:1");
  auto* keeper = report->add_keepers();
  keeper->set_name("node-0/keeper-0");
  keeper->set_device("cuda:0");
  keeper->set_pid(40);
  keeper->set_kept_bytes(12 * gib + gib / 2);
  keeper->set_num_blocks(5);
  keeper = report->add_keepers();
  keeper->set_name("node-0/keeper-1");
  keeper->set_device("cuda:1");
  keeper->set_pid(41);
  return status;
}

std::string text_of(const proto::ClusterStatus& status) {
  return telemetry::status_text(nlohmann::json::parse(telemetry::status_json(status, true)), false);
}

/// The lines of GPUs and keepers, comments left out.
std::string gpu_lines(const std::string& metrics) {
  std::string result;
  for (std::size_t at = 0; at < metrics.size();) {
    const auto end = std::min(metrics.find('\n', at), metrics.size() - 1) + 1;
    const auto line = metrics.substr(at, end - at);
    if (line.starts_with("troupe_gpu") || line.starts_with("troupe_keeper"))
      result += line;
    at = end;
  }
  return result;
}

} // namespace

TEST_CASE(
  "the metrics of GPUs: every reading once, by node and device; what is not told is absent") {
  telemetry::metrics metrics;
  const auto status = cluster();
  metrics.set_devices({status.devices().begin(), status.devices().end()});
  CHECK(gpu_lines(metrics.text())
        == R"(troupe_gpu_utilization_ratio{node="node-0",device="cuda:0"} 0.875
troupe_gpu_memory_utilization_ratio{node="node-0",device="cuda:0"} 0.25
troupe_gpu_memory_used_bytes{node="node-0",device="cuda:0"} 21474836480
troupe_gpu_memory_total_bytes{node="node-0",device="cuda:0"} 85899345920
troupe_gpu_temperature_celsius{node="node-0",device="cuda:0"} 54
troupe_gpu_clock_hertz{node="node-0",device="cuda:0",clock="sm"} 1980000000
troupe_gpu_clock_hertz{node="node-0",device="cuda:0",clock="memory"} 2619000000
troupe_gpu_power_watts{node="node-0",device="cuda:0"} 412.5
troupe_gpu_ecc_errors_total{node="node-0",device="cuda:0",kind="corrected"} 3
troupe_gpu_ecc_errors_total{node="node-0",device="cuda:0",kind="uncorrected"} 1
troupe_gpu_nvlink_active_links{node="node-0",device="cuda:0"} 18
troupe_gpu_nvlink_bytes_total{node="node-0",device="cuda:0",direction="sent"} 1024
troupe_gpu_nvlink_bytes_total{node="node-0",device="cuda:0",direction="received"} 2048
troupe_gpu_nvlink_errors_total{node="node-0",device="cuda:0",kind="replay"} 5
troupe_gpu_nvlink_errors_total{node="node-0",device="cuda:0",kind="recovery"} 6
troupe_gpu_nvlink_errors_total{node="node-0",device="cuda:0",kind="crc_flit"} 7
troupe_gpu_nvlink_errors_total{node="node-0",device="cuda:0",kind="crc_data"} 8
troupe_keeper_kept_bytes{node="node-0",device="cuda:0"} 13421772800
troupe_keeper_blocks{node="node-0",device="cuda:0"} 5
)");
  CHECK(metrics.text().find("# TYPE troupe_gpu_ecc_errors_total counter") != std::string::npos);
  CHECK(metrics.text().find("# TYPE troupe_gpu_power_watts gauge") != std::string::npos);
  CHECK(metrics.text().find("troupe_prompt_tokens_total 0") != std::string::npos);
}

TEST_CASE("a GPU that is not told of any more has no metrics, and a counter may begin anew") {
  telemetry::metrics metrics;
  const auto status = cluster();
  metrics.set_devices({status.devices().begin(), status.devices().end()});
  proto::DeviceReport later;
  later.set_node("node-1");
  later.add_gpus()->set_device("cuda:0");
  later.mutable_gpus(0)->set_ecc_corrected(0);
  metrics.set_devices({later});
  CHECK(gpu_lines(metrics.text())
        == "troupe_gpu_ecc_errors_total{node=\"node-1\",device=\"cuda:0\",kind=\"corrected\"} 0\n");
  metrics.set_devices({});
  CHECK(metrics.text().find("troupe_gpu") == std::string::npos);
}

TEST_CASE("the status as JSON has keepers and GPUs under their node") {
  const auto json = nlohmann::json::parse(telemetry::status_json(cluster(), true));
  const auto& node = json["nodes"][0];
  CHECK(node["keepers"] == nlohmann::json::parse(R"([
    {"name": "node-0/keeper-0", "device": "cuda:0", "pid": 40, "kept_bytes": 13421772800,
     "blocks": 5},
    {"name": "node-0/keeper-1", "device": "cuda:1", "pid": 41}])"));
  CHECK(node["gpus"] == nlohmann::json::parse(R"([
    {"device": "cuda:0", "name": "NVIDIA H100 80GB HBM3", "uuid": "GPU-ab22",
     "utilization": 0.875, "memory_utilization": 0.25, "memory_used_bytes": 21474836480,
     "memory_total_bytes": 85899345920, "temperature_celsius": 54.0, "sm_clock_hz": 1980000000,
     "memory_clock_hz": 2619000000, "power_watts": 412.5, "ecc_corrected": 3,
     "ecc_uncorrected": 1, "nvlink_active_links": 18, "nvlink_sent_bytes": 1024,
     "nvlink_received_bytes": 2048, "nvlink_replay_errors": 5, "nvlink_recovery_errors": 6,
     "nvlink_crc_flit_errors": 7, "nvlink_crc_data_errors": 8},
    {"device": "cuda:1", "name": "", "uuid": ""}])"));
  CHECK_FALSE(json["nodes"][1].contains("gpus"));
  CHECK_FALSE(json["nodes"][1].contains("keepers"));
}

TEST_CASE("the status for people shows keepers and GPUs, and of a GPU what is known") {
  auto status = cluster();
  CHECK(text_of(status) == R"(cluster gpu is ready, epoch 1, http://127.0.0.1:8000
├─ controller  pid 11
├─ frontend    pid 12
├─ node-0 on here  pid 20  up
│  ├─ node-0/worker-0  pid 30  incarnation 1  running  cuda:0: 
│  ├─ node-0/keeper-0  pid 40  cuda:0: keeps 12.5 GiB in 5 blocks
│  ├─ node-0/keeper-1  pid 41  cuda:1
│  ├─ cuda:0  NVIDIA H100 80GB HBM3: 20.0 of 80.0 GiB in use, 88 % busy, 54 °C, 412 W, 1 uncorrected memory errors
│  └─ cuda:1  no readings
└─ node-1 on here  pid 21  up
)");
  auto* report = status.mutable_devices(0);
  report->mutable_keepers(0)->clear_pid();
  report->mutable_keepers(0)->clear_kept_bytes();
  report->mutable_gpus(0)->clear_ecc_uncorrected();
  report->mutable_gpus(0)->clear_memory_total_bytes();
  const auto text = text_of(status);
  CHECK(text.find("├─ node-0/keeper-0  has ended  cuda:0\n") != std::string::npos);
  CHECK(text.find("├─ cuda:0  NVIDIA H100 80GB HBM3: 88 % busy, 54 °C, 412 W\n")
        != std::string::npos);
}

TEST_CASE("the status for people: actors, errors, standbys, warnings and the last recoveries") {
  auto status = cluster();
  status.clear_devices();
  status.mutable_view()->mutable_nodes()->RemoveLast();
  auto* worker = status.mutable_view()->mutable_workers(0);
  worker->mutable_plan()->set_device("cpu:0");
  worker->set_state(proto::FAILED);
  worker->mutable_error()->set_code(41);
  worker->mutable_error()->set_cause("no memory");
  auto* stage = worker->mutable_plan()->add_actors();
  stage->set_id("replica-0/stage-0");
  stage->set_kind(proto::STAGE);
  stage->set_end_layer(3);
  auto* group = worker->mutable_plan()->add_actors();
  group->set_id("expert-group-0/copy-0");
  group->set_kind(proto::EXPERT_GROUP);
  group->set_first_expert(8);
  group->set_end_expert(16);
  auto* standby = status.mutable_view()->mutable_nodes(0)->add_standbys();
  standby->set_name("node-0/standby-0");
  standby->set_pid(50);
  standby->set_state(proto::RUNNING);
  status.add_warnings("node-1 is lost");
  for (std::uint64_t i = 1; i <= 7; ++i) {
    auto* record = status.add_recoveries();
    record->set_id(i);
    record->set_epoch(i + 1);
    record->set_cause("killed");
    record->set_restore_ms(210.4);
    record->set_first_token_ms(250.6);
    record->set_requests(8);
    record->set_tokens_replayed(99);
  }
  const auto text = text_of(status);
  CHECK(text.substr(0, text.find("  #4")) == R"(cluster gpu is ready, epoch 1, http://127.0.0.1:8000
├─ controller  pid 11
├─ frontend    pid 12
└─ node-0 on here  pid 20  up
   ├─ node-0/worker-0  pid 30  incarnation 1  failed  cpu:0: replica-0/stage-0 (layers 0-2), expert-group-0/copy-0 (experts 8-15)
   │    no memory
   └─ node-0/standby-0  pid 50  ready
warning: node-1 is lost
recoveries (7 in all; the last ones):
  #3 epoch 4  killed  restored after 210 ms, first token after 251 ms, 8 requests, 99 tokens replayed
)");
  CHECK(std::count(text.begin(), text.end(), '#') == 5);
}

TEST_CASE("colours mark states, and only where they are wanted") {
  const auto status = nlohmann::json::parse(telemetry::status_json(cluster(), false));
  const auto plain = telemetry::status_text(status, false);
  CHECK(plain.find('\033') == std::string::npos);
  CHECK(plain.find("cluster gpu is NOT ready") == 0);
  auto coloured = telemetry::status_text(status, true);
  CHECK(coloured.find("\033[32mrunning\033[0m") != std::string::npos);
  for (const char* mark : {"\033[32m", "\033[33m", "\033[0m"})
    for (auto at = coloured.find(mark); at != std::string::npos; at = coloured.find(mark))
      coloured.erase(at, std::string(mark).size());
  CHECK(coloured == plain);
}
