#include "troupe/telemetry/status_text.hpp"

#include <algorithm>
#include <iterator>
#include <vector>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace troupe::telemetry {

namespace {

using nlohmann::json;

/// Recoveries that are shown.
constexpr std::size_t num_recoveries = 5;

std::string state_mark(const std::string& state, bool with_colours) {
  if (!with_colours)
    return state;
  bool good = state == "running" || state == "up" || state == "ready" || state == "spare";
  return fmt::format("\033[{}m{}\033[0m", good ? 32 : 33, state);
}

json list(const json& of, const char* name) {
  return of.value(name, json::array());
}

std::string gibibytes(const json& bytes) {
  return fmt::format("{:.1f}", bytes.get<double>() / (1 << 30));
}

std::string worker_line(const json& worker, bool with_colours) {
  std::string actors;
  for (const auto& actor : list(worker, "actors")) {
    actors += (actors.empty() ? "" : ", ") + actor.value("id", "");
    if (actor.contains("layers"))
      actors += fmt::format(" (layers {}-{})", actor["layers"][0].get<int>(),
                            actor["layers"][1].get<int>() - 1);
    if (actor.contains("experts"))
      actors += fmt::format(" (experts {}-{})", actor["experts"][0].get<int>(),
                            actor["experts"][1].get<int>() - 1);
  }
  return fmt::format("{}  pid {}  incarnation {}  {}  {}: {}", worker.value("name", ""),
                     worker.value("pid", 0), worker.value("incarnation", 0),
                     state_mark(worker.value("state", ""), with_colours),
                     worker.value("device", ""), actors);
}

std::string keeper_line(const json& keeper) {
  auto line = fmt::format("{}  ", keeper.value("name", ""));
  line += keeper.contains("pid") ? fmt::format("pid {}", keeper["pid"].get<int>()) : "has ended";
  line += "  " + keeper.value("device", "");
  if (keeper.contains("kept_bytes"))
    line += fmt::format(": keeps {} GiB in {} blocks", gibibytes(keeper["kept_bytes"]),
                        keeper.value("blocks", 0));
  return line;
}

std::string gpu_line(const json& gpu) {
  std::string readings;
  auto add = [&](const std::string& text) { readings += (readings.empty() ? "" : ", ") + text; };
  if (gpu.contains("memory_used_bytes") && gpu.contains("memory_total_bytes"))
    add(fmt::format("{} of {} GiB in use", gibibytes(gpu["memory_used_bytes"]),
                    gibibytes(gpu["memory_total_bytes"])));
  if (gpu.contains("utilization"))
    add(fmt::format("{:.0f} % busy", gpu["utilization"].get<double>() * 100));
  if (gpu.contains("temperature_celsius"))
    add(fmt::format("{:.0f} °C", gpu["temperature_celsius"].get<double>()));
  if (gpu.contains("power_watts"))
    add(fmt::format("{:.0f} W", gpu["power_watts"].get<double>()));
  if (gpu.value("ecc_uncorrected", 0) > 0)
    add(fmt::format("{} uncorrected memory errors", gpu.value("ecc_uncorrected", 0)));
  const auto name = gpu.value("name", "");
  return fmt::format("{}  {}{}{}", gpu.value("device", ""), name, name.empty() ? "" : ": ",
                     readings.empty() ? "no readings" : readings);
}

/// What is under a node: each entry one line, and perhaps a second one.
struct leaf {
  std::string line;
  std::string below;
};

std::vector<leaf> leaves(const json& node, bool with_colours) {
  std::vector<leaf> result;
  for (const auto& worker : list(node, "workers"))
    result.push_back({worker_line(worker, with_colours), worker.contains("error")
                                                           ? worker["error"].value("cause", "")
                                                           : std::string()});
  for (const auto& standby : list(node, "standbys"))
    result.push_back(
      {fmt::format("{}  pid {}  {}", standby.value("name", ""), standby.value("pid", 0),
                   state_mark(standby.value("state", ""), with_colours)),
       {}});
  for (const auto& keeper : list(node, "keepers"))
    result.push_back({keeper_line(keeper), {}});
  for (const auto& gpu : list(node, "gpus"))
    result.push_back({gpu_line(gpu), {}});
  return result;
}

} // namespace

std::string status_text(const json& status, bool with_colours) {
  std::string text;
  auto out = std::back_inserter(text);
  fmt::format_to(out, "cluster {} {}, epoch {}, {}\n", status.value("cluster", ""),
                 status.value("ready", false) ? "is ready" : "is NOT ready",
                 status.value("epoch", 0), status.value("endpoint", ""));
  for (const char* process : {"controller", "frontend"})
    fmt::format_to(out, "├─ {:<11} pid {}\n", process,
                   status.value(process, json::object()).value("pid", 0));
  const auto nodes = list(status, "nodes");
  for (std::size_t n = 0; n < nodes.size(); ++n) {
    bool is_last_node = n + 1 == nodes.size();
    const char* trunk = is_last_node ? " " : "│";
    const auto& node = nodes[n];
    fmt::format_to(out, "{} {} on {}  pid {}  {}\n", is_last_node ? "└─" : "├─",
                   node.value("name", ""), node.value("host", ""), node.value("pid", 0),
                   state_mark(node.value("state", ""), with_colours));
    const auto under = leaves(node, with_colours);
    for (std::size_t i = 0; i < under.size(); ++i) {
      bool is_last = i + 1 == under.size();
      fmt::format_to(out, "{}  {} {}\n", trunk, is_last ? "└─" : "├─", under[i].line);
      if (!under[i].below.empty())
        fmt::format_to(out, "{}  {}    {}\n", trunk, is_last ? " " : "│", under[i].below);
    }
  }
  for (const auto& warning : list(status, "warnings"))
    fmt::format_to(out, "warning: {}\n", warning.get<std::string>());
  const auto recoveries = list(status, "recoveries");
  if (recoveries.empty())
    return text;
  fmt::format_to(out, "recoveries ({} in all; the last ones):\n", recoveries.size());
  auto first = recoveries.size() - std::min(recoveries.size(), num_recoveries);
  for (auto i = first; i < recoveries.size(); ++i) {
    const auto& r = recoveries[i];
    fmt::format_to(out,
                   "  #{} epoch {}  {}  restored after {:.0f} ms, first token after {:.0f} ms, {} "
                   "requests, {} tokens replayed\n",
                   r.value("id", 0), r.value("epoch", 0), r.value("cause", ""),
                   r.value("restore_ms", 0.0), r.value("first_token_ms", 0.0),
                   r.value("requests", 0), r.value("tokens_replayed", 0));
  }
  return text;
}

} // namespace troupe::telemetry
