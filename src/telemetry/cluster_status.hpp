#pragma once

#include "cluster.pb.h"

#include <string>

namespace troupe::telemetry {

/// The status as `troupe status --json` and GET /v1/cluster give it: one line of JSON. `ready` is
/// the caller's, who knows whether requests would be served now.
std::string status_json(const proto::ClusterStatus& status, bool ready);

/// "running", "starting", as in the JSON.
std::string_view state_name(proto::ProcessState state);

} // namespace troupe::telemetry
