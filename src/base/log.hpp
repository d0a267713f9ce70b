#pragma once

#include <string>

namespace troupe {

/// Sets up the default spdlog logger for this process: standard error, one line an event with
/// time, process name and level; colours only on a terminal. `level` is one of spdlog's names
/// ("info", "debug").
void start_logging(const std::string& level);

} // namespace troupe
