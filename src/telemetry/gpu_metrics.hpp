#pragma once

#include "cluster.pb.h"

#include <span>
#include <vector>

#include <prometheus/metric_family.h>

namespace troupe::telemetry {

/// The readings of GPUs and keepers as Prometheus' metrics. What no GPU tells has no metric.
std::vector<prometheus::MetricFamily> gpu_metrics(std::span<const proto::DeviceReport> reports);

} // namespace troupe::telemetry
