#include "troupe/telemetry/metrics.hpp"

#include "troupe/telemetry/gpu_metrics.hpp"

#include <fstream>
#include <iterator>

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>
#include <unistd.h>

namespace troupe::telemetry {

namespace {

using prometheus::BuildCounter;
using prometheus::BuildGauge;
using prometheus::BuildHistogram;

prometheus::Histogram::BucketBoundaries seconds_buckets() {
  return {0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60};
}

double resident_bytes() {
  std::ifstream file("/proc/self/statm");
  double total = 0;
  double resident = 0;
  file >> total >> resident;
  return resident * static_cast<double>(::sysconf(_SC_PAGESIZE));
}

} // namespace

struct metrics::state {
  std::vector<proto::DeviceReport> devices;
  prometheus::Registry registry;
  prometheus::Family<prometheus::Counter>& responses = BuildCounter()
                                                         .Name("troupe_http_responses_total")
                                                         .Help("HTTP answers by route and status")
                                                         .Register(registry);
  prometheus::Counter& prompt_tokens = BuildCounter()
                                         .Name("troupe_prompt_tokens_total")
                                         .Help("Tokens of accepted prompts")
                                         .Register(registry)
                                         .Add({});
  prometheus::Counter& generated_tokens = BuildCounter()
                                            .Name("troupe_generated_tokens_total")
                                            .Help("Tokens generated")
                                            .Register(registry)
                                            .Add({});
  prometheus::Histogram& first_token_seconds =
    BuildHistogram()
      .Name("troupe_time_to_first_token_seconds")
      .Help("From a request's arrival to its first token")
      .Register(registry)
      .Add({}, seconds_buckets());
  prometheus::Histogram& inter_token_seconds = BuildHistogram()
                                                 .Name("troupe_inter_token_seconds")
                                                 .Help("Between two tokens of a request")
                                                 .Register(registry)
                                                 .Add({}, seconds_buckets());
  prometheus::Gauge& epoch =
    BuildGauge().Name("troupe_epoch").Help("Raised by every recovery").Register(registry).Add({});
  prometheus::Gauge& open_requests = BuildGauge()
                                       .Name("troupe_open_requests")
                                       .Help("HTTP requests being answered")
                                       .Register(registry)
                                       .Add({});
  prometheus::Counter& journal_errors = BuildCounter()
                                          .Name("troupe_journal_errors_total")
                                          .Help("Writes of the request journal that failed")
                                          .Register(registry)
                                          .Add({});
  prometheus::Counter& resumed_requests = BuildCounter()
                                            .Name("troupe_resumed_requests_total")
                                            .Help("HTTP requests taken up from an earlier frontend")
                                            .Register(registry)
                                            .Add({});
  prometheus::Gauge& resident = BuildGauge()
                                  .Name("troupe_frontend_resident_bytes")
                                  .Help("Resident memory of the frontend")
                                  .Register(registry)
                                  .Add({});
  prometheus::Family<prometheus::Gauge>& queued = BuildGauge()
                                                    .Name("troupe_requests_queued")
                                                    .Help("Requests that wait for admission")
                                                    .Register(registry);
  prometheus::Family<prometheus::Gauge>& running =
    BuildGauge().Name("troupe_requests_running").Help("Requests with KV pages").Register(registry);
  prometheus::Family<prometheus::Gauge>& free_pages =
    BuildGauge().Name("troupe_kv_pages_free").Help("KV pages that nobody holds").Register(registry);
  prometheus::Family<prometheus::Gauge>& in_flight =
    BuildGauge()
      .Name("troupe_micro_batches_in_flight")
      .Help("Micro-batches between scheduler and last stage")
      .Register(registry);
  prometheus::Family<prometheus::Gauge>& preemptions =
    BuildGauge()
      .Name("troupe_preemptions")
      .Help("Sequences that gave up their pages, since the start")
      .Register(registry);
  prometheus::Family<prometheus::Gauge>& drafted =
    BuildGauge()
      .Name("troupe_drafted_tokens")
      .Help("Tokens drafted by the MTP layer and verified, since the start")
      .Register(registry);
  prometheus::Family<prometheus::Gauge>& accepted =
    BuildGauge()
      .Name("troupe_accepted_tokens")
      .Help("Drafted tokens that were right, since the start")
      .Register(registry);
  prometheus::Family<prometheus::Gauge>& serving =
    BuildGauge()
      .Name("troupe_replica_serving")
      .Help("1 while every actor of the replica is connected")
      .Register(registry);
};

metrics::metrics() : state_(std::make_unique<state>()) {}

metrics::~metrics() = default;

void metrics::count_response(std::string_view route, int status) {
  state_->responses.Add({{"route", std::string(route)}, {"status", std::to_string(status)}})
    .Increment();
}

void metrics::first_token(std::chrono::duration<double> after) {
  state_->first_token_seconds.Observe(after.count());
}

void metrics::between_tokens(std::chrono::duration<double> gap) {
  state_->inter_token_seconds.Observe(gap.count());
}

void metrics::count_tokens(std::uint64_t prompt, std::uint64_t generated) {
  state_->prompt_tokens.Increment(static_cast<double>(prompt));
  state_->generated_tokens.Increment(static_cast<double>(generated));
}

void metrics::set_replica(std::uint32_t replica, const replica_gauges& gauges) {
  std::map<std::string, std::string> labels{{"replica", std::to_string(replica)}};
  state_->queued.Add(labels).Set(gauges.queued);
  state_->running.Add(labels).Set(gauges.running);
  state_->free_pages.Add(labels).Set(gauges.free_pages);
  state_->in_flight.Add(labels).Set(gauges.in_flight);
  state_->preemptions.Add(labels).Set(static_cast<double>(gauges.preemptions));
  state_->drafted.Add(labels).Set(static_cast<double>(gauges.drafted_tokens));
  state_->accepted.Add(labels).Set(static_cast<double>(gauges.accepted_tokens));
  state_->serving.Add(labels).Set(gauges.serving ? 1 : 0);
}

void metrics::set_epoch(std::uint64_t epoch) {
  state_->epoch.Set(static_cast<double>(epoch));
}

void metrics::set_open_requests(std::uint64_t count) {
  state_->open_requests.Set(static_cast<double>(count));
}

void metrics::set_journal_errors(std::uint64_t count) {
  state_->journal_errors.Increment(static_cast<double>(count) - state_->journal_errors.Value());
}

void metrics::count_resumed(std::uint64_t calls) {
  state_->resumed_requests.Increment(static_cast<double>(calls));
}

void metrics::set_devices(std::vector<proto::DeviceReport> reports) {
  state_->devices = std::move(reports);
}

std::string metrics::text() const {
  state_->resident.Set(resident_bytes());
  auto families = state_->registry.Collect();
  auto gpus = gpu_metrics(state_->devices);
  std::move(gpus.begin(), gpus.end(), std::back_inserter(families));
  return prometheus::TextSerializer().Serialize(families);
}

} // namespace troupe::telemetry
