#pragma once

#include <map>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "troupe/base/error.hpp"
#include "troupe/config/document.hpp"

namespace troupe::config {

/// `text` in double quotes, shortened, with everything unprintable escaped.
std::string in_quotes(std::string_view text);

/// Collects every problem of a cluster file and puts them in the order of the file.
class report {
public:
  report(std::string file, std::span<const std::string> settings);

  /// `key` may be empty, for problems of the file as a whole.
  void add(position at, std::string_view key, std::string what);

  /// A key that stands in the file but that no reader asked for, and its section.
  void add_unknown(position at, const std::string& section, const std::string& key);

  /// Remembers that `key` exists, for the suggestions about unknown keys.
  void add_known(const std::string& section, const std::string& key);

  bool empty() const { return problems_.empty() && unknown_.empty(); }

  /// "FILE:LINE:COL" or "--set KEY=VALUE".
  std::string where(position at) const;

  /// Everything collected, as one invalid_config error.
  error to_error() const;

private:
  struct problem {
    position at;
    std::string text;
  };
  struct unknown_key {
    position at;
    std::string section;
    std::string key;
  };

  std::string suggest(const unknown_key& unknown) const;

  std::string file_;
  std::vector<std::string> settings_;
  std::vector<problem> problems_;
  std::vector<unknown_key> unknown_;
  std::map<std::string, std::set<std::string>> known_; // by section, list numbers as []
};

} // namespace troupe::config
