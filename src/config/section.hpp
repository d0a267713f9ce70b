#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "troupe/config/document.hpp"
#include "troupe/config/report.hpp"

namespace troupe::config {

/// Reads the keys of one mapping. Each read leaves its target alone and reports when
/// the value is wrong, and returns whether it was given and is right. Call `done` at the end.
class section {
public:
  /// `content` may be null or nothing: then every key has its default. `path` is the
  /// key of the mapping itself, "" for the document. `at` is where missing keys are reported.
  section(report& problems, std::map<std::string, std::string, std::less<>>& positions,
          value_ptr content, std::string path, position at);

  /// A mapping below this one.
  section child(std::string_view key);

  bool read_number(std::string_view key, std::uint32_t& target, std::uint32_t low,
                   std::uint32_t high);
  bool read_text(std::string_view key, std::string& target);

  template <class Enum>
  bool read_choice(std::string_view key, Enum& target,
                   std::span<const std::pair<std::string_view, Enum>> choices) {
    std::vector<std::string_view> names;
    for (const auto& choice : choices)
      names.push_back(choice.first);
    const auto index = choose(key, names);
    if (index)
      target = choices[*index].second;
    return index.has_value();
  }

  /// A list with at least one item; null when absent or wrong.
  value_ptr read_list(std::string_view key);

  /// Text of a list's item, reported under `path` when it is none.
  std::optional<std::string> item_text(const value& item, const std::string& path);

  /// Reports what is wrong with the value of `key`, at its position.
  void refuse(std::string_view key, std::string what);

  /// The value as it was written, of any kind; null when absent.
  const value* read_any(std::string_view key) { return take(key); }

  bool has(std::string_view key) const { return content_ && content_->find(key); }

  /// Reports keys that nobody asked for and keys that are there twice.
  void done();

  std::string path_of(std::string_view key) const;

private:
  const value* take(std::string_view key);
  std::optional<std::size_t> choose(std::string_view key, std::span<const std::string_view> names);

  report& problems_;
  std::map<std::string, std::string, std::less<>>& positions_;
  value_ptr content_; // null when absent or of the wrong kind
  std::string path_;
  position at_;
  std::set<std::string, std::less<>> asked_;
};

} // namespace troupe::config
