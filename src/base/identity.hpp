#pragma once

#include <string>

namespace troupe {

/// Names this process in logs, errors and recovery records, for instance
/// "node-0/worker-1". Set once in main, before any thread starts.
void set_process_name(std::string name);

/// The name set above, or "troupe" before that.
const std::string& process_name();

/// This machine's host name, read once.
const std::string& host_name();

} // namespace troupe
