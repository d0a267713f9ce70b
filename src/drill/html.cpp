#include "troupe/drill/report.hpp"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <ranges>

#include <fmt/format.h>

namespace troupe::drill {

namespace {

// Pixels of a timeline.
constexpr double chart_width = 1100;
constexpr double left = 60;
constexpr double fault_lane = 22;    // faults: marks and bars
constexpr double recovery_lane = 62; // recoveries: detected, fenced, restored, first token
constexpr double gaps_top = 92;
constexpr double gaps_bottom = 292;
constexpr double chart_height = 320;
constexpr double smallest_gap_ms = 1;
constexpr std::size_t most_dots = 3000;

constexpr std::string_view page_head = R"html(<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Troupe drills</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root{--ink:#1c2330;--soft:#667085;--line:#d9dee7;--good:#12805c;--bad:#b42318;--fault:#b42318;--fence:#d97706;--restore:#2563eb;--token:#12805c;--paper:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#98a2b3;--line:#344054;--good:#47cd9a;--bad:#f97066;--fault:#f97066;--fence:#fdb022;--restore:#84adff;--token:#47cd9a;--paper:#14181f}}
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1180px;padding:0 1rem;color:var(--ink);background:var(--paper)}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2.5rem;border-top:1px solid var(--line);padding-top:1.5rem}
p{margin:.4rem 0}.soft{color:var(--soft)}.good{color:var(--good)}.bad{color:var(--bad);font-weight:600}
.scroll{overflow-x:auto}table{border-collapse:collapse;margin:.8rem 0;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left}th{color:var(--soft);font-weight:600}
code{font:13px ui-monospace,monospace}svg{display:block;max-width:100%;height:auto}
svg text{fill:var(--soft);font:11px system-ui,sans-serif}
.key span{margin-right:1.2rem}.key i{display:inline-block;width:.8em;height:.8em;margin-right:.35em;border-radius:2px}
</style></head><body>
)html";

std::string escaped(std::string_view text) {
  std::string result;
  for (const char c : text) {
    switch (c) {
    case '<': result += "&lt;"; break;
    case '>': result += "&gt;"; break;
    case '&': result += "&amp;"; break;
    case '"': result += "&quot;"; break;
    default: result += c;
    }
  }
  return result;
}

std::string html_table(const std::vector<std::vector<std::string>>& rows) {
  std::string result = "<div class=\"scroll\"><table>\n";
  for (std::size_t r = 0; r < rows.size(); ++r) {
    result += "<tr>";
    for (const auto& cell : rows[r])
      result += fmt::format("<{0}{2}>{1}</{0}>", r == 0 ? "th" : "td", escaped(cell),
                            cell == "FAILED" ? " class=\"bad\""
                            : cell == "ok"   ? " class=\"good\""
                                             : "");
    result += "</tr>\n";
  }
  return result + "</table></div>\n";
}

/// Time and gap length to pixels.
struct scale {
  std::int64_t begin_ns = 0;
  double seconds = 1;
  double longest_ms = 10;

  double x(std::int64_t ns) const {
    const double s = static_cast<double>(ns - begin_ns) / 1e9;
    return left + std::clamp(s / seconds, 0.0, 1.0) * (chart_width - left - 10);
  }
  double y(double ms) const {
    const double share = std::log(std::max(ms, smallest_gap_ms) / smallest_gap_ms)
                         / std::log(longest_ms / smallest_gap_ms);
    return gaps_bottom - share * (gaps_bottom - gaps_top);
  }
};

std::string axes(const scale& s) {
  std::string result;
  for (double ms = smallest_gap_ms; ms <= s.longest_ms * 1.01; ms *= 10)
    result += fmt::format(
      R"html(<line x1="{:.0f}" x2="{:.0f}" y1="{:.1f}" y2="{:.1f}" stroke="var(--line)"/><text x="4" y="{:.1f}">{:g} ms</text>)html",
      left, chart_width - 10, s.y(ms), s.y(ms), s.y(ms) + 4, ms);
  double step = std::pow(10, std::floor(std::log10(s.seconds)));
  while (s.seconds / step < 6)
    step /= 2;
  for (double t = 0; t <= s.seconds * 1.0001; t += step)
    result +=
      fmt::format(R"html(<text x="{:.1f}" y="{:.0f}" text-anchor="middle">{:g} s</text>)html",
                  s.x(s.begin_ns + static_cast<std::int64_t>(t * 1e9)), chart_height - 8,
                  std::round(t * 100) / 100);
  result += fmt::format(
    R"html(<text x="4" y="{:.0f}">faults</text><text x="4" y="{:.0f}">recovery</text>)html",
    fault_lane + 4, recovery_lane + 4);
  return result + "\n";
}

std::string bar(const scale& s, std::int64_t from, std::int64_t to, double y, double height,
                std::string_view colour, const std::string& title) {
  return fmt::format(
    R"html(<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill="var(--{})"><title>{}</title></rect>)html",
    s.x(from), y, std::max(1.5, s.x(to) - s.x(from)), height, colour, escaped(title));
}

std::string draw_faults(const scale& s, const run_outcome& run) {
  std::string result;
  for (const auto& i : run.injections) {
    if (!i.note.empty())
      continue;
    const auto title = fmt::format("{} ({}), run {}", i.label, i.target, run.number);
    if (i.until_ns > 0)
      result += fmt::format("<g opacity=\".35\">{}</g>",
                            bar(s, i.t0_ns, i.until_ns, fault_lane - 6, 12, "fault", title));
    result += fmt::format(
      R"html(<line x1="{0:.1f}" x2="{0:.1f}" y1="{1:.0f}" y2="{2:.0f}" stroke="var(--fault)" stroke-dasharray="2 3" opacity=".5"/><circle cx="{0:.1f}" cy="{3:.0f}" r="4" fill="var(--fault)"><title>{4}</title></circle>)html",
      s.x(i.t0_ns), fault_lane, gaps_bottom, fault_lane, escaped(title));
    const auto after = [&](const std::optional<double>& ms) {
      return i.t0_ns + static_cast<std::int64_t>(ms.value_or(0) * 1e6);
    };
    if (!i.detect_ms)
      continue;
    const auto times = fmt::format("{}: detected after {:.0f} ms, fenced {:.0f}, restored {:.0f}, "
                                   "first token {:.0f}",
                                   i.label, *i.detect_ms, i.fence_ms.value_or(0),
                                   i.restore_ms.value_or(0), i.first_token_ms.value_or(0));
    result += bar(s, i.t0_ns, after(i.detect_ms), recovery_lane - 7, 14, "fault", times);
    result += bar(s, after(i.detect_ms), after(i.fence_ms), recovery_lane - 7, 14, "fence", times);
    result +=
      bar(s, after(i.fence_ms), after(i.restore_ms), recovery_lane - 7, 14, "restore", times);
    result +=
      bar(s, after(i.restore_ms), after(i.first_token_ms), recovery_lane - 7, 14, "token", times);
  }
  return result;
}

/// What happened between two times.
std::string timeline(const drill_outcome& o, std::int64_t from_ns, std::int64_t to_ns) {
  scale s;
  s.begin_ns = from_ns;
  s.seconds = std::max(0.1, static_cast<double>(to_ns - from_ns) / 1e9);
  const auto shown = [&](const run_outcome& run) {
    return run.end_ns > from_ns && run.begin_ns < to_ns;
  };
  std::vector<gap> gaps;
  for (const auto& run : o.runs | std::views::filter(shown))
    std::ranges::copy_if(run.gaps, std::back_inserter(gaps),
                         [&](const gap& g) { return g.end_ns > from_ns && g.end_ns < to_ns; });
  std::ranges::sort(gaps, std::greater<>{}, &gap::ms);
  if (gaps.size() > most_dots)
    gaps.resize(most_dots);
  const double longest = gaps.empty() ? 10 : gaps.front().ms();
  s.longest_ms = std::pow(10, std::max(1.0, std::ceil(std::log10(std::max(longest, 10.0)))));
  std::string result = fmt::format(
    R"html(<svg viewBox="0 0 {0:.0f} {1:.0f}" role="img" aria-label="timeline of {2}">)html",
    chart_width, chart_height, escaped(o.drill.name));
  result += axes(s);
  for (const auto& run : o.runs | std::views::filter(shown))
    result += draw_faults(s, run);
  // Dots are strokes of no length, which take a fifth of the bytes that circles do.
  result += R"html(
<path fill="none" stroke="var(--ink)" stroke-opacity=".45" stroke-width="3.6" stroke-linecap="round" d=")html";
  for (const auto& g : gaps)
    result += fmt::format("M{:.1f} {:.1f}h0", s.x(g.end_ns), s.y(g.ms()));
  return result + "\"/></svg>\n";
}

/// All of the drill, then the run with the longest gap as through a magnifying glass.
std::string timelines(const drill_outcome& o) {
  std::string result = timeline(o, o.begin_ns, o.end_ns);
  const auto longest = [](const run_outcome& run) {
    return run.gaps.empty() ? 0 : std::ranges::max(run.gaps, {}, &gap::ms).ms();
  };
  if (const auto worst = std::ranges::max_element(o.runs, {}, longest); o.runs.size() > 1)
    result += fmt::format("<p>Run {} (seed {}), which has the longest gap:</p>\n", worst->number,
                          worst->seed)
              + timeline(o, worst->begin_ns, worst->end_ns);
  return result
         + R"html(<p class="key soft"><span><i style="background:var(--fault)"></i>fault, and until it is detected</span><span><i style="background:var(--fence)"></i>until fenced</span><span><i style="background:var(--restore)"></i>until restored</span><span><i style="background:var(--token)"></i>until the first token</span><span><i style="background:var(--ink);border-radius:50%"></i>a pause of a stream</span></p>
)html";
}

std::string section(const drill_outcome& o, const std::vector<finding>& findings) {
  const bool ok = passed(findings);
  std::string result = fmt::format(
    "<h2 id=\"{0}\">{0} <span class=\"{1}\">{2}</span></h2>\n<p>{3}</p>\n", escaped(o.drill.name),
    ok ? "good" : "bad", ok ? "ok" : "FAILED", escaped(o.drill.about));
  result += fmt::format(
    "<p class=\"soft\">{} with {} streams, {} runs in {:.0f} s, seed {}. Without a fault: gap "
    "p50 {:.1f} ms, p99 {:.1f} ms, max {:.1f} ms. Again: <code>{}</code></p>\n",
    escaped(o.drill.config.filename().string()), o.drill.load.streams, o.runs.size(),
    static_cast<double>(o.end_ns - o.begin_ns) / 1e9, o.seed, o.usual.percentile(0.5),
    o.usual.percentile(0.99), o.usual.max(), escaped(o.replay));
  result += timelines(o);
  std::vector<std::vector<std::string>> rows{{"fault (ms: median / p95 / max)", "runs", "ok runs",
                                              "detect", "fence", "restore", "first token",
                                              "longest gap", "bystander"}};
  for (const auto& row : fault_rows(o))
    rows.push_back({row.label, fmt::format("{}", row.runs), fmt::format("{}", row.ok),
                    show(row.detect), show(row.fence), show(row.restore), show(row.first_token),
                    show(row.longest_gap), show(row.bystander_gap)});
  result += html_table(rows);
  rows = {{"check", "result", "found"}};
  for (const auto& f : findings)
    rows.push_back({f.check, f.ok ? "ok" : "FAILED", f.text});
  result += html_table(rows);
  for (const auto& run : o.runs)
    for (const auto& problem : run.problems)
      result += fmt::format("<p class=\"bad\">run {} (seed {}): {}</p>\n", run.number, run.seed,
                            escaped(problem));
  return result;
}

} // namespace

std::string to_html(const std::vector<drill_outcome>& outcomes,
                    const std::vector<std::vector<finding>>& findings) {
  std::string result(page_head);
  result += "<h1>Troupe drills</h1>\n";
  if (!outcomes.empty())
    result +=
      fmt::format("<p class=\"soft\">{}. Times count from the fault, in milliseconds; a gap "
                  "is the time between two tokens of a stream, over all streams.</p>\n",
                  escaped(outcomes.front().machine));
  std::vector<std::vector<std::string>> rows{row_heads};
  for (std::size_t i = 0; i < outcomes.size(); ++i)
    rows.push_back(to_row(outcomes[i], findings[i]));
  result += html_table(rows);
  for (std::size_t i = 0; i < outcomes.size(); ++i)
    result += section(outcomes[i], findings[i]);
  return result + "</body></html>\n";
}

} // namespace troupe::drill
