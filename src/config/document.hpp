#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <tl/expected.hpp>

namespace troupe::config {

/// Where something was written, counted from 1; columns count bytes.
struct position {
  int line = 0; ///< 0: the file as a whole
  int column = 0;
  int setting = -1; ///< >= 0: not in the file but in this `--set`

  friend bool operator==(const position&, const position&) = default;
};

enum class value_kind : std::uint8_t { nothing, scalar, list, map };

enum class scalar_style : std::uint8_t {
  plain,  ///< 8 is a number, eight is text
  quoted, ///< always text
  bare,   ///< from a command line, where quotes do not arrive: whatever the key needs
};

struct value;
/// Values are immutable and shared, so that an alias costs nothing.
using value_ptr = std::shared_ptr<const value>;

struct map_entry {
  std::string key;
  position at;
  value_ptr content;
};

/// A piece of a YAML document that remembers where it stood. Unlike YAML::Node it
/// keeps duplicate keys and the difference between 8 and "8".
struct value {
  value_kind kind = value_kind::nothing;
  scalar_style style = scalar_style::plain;
  std::string text;               ///< of a scalar
  std::vector<map_entry> entries; ///< of a map, in the order of the file
  std::vector<value_ptr> items;   ///< of a list
  position at;
  std::size_t num_values = 1; ///< this one and all below it, aliases written out

  /// The first entry called `key`, or null.
  const map_entry* find(std::string_view key) const;
};

struct syntax_error {
  position at;
  std::string what;
};

/// The first thing in `text` that is not UTF-8 or is a control character.
std::optional<syntax_error> check_text(std::string_view text);

inline constexpr std::size_t max_document_bytes = 1 << 20;
inline constexpr std::size_t max_document_values = 100'000;

/// Parses one YAML document of UTF-8 text. Refuses what is not UTF-8, control
/// characters, documents over the two limits above (aliases written out, which
/// bounds alias bombs), recursive aliases and keys that are not plain text. An empty
/// document is `nothing`.
tl::expected<value_ptr, syntax_error> read_document(std::string_view text);

} // namespace troupe::config
