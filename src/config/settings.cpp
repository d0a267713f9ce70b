#include "troupe/config/settings.hpp"

#include <algorithm>
#include <charconv>
#include <optional>
#include <string_view>
#include <variant>
#include <vector>

#include <fmt/format.h>

namespace troupe::config {

namespace {

using step = std::variant<std::string, std::size_t>; // a key or the number of a list item

constexpr std::size_t max_steps = 16;

/// "nodes[0].name" -> nodes, 0, name; nothing when it is not of that form.
std::optional<std::vector<step>> parse_key(std::string_view key) {
  std::vector<step> steps;
  while (true) {
    const std::size_t end = std::min(key.find_first_of(".["), key.size());
    if (end == 0 || steps.size() > max_steps)
      return std::nullopt;
    steps.emplace_back(std::string(key.substr(0, end)));
    key.remove_prefix(end);
    while (key.starts_with('[')) {
      std::size_t index = 0;
      const char* last = key.data() + key.size();
      const auto [rest, failure] = std::from_chars(key.data() + 1, last, index);
      if (failure != std::errc{} || rest == last || *rest != ']')
        return std::nullopt;
      if (steps.size() > max_steps)
        return std::nullopt;
      steps.emplace_back(index);
      key.remove_prefix(static_cast<std::size_t>(rest + 1 - key.data()));
    }
    if (key.empty())
      return steps;
    if (!key.starts_with('.'))
      return std::nullopt;
    key.remove_prefix(1);
  }
}

bool is_yaml_collection(std::string_view text) {
  return (text.starts_with('[') && text.ends_with(']'))
         || (text.starts_with('{') && text.ends_with('}'));
}

/// The same value, as if all of it stood at `at`.
value_ptr moved_to(const value& original, position at) {
  auto copy = std::make_shared<value>(original);
  copy->at = at;
  for (map_entry& entry : copy->entries) {
    entry.at = at;
    entry.content = moved_to(*entry.content, at);
  }
  for (value_ptr& item : copy->items)
    item = moved_to(*item, at);
  return copy;
}

tl::expected<value_ptr, std::string> parse_value(std::string_view text, position at) {
  if (!is_yaml_collection(text)) {
    value made;
    made.kind = value_kind::scalar;
    made.style = scalar_style::bare;
    made.text = text;
    made.at = at;
    return std::make_shared<const value>(std::move(made));
  }
  return read_document(text)
    .map([&](const value_ptr& read) { return moved_to(*read, at); })
    .map_error([](const syntax_error& broken) { return broken.what; });
}

/// A copy of `base` (which may be null) with `content` at the end of `steps`. Only the
/// values on the way are copied. Where the file holds something else than the way
/// needs, the file wins: the reader will complain about it at its own position.
tl::expected<value_ptr, std::string> put(const value_ptr& base, std::span<const step> steps,
                                         const value_ptr& content) {
  if (steps.empty())
    return content;
  if (const auto* index = std::get_if<std::size_t>(&steps.front())) {
    const std::size_t size = base && base->kind == value_kind::list ? base->items.size() : 0;
    if (*index >= size)
      return tl::unexpected(fmt::format(
        "there is no item [{}]; the list has {} items, counted from [0]", *index, size));
    return put(base->items[*index], steps.subspan(1), content).map([&](value_ptr item) {
      auto copy = std::make_shared<value>(*base);
      copy->items[*index] = std::move(item);
      return value_ptr(std::move(copy));
    });
  }
  const std::string& key = std::get<std::string>(steps.front());
  const bool absent = !base || base->kind == value_kind::nothing;
  if (!absent && base->kind != value_kind::map)
    return base;
  auto copy = absent ? std::make_shared<value>() : std::make_shared<value>(*base);
  copy->kind = value_kind::map;
  if (absent)
    copy->at = content->at;
  auto entry = std::ranges::find(copy->entries, key, &map_entry::key);
  const value_ptr before = entry == copy->entries.end() ? nullptr : entry->content;
  return put(before, steps.subspan(1), content).map([&](value_ptr after) {
    if (entry == copy->entries.end())
      copy->entries.push_back({key, content->at, std::move(after)});
    else
      entry->content = std::move(after);
    return value_ptr(std::move(copy));
  });
}

} // namespace

value_ptr with_settings(value_ptr root, std::span<const std::string> settings, report& problems) {
  for (std::size_t i = 0; i < settings.size(); ++i) {
    const position at{0, 0, static_cast<int>(i)};
    const std::string_view setting = settings[i];
    if (const auto bad = check_text(setting)) {
      problems.add(at, "", bad->what);
      continue;
    }
    const std::size_t equals = setting.find('=');
    const std::string_view key = setting.substr(0, equals);
    const auto steps = parse_key(key);
    if (equals == std::string_view::npos || !steps) {
      problems.add(at, "",
                   fmt::format("{} is not of the form KEY=VALUE; write for instance "
                               "--set serving.listen=127.0.0.1:0",
                               in_quotes(setting)));
      continue;
    }
    auto result = parse_value(setting.substr(equals + 1), at).and_then([&](const value_ptr& made) {
      return put(root, *steps, made);
    });
    if (result)
      root = std::move(*result);
    else
      problems.add(at, key, result.error());
  }
  return root;
}

} // namespace troupe::config
