#include "bench.hpp"
#include "bench_stream.hpp"

#include "troupe/actors/runtime.hpp"
#include "troupe/base/child_processes.hpp"

#include <algorithm>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <memory>
#include <mutex>
#include <optional>
#include <sstream>
#include <thread>

#include <fmt/format.h>
#include <unistd.h>

namespace troupe::tools::bench {

namespace {

using namespace std::chrono_literals;

constexpr auto ready_patience = 120s;
constexpr auto end_patience = 20s;
constexpr auto poll_interval = 1ms;

struct launch_arguments {
  std::vector<std::string> configs;
  unsigned launches = 10;
  bool as_json = false;
};

/// How a `troupe up` ended; written by the watching thread.
struct exit_note {
  std::mutex mutex;
  std::optional<child_exit> ended;

  std::optional<child_exit> get() {
    std::lock_guard lock(mutex);
    return ended;
  }
};

std::string text_of(const std::filesystem::path& file) {
  std::ostringstream text;
  text << std::ifstream(file).rdbuf();
  return text.str();
}

/// Starts `troupe up CONFIG` in a process of its own; milliseconds from its start until it says
/// that the cluster is ready. Ends it.
expected<double> launch_once(const std::string& config, const std::filesystem::path& log) {
  auto note = std::make_shared<exit_note>();
  auto children = child_processes::start([note](const child_exit& ended) {
    std::lock_guard lock(note->mutex);
    note->ended = ended;
  });
  if (!children)
    return tl::unexpected(children.error());
  std::error_code ignored;
  std::filesystem::remove(log, ignored);
  child_spec spec;
  spec.name = "up";
  auto cluster = fmt::format("bench-{}", ::getpid());
  spec.arguments = {
    "up", config, "--quiet", "--set", "serving.listen=127.0.0.1:0", "--set", "cluster=" + cluster};
  spec.log_path = log.string();
  auto begin = steady::now();
  if (auto pid = (*children)->spawn(std::move(spec)); !pid)
    return tl::unexpected(pid.error());
  while (text_of(log).find("is ready after") == std::string::npos) {
    if (auto ended = note->get())
      return fail(error_code::unavailable,
                  fmt::format("`troupe up {}` {}: {}", config, ended->text(), text_of(log)));
    if (steady::now() - begin > ready_patience)
      return fail(error_code::deadline_exceeded, config + " is not ready after 120 s",
                  "the logs of its processes are in " + actors::state_directory(cluster).string());
    std::this_thread::sleep_for(poll_interval);
  }
  auto taken = milliseconds(steady::now() - begin);
  (*children)->signal("up", SIGTERM);
  for (auto asked = steady::now(); !note->get(); std::this_thread::sleep_for(poll_interval))
    if (steady::now() - asked > end_patience)
      return fail(error_code::deadline_exceeded, "`troupe up` has not ended after 20 s");
  return taken;
}

expected<report> measure(const launch_arguments& given) {
  progress shown;
  auto log =
    std::filesystem::temp_directory_path() / fmt::format("troupe-bench-{}.log", ::getpid());
  std::vector<std::vector<double>> times(given.configs.size());
  for (unsigned l = 0; l < given.launches; ++l)
    for (std::size_t c = 0; c < given.configs.size(); ++c) {
      shown.say(fmt::format("launch: {} of {}, {}", l + 1, given.launches, given.configs[c]));
      auto taken = launch_once(given.configs[c], log);
      if (!taken)
        return tl::unexpected(taken.error());
      times[c].push_back(*taken);
    }
  std::error_code ignored;
  std::filesystem::remove(log, ignored);
  table shown_table({"config", "launches", "time to ready, ms", "longest, ms"}, 1);
  report result;
  result.figures = nlohmann::json::array();
  for (std::size_t c = 0; c < given.configs.size(); ++c) {
    auto longest = *std::max_element(times[c].begin(), times[c].end());
    auto ready = spread_of(times[c]);
    shown_table.add({given.configs[c], std::to_string(given.launches), show(ready, 0),
                     fmt::format("{:.0f}", longest)});
    result.figures.push_back(
      {{"config", given.configs[c]}, {"ready_ms", to_json(ready)}, {"ready_max_ms", longest}});
  }
  result.text = shown_table.text();
  return result;
}

} // namespace

void add_launch(CLI::App& bench, command& run) {
  auto given = std::make_shared<launch_arguments>();
  auto* sub = bench.add_subcommand("launch", "Time from `troupe up` until the cluster is ready");
  sub->add_option("CONFIG", given->configs, "cluster files, launched in turn")->required();
  sub->add_option("--launches", given->launches, "of each")->check(at_least_one());
  add_json_flag(sub, given->as_json);
  sub->callback(
    [given, &run] { run = [given] { return finish(measure(*given), given->as_json); }; });
}

} // namespace troupe::tools::bench
