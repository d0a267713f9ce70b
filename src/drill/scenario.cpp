#include "troupe/drill/scenario.hpp"

#include <charconv>

#include <fmt/format.h>

namespace troupe::drill {

std::string_view to_string(fault_kind kind) {
  switch (kind) {
  case fault_kind::kill: return "kill";
  case fault_kind::segv: return "segv";
  case fault_kind::stop: return "stop";
  case fault_kind::resume: return "continue";
  case fault_kind::kill_node: return "kill_node";
  case fault_kind::partition: return "partition";
  case fault_kind::cut_journal: return "cut_journal";
  case fault_kind::rule: return "rule";
  }
  return "unknown";
}

std::string fault_spec::text() const {
  if (kind == fault_kind::rule)
    return fmt::format("{} {}", faults::to_string(rule.where), faults::to_string(rule.what));
  return std::string(to_string(kind));
}

std::string condition::text() const {
  switch (what) {
  case kind::worker_state: return fmt::format("{} is {}", worker, state);
  case kind::recovery_phase: return fmt::format("a recovery is {}", state);
  case kind::epoch_raised: return "the epoch is raised";
  }
  return {};
}

std::string event::label() const {
  auto result = fault.text() + " " + fault.target;
  if (fault.kind == fault_kind::partition)
    result += fmt::format("{}{}", fault.one_way ? " -> " : " | ", fault.peer);
  if (when)
    result += " when " + when->text();
  return result;
}

std::optional<milliseconds> parse_duration(std::string_view text) {
  double number = 0;
  const auto [rest, failure] =
    std::from_chars(text.data(), text.data() + text.size(), number, std::chars_format::fixed);
  if (failure != std::errc{} || number < 0 || number > 1e6)
    return std::nullopt;
  std::string_view unit(rest, static_cast<std::size_t>(text.data() + text.size() - rest));
  const double factor = unit == "ms" ? 1 : unit == "s" ? 1000 : unit == "m" ? 60000 : 0;
  if (factor == 0)
    return std::nullopt;
  return milliseconds(static_cast<std::int64_t>(number * factor + 0.5));
}

std::optional<time_range> parse_range(std::string_view text) {
  const auto dots = text.find("..");
  const auto low = parse_duration(text.substr(0, dots));
  const auto high = dots == std::string_view::npos ? low : parse_duration(text.substr(dots + 2));
  if (!low || !high || *low > *high)
    return std::nullopt;
  return time_range{*low, *high};
}

} // namespace troupe::drill
