#include "troupe/drill/report.hpp"

#include <algorithm>
#include <functional>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace troupe::drill {

namespace {

using nlohmann::json;

/// The longest gaps of a run that are told one by one.
constexpr std::size_t gaps_a_run = 20;

double since(const drill_outcome& o, std::int64_t ns) {
  return static_cast<double>(ns - o.begin_ns) / 1e6;
}

json figures(const std::vector<double>& samples) {
  if (samples.empty())
    return nullptr;
  const auto s = summarise(samples);
  return {{"count", s.count}, {"median", s.median}, {"p95", s.p95}, {"max", s.max}};
}

json optional_ms(const std::optional<double>& ms) {
  return ms ? json(*ms) : json(nullptr);
}

json to_json(const drill_outcome& o, const injection& i) {
  return {{"fault", i.label},
          {"target", i.target},
          {"at_ms", since(o, i.t0_ns)},
          {"until_ms", i.until_ns ? json(since(o, i.until_ns)) : json(nullptr)},
          {"note", i.note},
          {"detect_ms", optional_ms(i.detect_ms)},
          {"fence_ms", optional_ms(i.fence_ms)},
          {"restore_ms", optional_ms(i.restore_ms)},
          {"first_token_ms", optional_ms(i.first_token_ms)},
          {"longest_gap_ms", i.longest_gap_ms},
          {"median_gap_ms", i.median_gap_ms},
          {"bystander_gap_ms", optional_ms(i.bystander_gap_ms)},
          {"detected_by", i.detected_by},
          {"restored_by", i.restored_by},
          {"hits", i.hits}};
}

json to_json(const drill_outcome& o, const run_outcome& run) {
  json result{{"run", run.number},
              {"seed", run.seed},
              {"ok", run.ok()},
              {"begin_ms", since(o, run.begin_ns)},
              {"end_ms", since(o, run.end_ns)},
              {"problems", run.problems},
              {"faults", json::array()},
              {"recoveries", json::array()},
              {"longest_gaps", json::array()}};
  auto longest = run.gaps;
  const auto shown = std::min(longest.size(), gaps_a_run);
  std::ranges::partial_sort(longest, longest.begin() + static_cast<std::ptrdiff_t>(shown),
                            std::greater<>{}, &gap::ms);
  for (std::size_t n = 0; n < shown; ++n)
    result["longest_gaps"].push_back({{"stream", longest[n].stream},
                                      {"at_ms", since(o, longest[n].begin_ns)},
                                      {"ms", longest[n].ms()}});
  for (const auto& i : run.injections)
    result["faults"].push_back(to_json(o, i));
  for (const auto& r : run.records)
    result["recoveries"].push_back({{"id", r.id},
                                    {"level", r.level},
                                    {"cause", r.cause},
                                    {"epoch", r.epoch},
                                    {"detected_by", r.detected_by},
                                    {"restored_by", r.restored_by},
                                    {"detect_ms", r.detect_ms},
                                    {"fence_ms", r.fence_ms},
                                    {"restore_ms", r.restore_ms},
                                    {"first_token_ms", r.first_token_ms},
                                    {"requests", r.requests},
                                    {"tokens_replayed", r.tokens_replayed}});
  return result;
}

} // namespace

nlohmann::json to_json(const drill_outcome& o, const std::vector<finding>& findings) {
  const auto& c = o.clients;
  json result{{"drill", o.drill.name},
              {"about", o.drill.about},
              {"config", o.drill.config.string()},
              {"set", o.drill.settings},
              {"seed", o.seed},
              {"replay", o.replay},
              {"machine", o.machine},
              {"ok", passed(findings)},
              {"unfit", o.unfit},
              {"ready_s", o.ready_s},
              {"seconds", since(o, o.end_ns) / 1000},
              {"streams", o.drill.load.streams},
              {"clients",
               {{"conversations", c.conversations},
                {"tokens", c.tokens},
                {"lost", c.lost},
                {"duplicated", c.duplicated},
                {"wrong", c.wrong},
                {"errors", c.errors},
                {"reconnects", c.reconnects},
                {"refused", c.refused}}},
              {"usual_gap_ms",
               {{"count", o.usual.count()},
                {"p50", o.usual.percentile(0.5)},
                {"p99", o.usual.percentile(0.99)},
                {"max", o.usual.max()}}},
              {"checks", json::array()},
              {"faults", json::array()},
              {"runs", json::array()},
              {"processes", json::array()},
              {"leaks", o.leaks}};
  for (const auto& f : findings)
    result["checks"].push_back({{"check", f.check}, {"ok", f.ok}, {"text", f.text}});
  for (const auto& row : fault_rows(o))
    result["faults"].push_back({{"fault", row.label},
                                {"runs", row.runs},
                                {"ok", row.ok},
                                {"skipped", row.skipped},
                                {"detect_ms", figures(row.detect)},
                                {"fence_ms", figures(row.fence)},
                                {"restore_ms", figures(row.restore)},
                                {"first_token_ms", figures(row.first_token)},
                                {"longest_gap_ms", figures(row.longest_gap)},
                                {"median_gap_ms", figures(row.median_gap)},
                                {"bystander_gap_ms", figures(row.bystander_gap)}});
  for (const auto& run : o.runs)
    result["runs"].push_back(to_json(o, run));
  for (const auto& p : o.processes)
    if (!p.private_kib.empty())
      result["processes"].push_back({{"name", p.name},
                                     {"pid", p.pid},
                                     {"samples", p.private_kib.size()},
                                     {"private_kib_first", p.private_kib.front()},
                                     {"private_kib_last", p.private_kib.back()},
                                     {"fds_first", p.fds.front()},
                                     {"fds_last", p.fds.back()}});
  return result;
}

std::string show(const std::vector<double>& figures) {
  if (figures.empty())
    return "-";
  const auto s = summarise(figures);
  const int decimals = s.max < 10 ? 1 : 0;
  return fmt::format("{0:.{3}f} / {1:.{3}f} / {2:.{3}f}", s.median, s.p95, s.max, decimals);
}

std::string markdown_table(const std::vector<std::vector<std::string>>& rows) {
  std::vector<std::size_t> widths(rows.front().size(), 3);
  for (const auto& row : rows)
    for (std::size_t c = 0; c < row.size(); ++c)
      widths[c] = std::max(widths[c], row[c].size());
  std::string result;
  for (std::size_t r = 0; r < rows.size(); ++r) {
    for (std::size_t c = 0; c < widths.size(); ++c)
      result += c == 0 ? fmt::format("| {:<{}} ", rows[r][c], widths[c])
                       : fmt::format("| {:>{}} ", rows[r][c], widths[c]);
    result += "|\n";
    if (r > 0)
      continue;
    for (std::size_t c = 0; c < widths.size(); ++c)
      result += c == 0 ? fmt::format("|{:-<{}}", "", widths[c] + 2)
                       : fmt::format("|{:-<{}}:", "", widths[c] + 1);
    result += "|\n";
  }
  return result;
}

std::string to_text(const drill_outcome& o, const std::vector<finding>& findings) {
  std::vector<std::vector<std::string>> rows{{"fault (ms: median / p95 / max)", "runs", "ok",
                                              "detect", "fence", "restore", "first token",
                                              "longest gap", "bystander"}};
  for (const auto& row : fault_rows(o))
    rows.push_back({row.label, fmt::format("{}", row.runs), fmt::format("{}", row.ok),
                    show(row.detect), show(row.fence), show(row.restore), show(row.first_token),
                    show(row.longest_gap), show(row.bystander_gap)});
  std::string result = fmt::format("drill {}: {}\n", o.drill.name, o.drill.about);
  if (rows.size() > 1)
    result += markdown_table(rows);
  if (o.unfit.empty())
    result += fmt::format("without a fault: gap p50 {:.1f} ms, p99 {:.1f} ms, max {:.1f} ms\n",
                          o.usual.percentile(0.5), o.usual.percentile(0.99), o.usual.max());
  for (const auto& f : findings)
    result += fmt::format("  {} {:<11} {}\n", f.ok ? "ok    " : "FAILED", f.check, f.text);
  for (const auto& run : o.runs)
    for (const auto& problem : run.problems)
      result += fmt::format("  run {} (seed {}): {}\n", run.number, run.seed, problem);
  if (!passed(findings))
    result += fmt::format("run it again with:  {}\n", o.replay);
  return result;
}

std::string to_line(const drill_outcome& o) {
  std::size_t faults = 0;
  std::vector<double> longest, restore;
  for (const auto& row : fault_rows(o)) {
    faults += row.runs;
    longest.insert(longest.end(), row.longest_gap.begin(), row.longest_gap.end());
    restore.insert(restore.end(), row.restore.begin(), row.restore.end());
  }
  double grown_kib = 0, grown_fds = 0;
  for (const auto& p : o.processes) {
    grown_kib = std::max(grown_kib, growth(settled(p.private_kib)).value_or(0));
    grown_fds = std::max(grown_fds, growth(settled(p.fds)).value_or(0));
  }
  const auto& c = o.clients;
  return fmt::format("{} for {:.1f} min, {} streams, seed {}: {} faults of {} kinds; {} "
                     "conversations, {} tokens: {} lost, {} duplicated, {} wrong, {} errors; "
                     "longest gap after a fault {} ms, restored after {} ms (median / p95 / max); "
                     "processes grew by at most {:.1f} MiB and {:.0f} descriptors",
                     o.drill.config.filename().string(), since(o, o.end_ns) / 60'000,
                     o.drill.load.streams, o.seed, faults, fault_rows(o).size(), c.conversations,
                     c.tokens, c.lost, c.duplicated, c.wrong, c.errors, show(longest),
                     show(restore), grown_kib / 1024, grown_fds);
}

const std::vector<std::string> row_heads{"drill (ms: median / p95 / max)",
                                         "result",
                                         "runs",
                                         "detect",
                                         "fence",
                                         "restore",
                                         "first token",
                                         "longest gap",
                                         "lost",
                                         "twice",
                                         "wrong"};

std::vector<std::string> to_row(const drill_outcome& o, const std::vector<finding>& findings) {
  fault_row all;
  const auto append = [](std::vector<double>& to, const std::vector<double>& from) {
    to.insert(to.end(), from.begin(), from.end());
  };
  for (const auto& row : fault_rows(o)) {
    append(all.detect, row.detect);
    append(all.fence, row.fence);
    append(all.restore, row.restore);
    append(all.first_token, row.first_token);
    append(all.longest_gap, row.longest_gap);
  }
  const auto& c = o.clients;
  return {o.drill.name,
          !o.unfit.empty()   ? "unfit"
          : passed(findings) ? "ok"
                             : "FAILED",
          fmt::format("{}", o.runs.size()),
          show(all.detect),
          show(all.fence),
          show(all.restore),
          show(all.first_token),
          show(all.longest_gap),
          fmt::format("{}", c.lost),
          fmt::format("{}", c.duplicated),
          fmt::format("{}", c.wrong)};
}

} // namespace troupe::drill
