#pragma once

#include "troupe/base/error.hpp"

#include <CLI/CLI.hpp>

#include <functional>
#include <string>

/// The commands of `troupe`. Each `add_…` declares one with its help and options and sets what
/// is to run; the result of `run` is the process's exit code.
namespace troupe::tools {

using command = std::function<int()>;

void add_up(CLI::App& app, command& run);
void add_down(CLI::App& app, command& run);
void add_status(CLI::App& app, command& run);
void add_plan(CLI::App& app, command& run);
void add_ask(CLI::App& app, command& run);
void add_chat(CLI::App& app, command& run);
void add_bench(CLI::App& app, command& run);
void add_drill(CLI::App& app, command& run);
void add_convert(CLI::App& app, command& run);

/// controller, frontend, node and worker: started by the others.
void add_processes(CLI::App& app, command& run);

/// Prints an error for a person and returns the exit code for it.
int complain(const error& e);

/// True when standard output is a terminal that shows colours.
bool has_colours();

/// The endpoint of a running cluster, or `endpoint` if that is given.
expected<std::string> resolve_endpoint(const std::string& cluster, const std::string& endpoint);

} // namespace troupe::tools
