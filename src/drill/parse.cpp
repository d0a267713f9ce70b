#include "troupe/drill/scenario.hpp"

#include "troupe/config/document.hpp"
#include "troupe/config/report.hpp"
#include "troupe/config/section.hpp"

#include <array>
#include <charconv>
#include <fstream>
#include <map>
#include <sstream>

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace troupe::drill {

namespace {

using config::in_quotes;
using config::position;
using config::report;
using config::section;
using config::value;
using config::value_kind;
using config::value_ptr;

constexpr std::string_view duration_form = "write a time such as 300ms, 2s or 300ms..700ms";

/// What all readers need.
struct reader {
  report& problems;
  std::map<std::string, std::string, std::less<>> positions;

  section open(const value_ptr& content, const std::string& path, position at) {
    return {problems, positions, content, path, at};
  }
};

/// A number with a fraction.
bool read_fraction(section& from, std::string_view key, double& target, double low, double high) {
  const value* given = from.read_any(key);
  if (!given)
    return false;
  double number = 0;
  const char* last = given->text.data() + given->text.size();
  const auto [rest, failure] = std::from_chars(given->text.data(), last, number);
  if (given->kind != value_kind::scalar || failure != std::errc{} || rest != last || number < low
      || number > high) {
    from.refuse(key, fmt::format("a number from {} to {} is needed", low, high));
    return false;
  }
  target = number;
  return true;
}

void read_truth(section& from, std::string_view key, bool& target) {
  const value* given = from.read_any(key);
  if (!given)
    return;
  if (given->kind != value_kind::scalar || (given->text != "true" && given->text != "false"))
    from.refuse(key, "true or false is needed");
  else
    target = given->text == "true";
}

bool read_range(section& from, std::string_view key, time_range& target) {
  std::string text;
  if (!from.read_text(key, text))
    return false;
  auto range = parse_range(text);
  if (!range) {
    from.refuse(key, fmt::format("{} is no time; {}", in_quotes(text), duration_form));
    return false;
  }
  target = *range;
  return true;
}

/// A name of the fault board; reports those that it does not know.
template <class Enum, class Named>
bool read_name(section& from, std::string_view key, Enum& target, Named named, std::size_t count) {
  std::string text;
  if (!from.read_text(key, text)) {
    if (!from.has(key))
      from.refuse(key, "is missing");
    return false;
  }
  if (auto found = named(text)) {
    target = *found;
    return true;
  }
  std::vector<std::string_view> names;
  for (std::size_t i = 0; i < count; ++i)
    names.push_back(faults::to_string(static_cast<Enum>(i)));
  from.refuse(
    key, fmt::format("{} is not known; write one of: {}", in_quotes(text), fmt::join(names, ", ")));
  return false;
}

void read_rule(section from, fault_spec& fault) {
  fault.kind = fault_kind::rule;
  auto& rule = fault.rule;
  read_name(from, "point", rule.where, faults::point_named, faults::num_points);
  read_name(from, "kind", rule.what, faults::kind_named, faults::num_kinds);
  if (rule.what == faults::kind::none && from.has("kind"))
    from.refuse("kind", "none does nothing; write a fault");
  from.read_text("peer", rule.peer);
  read_fraction(from, "probability", rule.probability, 0, 1);
  from.read_number("count", rule.count, 0, 1'000'000);
  from.read_number("delay_ms", rule.delay_ms, 0, 600'000);
  from.done();
}

/// The faults that are a word. Some imply their target.
struct word {
  std::string_view name;
  fault_kind kind;
  std::string_view target;
};
constexpr std::array words{word{"kill", fault_kind::kill, ""},
                           word{"segv", fault_kind::segv, ""},
                           word{"stop", fault_kind::stop, ""},
                           word{"continue", fault_kind::resume, ""},
                           word{"kill_node", fault_kind::kill_node, ""},
                           word{"kill_controller", fault_kind::kill, "controller"},
                           word{"kill_frontend", fault_kind::kill, "frontend"},
                           word{"partition", fault_kind::partition, ""},
                           word{"cut_journal", fault_kind::cut_journal, ""}};

void read_fault(section& from, fault_spec& fault) {
  const value* given = from.read_any("fault");
  if (!given) {
    from.refuse("fault", "is missing; write for instance: fault: kill");
    return;
  }
  if (given->kind == value_kind::map) {
    read_rule(from.child("fault"), fault);
    return;
  }
  std::string text;
  if (!from.read_text("fault", text))
    return;
  for (const auto& w : words)
    if (w.name == text) {
      fault.kind = w.kind;
      fault.target = w.target;
      return;
    }
  std::vector<std::string_view> names;
  for (const auto& w : words)
    names.push_back(w.name);
  from.refuse("fault",
              fmt::format("{} is not known; write one of: {}, or {{point: POINT, kind: KIND}}",
                          in_quotes(text), fmt::join(names, ", ")));
}

void read_condition(section from, condition& when) {
  bool raised = false;
  read_truth(from, "epoch_raised", raised);
  if (from.read_text("recovery", when.state))
    when.what = condition::kind::recovery_phase;
  else if (raised)
    when.what = condition::kind::epoch_raised;
  else {
    when.what = condition::kind::worker_state;
    bool named = from.read_text("worker", when.worker);
    if (!from.read_text("state", when.state) || !named)
      from.refuse("worker", "write {worker: NAME, state: STATE}, {recovery: PHASE} or "
                            "{epoch_raised: true}");
  }
  from.done();
}

void read_target(section& from, fault_spec& fault) {
  std::string node;
  bool given = from.read_text("target", fault.target);
  // A pid is a number to YAML.
  if (from.read_text("node", node)) {
    if (given)
      from.refuse("node", "stands beside target; keep one of the two");
    if (fault.kind == fault_kind::kill)
      fault.kind = fault_kind::kill_node;
    fault.target = node;
  }
  if (fault.kind == fault_kind::partition) {
    if (!from.read_text("from", fault.peer))
      fault.peer = "*";
    read_truth(from, "one_way", fault.one_way);
  }
  if (fault.target.empty() && from.has("fault") && !from.has("target"))
    from.refuse("target", "is missing; write a process, an actor or a role, such as any worker");
}

void read_event(section from, event& made) {
  bool timed = read_range(from, "at", made.at);
  if (from.has("when"))
    read_condition(from.child("when"), made.when.emplace());
  else if (!timed && !from.has("at"))
    from.refuse("at", "is missing; an event needs a time (at) or a condition (when)");
  read_fault(from, made.fault);
  read_target(from, made.fault);
  time_range lasting;
  if (read_range(from, "for", lasting))
    made.lasting = lasting;
  std::uint32_t times = 1;
  from.read_number("times", times, 1, 100'000);
  made.times = times;
  time_range every;
  if (read_range(from, "every", every))
    made.every = every.low;
  if (times > 1 && made.every.count() == 0)
    from.refuse("every", "times needs a distance, such as every: 1s");
  if (made.when && times > 1)
    from.refuse("times", "an event with a condition happens once");
  from.done();
}

void read_load(section from, load_settings& load) {
  from.read_number("streams", load.streams, 1, 4096);
  read_fraction(from, "rate_per_s", load.rate_per_s, 0.001, 1e6);
  from.done();
}

void read_checks(section from, check_settings& checks) {
  read_truth(from, "golden", checks.golden);
  from.read_number("lost", checks.lost, 0, 1'000'000);
  from.read_number("duplicated", checks.duplicated, 0, 1'000'000);
  std::string leaks;
  if (from.read_text("leaks", leaks)) {
    if (leaks != "none" && leaks != "any")
      from.refuse("leaks", fmt::format("{} is not known; write none or any", in_quotes(leaks)));
    checks.leaks = leaks != "any";
  }
  double bound = 0;
  if (read_fraction(from, "longest_gap_ms", bound, 0, 1e7))
    checks.longest_gap_ms = bound;
  if (read_fraction(from, "detect_ms", bound, 0, 1e7))
    checks.detect_ms = bound;
  from.read_text("cause", checks.cause);
  from.read_number("reconnects", checks.reconnects, 0, 1'000'000'000);
  from.read_number("settle_s", checks.settle_s, 1, 3600);
  from.done();
}

void read_events(section& top, reader& all, scenario& made) {
  auto list = top.read_list("events");
  if (!list) {
    if (!top.has("events"))
      top.refuse("events", "is missing; a drill needs at least one event");
    return;
  }
  for (std::size_t i = 0; i < list->items.size(); ++i) {
    const auto& item = list->items[i];
    auto& added = made.events.emplace_back();
    added.line = item->at.line;
    read_event(all.open(item, fmt::format("events[{}]", i), item->at), added);
  }
}

std::filesystem::path beside(const std::filesystem::path& file, const std::string& name) {
  std::error_code ignored;
  auto near = file.parent_path() / name;
  if (std::filesystem::exists(near, ignored) || !std::filesystem::exists(name, ignored))
    return near.lexically_normal();
  return name;
}

} // namespace

expected<scenario> parse(std::string_view text, const std::filesystem::path& file) {
  report problems(file.string(), {});
  auto document = config::read_document(text);
  if (!document) {
    problems.add(document.error().at, "", "not valid YAML: " + document.error().what);
    return tl::unexpected(problems.to_error());
  }
  reader all{problems, {}};
  scenario made;
  made.file = file;
  made.name = file.stem().string();
  section top = all.open(*document, "", position{1, 1});
  top.read_text("drill", made.name);
  top.read_text("about", made.about);
  std::string config;
  if (top.read_text("config", config))
    made.config = beside(file, config);
  else if (!top.has("config"))
    top.refuse("config", "is missing; name a cluster file, such as ../local.yaml");
  if (top.has("set"))
    if (auto list = top.read_list("set"))
      for (std::size_t i = 0; i < list->items.size(); ++i) {
        auto item = top.item_text(*list->items[i], fmt::format("set[{}]", i));
        if (item && item->find('=') == std::string::npos)
          problems.add(list->items[i]->at, fmt::format("set[{}]", i),
                       fmt::format("{} is not KEY=VALUE", in_quotes(*item)));
        else if (item)
          made.settings.push_back(*item);
      }
  read_load(top.child("load"), made.load);
  std::uint32_t seed = 1;
  top.read_number("seed", seed, 0, UINT32_MAX);
  made.seed = seed;
  top.read_number("runs", made.runs, 1, 100'000);
  read_events(top, all, made);
  read_checks(top.child("checks"), made.checks);
  top.done();
  if (!problems.empty())
    return tl::unexpected(problems.to_error());
  return made;
}

expected<scenario> load(const std::filesystem::path& file) {
  std::ifstream stream(file, std::ios::binary);
  if (!stream)
    return fail(error_code::invalid_config, fmt::format("cannot read {}", file.string()),
                "`troupe drill --list` shows the drills in configs/drills");
  std::ostringstream text;
  text << stream.rdbuf();
  return parse(text.str(), file);
}

} // namespace troupe::drill
