#include "troupe/drill/outcome.hpp"

#include <algorithm>
#include <ranges>
#include <set>

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace troupe::drill {

namespace {

/// Growth of a process that still counts as none: allocators and caches breathe.
constexpr double tolerated_fds = 8; ///< five times that for all processes together
constexpr double tolerated_growth_kib = 32.0 * 1024;
constexpr double tolerated_growth_share = 0.15;

/// When a record's fault was noticed, as well as it can be told.
std::int64_t noticed_ns(const record_seen& r) {
  return r.detected_ns > 0 ? r.detected_ns : r.first_seen_ns;
}

bool is_under(const std::string& name, const std::string& target) {
  return name == target || name.starts_with(target + "/");
}

injection* owner_of(run_outcome& run, const record_seen& record) {
  const auto name = blamed(record);
  injection* any = nullptr;
  for (auto& i : run.injections | std::views::reverse) {
    if (!i.note.empty() || i.t0_ns > noticed_ns(record))
      continue;
    if (is_under(name, i.target))
      return &i;
    if (!any)
      any = &i;
  }
  return any;
}

/// The gaps of streams after a fault. Interrupted is who got nothing in the second half of the time
/// from its detection until all was restored (what was on its way still arrives in the first); the
/// others stood by.
void attribute_gaps(const run_outcome& run, injection& one, std::int64_t end_ns) {
  const auto after = [&](const std::optional<double>& ms) {
    return one.t0_ns + static_cast<std::int64_t>(ms.value_or(0) * 1e6);
  };
  const bool known = one.detect_ms && one.restore_ms;
  const auto restored = after(one.restore_ms);
  const auto half = restored - (restored - after(one.detect_ms)) / 2;
  std::map<std::uint32_t, double> longest;
  std::set<std::uint32_t> interrupted;
  for (const auto& g : run.gaps) {
    if (g.begin_ns > end_ns || g.end_ns <= one.t0_ns)
      continue;
    longest[g.stream] = std::max(longest[g.stream], g.ms());
    if (g.begin_ns <= half && g.end_ns >= restored)
      interrupted.insert(g.stream);
  }
  std::vector<double> each, bystanders;
  for (const auto& [stream, ms] : longest) {
    each.push_back(ms);
    if (!interrupted.contains(stream))
      bystanders.push_back(ms);
  }
  one.longest_gap_ms = percentile(each, 1);
  one.median_gap_ms = percentile(each, 0.5);
  if (known && !bystanders.empty())
    one.bystander_gap_ms = percentile(bystanders, 1);
}

void raise(std::optional<double>& figure, double value) {
  figure = figure ? std::max(*figure, value) : value;
}

std::string list_of(const std::set<std::string>& names) {
  return fmt::format("{}", fmt::join(names, ", "));
}

finding counted(std::string check, std::uint64_t found, std::uint64_t allowed,
                std::string_view what) {
  return {std::move(check), found <= allowed,
          allowed == 0 || allowed == UINT32_MAX
            ? fmt::format("{} {}", found, what)
            : fmt::format("{} {} (at most {})", found, what, allowed)};
}

finding judge_memory(const drill_outcome& outcome) {
  finding result{"flat", true, ""};
  double worst_memory = 0, worst_fds = 0;
  std::size_t judged = 0;
  for (const auto& p : outcome.processes) {
    const auto kept = settled(p.private_kib);
    const auto memory = growth(kept), fds = growth(settled(p.fds));
    if (!memory || !fds)
      continue;
    ++judged;
    worst_memory = std::max(worst_memory, *memory);
    worst_fds = std::max(worst_fds, *fds);
    const double allowed =
      std::max(tolerated_growth_kib, tolerated_growth_share * kept[kept.size() / 4]);
    if (*memory <= allowed && *fds <= tolerated_fds * (p.pid == 0 ? 5 : 1))
      continue;
    result.ok = false;
    result.text += fmt::format("{} (pid {}) grew by {:.1f} MiB and {:.0f} descriptors; ", p.name,
                               p.pid, *memory / 1024, *fds);
  }
  if (judged == 0)
    result.text = "no process lived long enough to tell";
  else if (result.ok)
    result.text = fmt::format("{} processes, growth at most {:.1f} MiB and {:.0f} descriptors",
                              judged, worst_memory / 1024, worst_fds);
  return result;
}

} // namespace

std::string blamed(const record_seen& record) {
  return record.cause.substr(0, record.cause.find(':'));
}

void attribute(run_outcome& run) {
  for (const auto& record : run.records) {
    auto* owner = owner_of(run, record);
    // What the cluster does on purpose, as going home to a node that is back, is nobody's fault.
    if (!owner || record.detected_by == "plan")
      continue;
    // Without the moment of detection, its distance from the exit is the best there is.
    const double detect = record.detected_ns > 0
                            ? static_cast<double>(record.detected_ns - owner->t0_ns) / 1e6
                            : record.detect_ms;
    owner->detect_ms = owner->detect_ms ? std::min(*owner->detect_ms, detect) : detect;
    raise(owner->fence_ms, detect + record.fence_ms);
    raise(owner->restore_ms, detect + record.restore_ms);
    raise(owner->first_token_ms, detect + record.first_token_ms);
    if (owner->detected_by.empty())
      owner->detected_by = record.detected_by;
    if (owner->restored_by.empty())
      owner->restored_by = record.restored_by;
  }
  for (std::size_t i = 0; i < run.injections.size(); ++i) {
    auto& one = run.injections[i];
    const auto end = i + 1 < run.injections.size() ? run.injections[i + 1].t0_ns : run.end_ns;
    attribute_gaps(run, one, end);
  }
}

void judge_run(run_outcome& run, const check_settings& checks) {
  std::set<std::string> culprits, victims;
  bool all_named = true;
  for (const auto& i : run.injections)
    if (i.note.empty())
      culprits.insert(i.target);
  for (const auto& r : run.records) {
    if (r.detected_by == "plan")
      continue;
    const auto name = blamed(r);
    const bool right =
      checks.cause == "any" ? true
      : checks.cause == "culprit"
        ? std::ranges::any_of(culprits, [&](const auto& c) { return is_under(name, c); })
        : r.cause.find(checks.cause) != std::string::npos;
    if (!right)
      victims.insert(name);
  }
  for (const auto& i : run.injections)
    if (i.leads_to_recovery && i.note.empty() && checks.cause != "any")
      all_named = all_named && i.detect_ms.has_value();
  if (!victims.empty())
    run.problems.push_back(
      fmt::format("a recovery blames {}, but it was {}", list_of(victims),
                  checks.cause == "culprit" ? list_of(culprits) : checks.cause));
  if (!all_named)
    run.problems.push_back("there is no record of a recovery for a fault that ended a process");
  for (const auto& i : run.injections) {
    if (checks.detect_ms && i.detect_ms && *i.detect_ms > *checks.detect_ms)
      run.problems.push_back(fmt::format("{}: detected after {:.0f} ms (at most {:.0f})", i.label,
                                         *i.detect_ms, *checks.detect_ms));
    if (checks.longest_gap_ms && i.longest_gap_ms > *checks.longest_gap_ms)
      run.problems.push_back(fmt::format("{}: a stream paused for {:.0f} ms (at most {:.0f})",
                                         i.label, i.longest_gap_ms, *checks.longest_gap_ms));
  }
}

std::vector<finding> judge(const drill_outcome& outcome) {
  const auto& checks = outcome.drill.checks;
  const auto& c = outcome.clients;
  std::vector<finding> result;
  if (!outcome.unfit.empty())
    return {{"fits", true, "not for this cluster: " + outcome.unfit}};
  std::size_t bad = 0, injected = 0, skipped = 0;
  for (const auto& run : outcome.runs) {
    bad += run.ok() ? 0 : 1;
    for (const auto& i : run.injections)
      ++(i.note.empty() ? injected : skipped);
  }
  result.push_back(
    {"runs", bad == 0 && !outcome.runs.empty(),
     fmt::format("{} of {} without a problem", outcome.runs.size() - bad, outcome.runs.size())});
  result.push_back({"faults", injected > 0,
                    fmt::format("{} injected{}", injected,
                                skipped ? fmt::format(", {} found nobody to hit", skipped) : "")});
  if (checks.golden)
    result.push_back(
      {"golden", c.wrong == 0 && c.conversations > 0,
       fmt::format("{} conversations, {} tokens, {} wrong", c.conversations, c.tokens, c.wrong)});
  result.push_back(counted("lost", c.lost, checks.lost, "tokens lost"));
  result.push_back(counted("duplicated", c.duplicated, checks.duplicated, "tokens twice"));
  result.push_back(counted("errors", c.errors, 0, "errors and hung requests"));
  result.push_back(counted("reconnects", c.reconnects, checks.reconnects, "connections broke"));
  if (checks.leaks) {
    std::string all;
    for (const auto& leak : outcome.leaks)
      all += (all.empty() ? "" : "; ") + leak;
    result.push_back({"leaks", outcome.leaks.empty(), all.empty() ? "nothing is left" : all});
    result.push_back(judge_memory(outcome));
  }
  for (const auto& problem : outcome.problems)
    result.push_back({"drill", false, problem});
  return result;
}

bool passed(const std::vector<finding>& findings) {
  return std::ranges::all_of(findings, &finding::ok);
}

std::vector<fault_row> fault_rows(const drill_outcome& outcome) {
  std::vector<fault_row> rows;
  for (const auto& run : outcome.runs)
    for (const auto& i : run.injections) {
      auto row = std::ranges::find(rows, i.label, &fault_row::label);
      if (row == rows.end())
        row = rows.insert(rows.end(), {.label = i.label});
      if (!i.note.empty()) {
        ++row->skipped;
        continue;
      }
      ++row->runs;
      row->ok += run.ok() ? 1 : 0;
      const auto take = [](std::vector<double>& list, const std::optional<double>& figure) {
        if (figure)
          list.push_back(*figure);
      };
      take(row->detect, i.detect_ms);
      take(row->fence, i.fence_ms);
      take(row->restore, i.restore_ms);
      take(row->first_token, i.first_token_ms);
      row->longest_gap.push_back(i.longest_gap_ms);
      row->median_gap.push_back(i.median_gap_ms);
      take(row->bystander_gap, i.bystander_gap_ms);
    }
  return rows;
}

} // namespace troupe::drill
