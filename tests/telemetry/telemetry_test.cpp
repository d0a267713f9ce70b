#include "troupe/telemetry/cluster_status.hpp"
#include "troupe/telemetry/metrics.hpp"

#include <catch2/catch.hpp>

#include <nlohmann/json.hpp>

using namespace troupe;
using namespace std::chrono_literals;

TEST_CASE("the status has the shape that the design promises") {
  proto::ClusterStatus status;
  status.set_cluster("local");
  status.set_controller_pid(11);
  status.set_controller_incarnation(1);
  status.mutable_frontend()->set_pid(12);
  status.mutable_frontend()->set_endpoint("http://127.0.0.1:8000");
  auto* view = status.mutable_view();
  view->set_epoch(3);
  auto* node = view->add_nodes();
  node->set_name("node-0");
  node->set_state(proto::RUNNING);
  auto* worker = view->add_workers();
  worker->mutable_plan()->set_name("node-0/worker-0");
  worker->mutable_plan()->set_node("node-0");
  worker->mutable_plan()->set_device("cpu:0");
  worker->set_incarnation(2);
  worker->set_state(proto::LOST);
  auto* stage = worker->mutable_plan()->add_actors();
  stage->set_id("replica-0/stage-0");
  stage->set_kind(proto::STAGE);
  stage->set_end_layer(3);
  auto* record = status.add_recoveries();
  record->set_id(1);
  record->set_level("process");
  record->set_cause("node-0/worker-0: killed by signal 9");
  record->set_phase(proto::REPLAYING);
  record->set_restore_ms(210.12345);
  record->set_requests(8);

  auto json = nlohmann::json::parse(telemetry::status_json(status, true));
  CHECK(json["cluster"] == "local");
  CHECK(json["ready"] == true);
  CHECK(json["epoch"] == 3);
  CHECK(json["endpoint"] == "http://127.0.0.1:8000");
  CHECK(json["controller"] == nlohmann::json{{"pid", 11}, {"incarnation", 1}});
  REQUIRE(json["nodes"].size() == 1);
  CHECK(json["nodes"][0]["state"] == "up");
  const auto& w = json["nodes"][0]["workers"][0];
  CHECK(w["name"] == "node-0/worker-0");
  CHECK(w["state"] == "lost");
  CHECK(w["incarnation"] == 2);
  CHECK(w["actors"][0]["id"] == "replica-0/stage-0");
  CHECK(w["actors"][0]["kind"] == "stage");
  CHECK(w["actors"][0]["layers"] == nlohmann::json{0, 3});
  const auto& r = json["recoveries"][0];
  CHECK(r["cause"] == "node-0/worker-0: killed by signal 9");
  CHECK(r["phase"] == "replaying");
  CHECK(r["restore_ms"] == 210.123);
  CHECK(r["requests"] == 8);
  CHECK_FALSE(json.contains("error"));
}

TEST_CASE(
  "an error in the status names its code in words, and bytes that are no text do not break it") {
  proto::ClusterStatus status;
  status.mutable_error()->set_code(61);
  status.mutable_error()->set_cause("shard \xff is truncated");
  auto json = nlohmann::json::parse(telemetry::status_json(status, false));
  CHECK(json["error"]["code"] == "invalid_model");
  CHECK(json["error"]["cause"].get<std::string>().find("is truncated") != std::string::npos);
}

TEST_CASE("metrics appear in Prometheus' text format") {
  telemetry::metrics metrics;
  metrics.count_response("/v1/models", 200);
  metrics.count_response("/v1/models", 200);
  metrics.count_tokens(5, 2);
  metrics.first_token(15ms);
  metrics.between_tokens(3ms);
  telemetry::replica_gauges gauges;
  gauges.free_pages = 17;
  gauges.serving = true;
  metrics.set_replica(1, gauges);
  gauges.free_pages = 16;
  metrics.set_replica(1, gauges);
  auto text = metrics.text();
  auto has = [&](const char* line) { return text.find(line) != std::string::npos; };
  CHECK(has("troupe_http_responses_total{route=\"/v1/models\",status=\"200\"} 2"));
  CHECK(has("troupe_prompt_tokens_total 5"));
  CHECK(has("troupe_generated_tokens_total 2"));
  CHECK(has("troupe_time_to_first_token_seconds_bucket{le=\"0.01\"} 0"));
  CHECK(has("troupe_time_to_first_token_seconds_bucket{le=\"0.02\"} 1"));
  CHECK(has("troupe_inter_token_seconds_count 1"));
  CHECK(has("troupe_kv_pages_free{replica=\"1\"} 16"));
  CHECK_FALSE(has("} 17"));
  CHECK(has("# TYPE troupe_kv_pages_free gauge"));
}
