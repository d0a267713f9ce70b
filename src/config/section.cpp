#include "troupe/config/section.hpp"

#include <algorithm>
#include <cctype>
#include <charconv>

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace troupe::config {

namespace {

bool is_number(std::string_view text) {
  double ignored = 0;
  const char* last = text.data() + text.size();
  const auto [rest, failure] = std::from_chars(text.data(), last, ignored);
  return failure != std::errc::invalid_argument && rest == last
         && std::any_of(text.begin(), text.end(), [](unsigned char c) { return std::isdigit(c); });
}

bool is_boolean(std::string_view text) {
  return text == "true" || text == "false" || text == "True" || text == "False" || text == "TRUE"
         || text == "FALSE";
}

/// What a value is, in words, when it is not what a key needs.
std::string describe(const value& given) {
  switch (given.kind) {
  case value_kind::nothing: return "nothing is written here";
  case value_kind::list: return "a list is written here";
  case value_kind::map: return "a mapping is written here";
  case value_kind::scalar: break;
  }
  const bool plain = given.style != scalar_style::quoted;
  if (plain && is_number(given.text))
    return fmt::format("{} is a number", given.text.substr(0, 40));
  if (plain && is_boolean(given.text))
    return fmt::format("{} is a truth value", given.text);
  if (given.style == scalar_style::quoted)
    return fmt::format("{} is text, because of the quotes", in_quotes(given.text));
  return fmt::format("{} is text", in_quotes(given.text));
}

} // namespace

section::section(report& problems, std::map<std::string, std::string, std::less<>>& positions,
                 value_ptr content, std::string path, position at)
  : problems_(problems),
    positions_(positions),
    content_(std::move(content)),
    path_(std::move(path)),
    at_(at) {
  if (!content_)
    return;
  if (!path_.empty())
    positions_[path_] = problems_.where(content_->at);
  if (content_->kind != value_kind::map && content_->kind != value_kind::nothing)
    problems_.add(content_->at, path_,
                  fmt::format("{}; a mapping of keys to values is needed", describe(*content_)));
  if (content_->kind != value_kind::map)
    content_ = nullptr;
}

std::string section::path_of(std::string_view key) const {
  return path_.empty() ? std::string(key) : fmt::format("{}.{}", path_, key);
}

const value* section::take(std::string_view key) {
  problems_.add_known(path_, std::string(key));
  asked_.emplace(key);
  const map_entry* entry = content_ ? content_->find(key) : nullptr;
  if (!entry)
    return nullptr;
  positions_[path_of(key)] = problems_.where(entry->content->at);
  return entry->content.get();
}

section section::child(std::string_view key) {
  take(key);
  const map_entry* entry = content_ ? content_->find(key) : nullptr;
  return {problems_, positions_, entry ? entry->content : nullptr, path_of(key),
          entry ? entry->at : at_};
}

bool section::read_number(std::string_view key, std::uint32_t& target, std::uint32_t low,
                          std::uint32_t high) {
  const value* given = take(key);
  if (!given)
    return false;
  const std::string right = fmt::format("a whole number from {} to {} is needed", low, high);
  const std::string& text = given->text;
  const bool candidate = given->kind == value_kind::scalar && given->style != scalar_style::quoted;
  std::int64_t number = 0;
  const char* last = text.data() + text.size();
  const auto [rest, failure] = std::from_chars(text.data(), last, number);
  const bool whole = candidate && failure != std::errc::invalid_argument && rest == last;
  if (!whole) {
    const std::string wrong = candidate && is_number(text)
                                ? fmt::format("{} is not a whole number", text.substr(0, 40))
                                : describe(*given);
    problems_.add(given->at, path_of(key), fmt::format("{}; {}", wrong, right));
    return false;
  }
  if (failure == std::errc::result_out_of_range || number < low || number > high) {
    problems_.add(given->at, path_of(key),
                  fmt::format("{} is out of range; {}", text.substr(0, 40), right));
    return false;
  }
  target = static_cast<std::uint32_t>(number);
  return true;
}

std::optional<std::string> section::item_text(const value& item, const std::string& path) {
  const bool typed =
    item.style == scalar_style::plain && (is_number(item.text) || is_boolean(item.text));
  if (item.kind != value_kind::scalar || typed) {
    const std::string right =
      typed ? fmt::format("text is needed: write \"{}\" in quotes if that is meant", item.text)
            : std::string("text is needed");
    problems_.add(item.at, path, fmt::format("{}; {}", describe(item), right));
    return std::nullopt;
  }
  if (item.text.empty()) {
    problems_.add(item.at, path, "the text is empty; write a value or leave the key out");
    return std::nullopt;
  }
  return item.text;
}

bool section::read_text(std::string_view key, std::string& target) {
  const value* given = take(key);
  if (!given)
    return false;
  auto text = item_text(*given, path_of(key));
  if (text)
    target = std::move(*text);
  return text.has_value();
}

std::optional<std::size_t> section::choose(std::string_view key,
                                           std::span<const std::string_view> names) {
  std::string text;
  if (!read_text(key, text))
    return std::nullopt;
  const auto found = std::ranges::find(names, std::string_view(text));
  if (found == names.end()) {
    refuse(key, fmt::format("{} is not known; write one of: {}", in_quotes(text),
                            fmt::join(names, ", ")));
    return std::nullopt;
  }
  return static_cast<std::size_t>(found - names.begin());
}

value_ptr section::read_list(std::string_view key) {
  if (!take(key))
    return nullptr;
  const value_ptr& given = content_->find(key)->content;
  if (given->kind != value_kind::list && given->kind != value_kind::nothing) {
    problems_.add(given->at, path_of(key), fmt::format("{}; a list is needed", describe(*given)));
    return nullptr;
  }
  if (given->items.empty()) {
    problems_.add(given->at, path_of(key),
                  "the list is empty; give at least one item or leave the key out");
    return nullptr;
  }
  return given;
}

void section::refuse(std::string_view key, std::string what) {
  const map_entry* entry = content_ ? content_->find(key) : nullptr;
  problems_.add(entry ? entry->content->at : at_, path_of(key), std::move(what));
}

void section::done() {
  if (!content_)
    return;
  std::map<std::string_view, position> seen;
  for (const map_entry& entry : content_->entries) {
    const auto [first, is_new] = seen.try_emplace(entry.key, entry.at);
    if (!is_new)
      problems_.add(entry.at, path_of(entry.key.substr(0, 80)),
                    fmt::format("the key is there twice, first in line {}; keep one of the two",
                                first->second.line));
    else if (!asked_.contains(entry.key))
      problems_.add_unknown(entry.at, path_, entry.key);
  }
}

} // namespace troupe::config
