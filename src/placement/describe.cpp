#include "troupe/placement/plan.hpp"

#include <algorithm>
#include <string_view>

#include <fmt/format.h>

namespace troupe::placement {

namespace {

std::string counted(std::size_t number, std::string_view noun) {
  if (number == 1)
    return fmt::format("1 {}", noun);
  const bool ends_in_y = noun.ends_with("py");
  return fmt::format("{} {}{}", number, noun.substr(0, noun.size() - (ends_in_y ? 1 : 0)),
                     ends_in_y ? "ies" : "s");
}

/// "layer 3" or "layers 0-2": what is written is included.
std::string range_text(std::string_view noun, std::uint32_t first, std::uint32_t end) {
  return end - first == 1 ? fmt::format("{} {}", noun, first)
                          : fmt::format("{}s {}-{}", noun, first, end - 1);
}

std::string work_of(const actor& a) {
  return a.kind == actor_kind::stage ? range_text("layer", a.first_layer, a.end_layer)
                                     : range_text("expert", a.first_expert, a.end_expert);
}

} // namespace

std::string describe(const plan& what) {
  std::string text =
    fmt::format("cluster {}: {} of {}", what.cluster, counted(what.num_replicas, "replica"),
                counted(what.num_stages, "stage"));
  if (what.num_expert_groups > 0)
    text += fmt::format(", {} in {}", counted(what.num_expert_groups, "expert group"),
                        counted(what.num_expert_copies, "copy"));
  text += fmt::format(", on {}\n", counted(what.workers.size(), "worker"));

  std::size_t width = 0;
  for (const worker& w : what.workers)
    for (const actor& a : w.actors)
      width = std::max(width, a.id.size());

  for (std::size_t i = 0; i < what.workers.size(); ++i) {
    const worker& w = what.workers[i];
    if (i == 0 || what.workers[i - 1].node != w.node)
      text += fmt::format("{}\n", w.node);
    const bool last_worker = i + 1 == what.workers.size() || what.workers[i + 1].node != w.node;
    text += fmt::format("{} {}  {}\n", last_worker ? "└─" : "├─", w.name, w.device);
    for (std::size_t k = 0; k < w.actors.size(); ++k)
      text += fmt::format("{}  {} {:<{}}  {}\n", last_worker ? " " : "│",
                          k + 1 == w.actors.size() ? "└─" : "├─", w.actors[k].id, width,
                          work_of(w.actors[k]));
  }
  for (const std::string& note : what.notes)
    text += fmt::format("note: {}\n", note);
  return text;
}

} // namespace troupe::placement
