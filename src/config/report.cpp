#include "troupe/config/report.hpp"

#include <algorithm>
#include <cctype>
#include <numeric>
#include <tuple>

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace troupe::config {

namespace {

constexpr std::size_t max_shown_bytes = 60;
constexpr std::size_t max_shown_problems = 50;

std::string lower(std::string_view text) {
  std::string result(text);
  std::ranges::transform(result, result.begin(), [](unsigned char c) {
    return c == '-' ? '_' : static_cast<char>(std::tolower(c));
  });
  return result;
}

/// Insertions, deletions, replacements and swaps of neighbours that turn `a` into `b`
/// (optimal string alignment distance).
std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::vector<std::size_t>> cost(a.size() + 1, std::vector<std::size_t>(b.size() + 1));
  for (std::size_t i = 0; i <= a.size(); ++i)
    cost[i][0] = i;
  std::iota(cost[0].begin(), cost[0].end(), 0);
  for (std::size_t i = 1; i <= a.size(); ++i)
    for (std::size_t j = 1; j <= b.size(); ++j) {
      cost[i][j] = std::min({cost[i - 1][j] + 1, cost[i][j - 1] + 1,
                             cost[i - 1][j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1)});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1])
        cost[i][j] = std::min(cost[i][j], cost[i - 2][j - 2] + 1);
    }
  return cost[a.size()][b.size()];
}

std::string join_key(std::string_view section, std::string_view key) {
  return section.empty() ? std::string(key) : fmt::format("{}.{}", section, key);
}

/// "nodes[3]" -> "nodes[]"
std::string family_of(std::string_view section) {
  std::string result;
  for (const char c : section)
    if (!(std::isdigit(static_cast<unsigned char>(c)) && result.ends_with('[')))
      result += c;
  return result;
}

} // namespace

std::string in_quotes(std::string_view text) {
  std::string_view shown = text;
  const bool is_utf8 = !check_text(text);
  if (shown.size() > max_shown_bytes) {
    shown = shown.substr(0, max_shown_bytes);
    while (!shown.empty() && (static_cast<unsigned char>(text[shown.size()]) & 0xC0U) == 0x80U)
      shown.remove_suffix(1);
  }
  std::string result = "\"";
  for (const char c : shown) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\')
      result += {'\\', c};
    else if (c == '\n')
      result += "\\n";
    else if (byte < 0x20 || byte == 0x7F || (byte > 0x7F && !is_utf8))
      result += fmt::format("\\x{:02x}", byte);
    else
      result += c;
  }
  return result + (shown.size() < text.size() ? "...\"" : "\"");
}

report::report(std::string file, std::span<const std::string> settings) : file_(std::move(file)) {
  for (const std::string& setting : settings)
    settings_.push_back(check_text(setting) ? in_quotes(setting) : setting);
}

void report::add(position at, std::string_view key, std::string what) {
  problems_.push_back({at, key.empty() ? std::move(what) : fmt::format("{}: {}", key, what)});
}

void report::add_unknown(position at, const std::string& section, const std::string& key) {
  unknown_.push_back({at, section, key});
}

void report::add_known(const std::string& section, const std::string& key) {
  known_[family_of(section)].insert(key);
}

std::string report::where(position at) const {
  if (at.setting >= 0)
    return "--set " + settings_.at(static_cast<std::size_t>(at.setting));
  if (at.line == 0)
    return file_;
  return fmt::format("{}:{}:{}", file_, at.line, at.column);
}

std::string report::suggest(const unknown_key& unknown) const {
  const std::set<std::string>& siblings = known_.at(family_of(unknown.section));
  const std::string wanted = lower(unknown.key.substr(0, 4 * max_shown_bytes));
  const std::string* best = nullptr;
  std::size_t best_distance = std::max<std::size_t>(1, wanted.size() / 3) + 1;
  for (const std::string& sibling : siblings)
    if (const std::size_t distance = edit_distance(wanted, sibling); distance < best_distance) {
      best = &sibling;
      best_distance = distance;
    }
  if (best)
    return fmt::format("did you mean {}?", *best);
  for (const auto& [section, keys] : known_)
    if (keys.contains(wanted))
      return fmt::format("did you mean {}?", join_key(section, wanted));
  return fmt::format("the keys here are {}", fmt::join(siblings, ", "));
}

error report::to_error() const {
  std::vector<problem> all = problems_;
  for (const unknown_key& unknown : unknown_) {
    const std::string shown = in_quotes(unknown.key);
    const bool plain = shown.size() == unknown.key.size() + 2;
    const std::string what = unknown.key == "<<"
                               ? "merge keys are not supported; repeat the keys instead"
                               : fmt::format("unknown key; {}", suggest(unknown));
    all.push_back(
      {unknown.at,
       fmt::format("{}: {}", join_key(unknown.section, plain ? unknown.key : shown), what)});
  }
  const auto order = [](const problem& a, const problem& b) {
    return std::tie(a.at.setting, a.at.line, a.at.column)
           < std::tie(b.at.setting, b.at.line, b.at.column);
  };
  std::ranges::stable_sort(all, order);
  std::string text;
  for (std::size_t i = 0; i < std::min(all.size(), max_shown_problems); ++i)
    text += fmt::format("{}{}: {}", i == 0 ? "" : "\n", where(all[i].at), all[i].text);
  if (all.size() > max_shown_problems)
    text += fmt::format("\nand {} more problems", all.size() - max_shown_problems);
  return fail(error_code::invalid_config, std::move(text)).value();
}

} // namespace troupe::config
