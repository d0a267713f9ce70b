#pragma once

#include <cstdint>
#include <string>

namespace troupe {

/// Names this process in logs, errors and recovery records, for instance
/// "node-0/worker-1". Set in main, and again when a standby takes the name of the worker that it
/// replaces. Any thread.
void set_process_name(std::string name);

/// The name set last, or "troupe" before that. Any thread; the reference stays valid.
const std::string& process_name();

/// This machine's host name, read once.
const std::string& host_name();

/// Bytes of memory that this machine has.
std::uint64_t host_memory_bytes();

} // namespace troupe
