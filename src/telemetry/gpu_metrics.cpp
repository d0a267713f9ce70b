#include "troupe/telemetry/gpu_metrics.hpp"

#include <string>
#include <utility>

namespace troupe::telemetry {

namespace {

using prometheus::MetricFamily;
using prometheus::MetricType;
using labels = std::vector<prometheus::ClientMetric::Label>;

/// One metric, filled with a sample of each GPU that has it.
class family {
public:
  family(MetricType type, const char* name, const char* help) {
    result_.type = type;
    result_.name = name;
    result_.help = help;
  }

  void add(labels who, bool is_there, double value) {
    if (!is_there)
      return;
    prometheus::ClientMetric sample;
    sample.label = std::move(who);
    if (result_.type == MetricType::Counter)
      sample.counter.value = value;
    else
      sample.gauge.value = value;
    result_.metric.push_back(std::move(sample));
  }

  /// With one more label, last.
  void add(labels who, const char* label, const char* value_of_label, bool is_there, double value) {
    who.push_back({label, value_of_label});
    add(std::move(who), is_there, value);
  }

  void put_into(std::vector<MetricFamily>& all) {
    if (!result_.metric.empty())
      all.push_back(std::move(result_));
  }

private:
  MetricFamily result_;
};

double number(std::uint64_t count) {
  return static_cast<double>(count);
}

} // namespace

std::vector<MetricFamily> gpu_metrics(std::span<const proto::DeviceReport> reports) {
  constexpr auto gauge = MetricType::Gauge;
  constexpr auto counter = MetricType::Counter;
  family busy(gauge, "troupe_gpu_utilization_ratio", "Share of time in which a kernel ran");
  family memory_busy(gauge, "troupe_gpu_memory_utilization_ratio",
                     "Share of time in which memory was read or written");
  family used(gauge, "troupe_gpu_memory_used_bytes", "Memory in use, by whomever");
  family total(gauge, "troupe_gpu_memory_total_bytes", "Memory of the GPU");
  family temperature(gauge, "troupe_gpu_temperature_celsius", "Temperature of the GPU");
  family clock(gauge, "troupe_gpu_clock_hertz", "Present clock");
  family power(gauge, "troupe_gpu_power_watts", "Power drawn");
  family ecc(counter, "troupe_gpu_ecc_errors_total",
             "Memory errors since the driver was loaded, corrected or not");
  family links(gauge, "troupe_gpu_nvlink_active_links", "NVLinks that are up");
  family link_bytes(counter, "troupe_gpu_nvlink_bytes_total",
                    "Data over all NVLinks since the driver was loaded");
  family link_errors(counter, "troupe_gpu_nvlink_errors_total",
                     "Errors of all NVLinks since the driver was loaded");
  family kept(gauge, "troupe_keeper_kept_bytes", "Memory of the GPU that its keeper owns");
  family blocks(gauge, "troupe_keeper_blocks", "Blocks in which it is");
  for (const auto& report : reports) {
    for (const auto& g : report.gpus()) {
      const labels who{{"node", report.node()}, {"device", g.device()}};
      busy.add(who, g.has_utilization(), g.utilization());
      memory_busy.add(who, g.has_memory_utilization(), g.memory_utilization());
      used.add(who, g.has_memory_used_bytes(), number(g.memory_used_bytes()));
      total.add(who, g.has_memory_total_bytes(), number(g.memory_total_bytes()));
      temperature.add(who, g.has_temperature_celsius(), g.temperature_celsius());
      clock.add(who, "clock", "sm", g.has_sm_clock_hz(), number(g.sm_clock_hz()));
      clock.add(who, "clock", "memory", g.has_memory_clock_hz(), number(g.memory_clock_hz()));
      power.add(who, g.has_power_watts(), g.power_watts());
      ecc.add(who, "kind", "corrected", g.has_ecc_corrected(), number(g.ecc_corrected()));
      ecc.add(who, "kind", "uncorrected", g.has_ecc_uncorrected(), number(g.ecc_uncorrected()));
      links.add(who, g.has_nvlink_active_links(), g.nvlink_active_links());
      link_bytes.add(who, "direction", "sent", g.has_nvlink_sent_bytes(),
                     number(g.nvlink_sent_bytes()));
      link_bytes.add(who, "direction", "received", g.has_nvlink_received_bytes(),
                     number(g.nvlink_received_bytes()));
      link_errors.add(who, "kind", "replay", g.has_nvlink_replay_errors(),
                      number(g.nvlink_replay_errors()));
      link_errors.add(who, "kind", "recovery", g.has_nvlink_recovery_errors(),
                      number(g.nvlink_recovery_errors()));
      link_errors.add(who, "kind", "crc_flit", g.has_nvlink_crc_flit_errors(),
                      number(g.nvlink_crc_flit_errors()));
      link_errors.add(who, "kind", "crc_data", g.has_nvlink_crc_data_errors(),
                      number(g.nvlink_crc_data_errors()));
    }
    for (const auto& k : report.keepers()) {
      const labels who{{"node", report.node()}, {"device", k.device()}};
      kept.add(who, k.has_kept_bytes(), number(k.kept_bytes()));
      blocks.add(who, k.has_num_blocks(), k.num_blocks());
    }
  }
  std::vector<MetricFamily> result;
  for (auto* f : {&busy, &memory_busy, &used, &total, &temperature, &clock, &power, &ecc, &links,
                  &link_bytes, &link_errors, &kept, &blocks})
    f->put_into(result);
  return result;
}

} // namespace troupe::telemetry
