#pragma once

#include <string>

#include <nlohmann/json_fwd.hpp>

namespace troupe::telemetry {

/// The status as `troupe status` shows it, a tree and the last recoveries, of the JSON that
/// status_json makes. A status of another version may lack anything but the nodes.
std::string status_text(const nlohmann::json& status, bool with_colours);

} // namespace troupe::telemetry
