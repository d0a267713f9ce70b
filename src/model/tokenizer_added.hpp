#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

namespace troupe::model {

/// Finds added tokens in text: the leftmost one, and of those that start there the longest.
/// A trie over bytes; immutable once filled and then thread-safe.
class added_token_finder {
public:
  struct match {
    std::size_t begin = 0;
    std::size_t end = 0;
    std::int32_t token = 0;
  };

  added_token_finder();

  /// `content` must not be empty.
  void add(std::string_view content, std::int32_t token);

  /// The first match that starts at or after `from`.
  std::optional<match> find(std::string_view text, std::size_t from) const;

  bool empty() const { return nodes_.size() == 1; }

private:
  struct node {
    std::vector<std::pair<char, std::int32_t>> children;
    std::int32_t token = -1;
  };

  std::int32_t child_of(std::int32_t node, char byte) const;

  std::vector<node> nodes_;
  std::array<bool, 256> starts_{};
};

} // namespace troupe::model
