#include "troupe/model/jinja_value.hpp"

#include <fmt/format.h>

#include <algorithm>

namespace troupe::model::jinja {

namespace {

constexpr std::uint32_t max_depth = 100;
constexpr std::size_t max_text_bytes = std::size_t{64} << 20U;

std::uint32_t deeper(std::uint32_t depth) {
  if (depth >= max_depth)
    raise(fmt::format("values are nested more than {} levels deep", max_depth));
  return depth + 1;
}

} // namespace

void raise(std::string text) {
  throw failure{std::move(text)};
}

void budget::exhausted() {
  raise(
    "the template does too much work for this conversation (an endless loop, or too much text)");
}

const value* dict_data::find(std::string_view key) const {
  for (const auto& [name, v] : entries)
    if (name == key)
      return &v;
  return nullptr;
}

value* namespace_data::find(std::string_view key) {
  for (auto& [name, v] : entries)
    if (name == key)
      return &v;
  return nullptr;
}

value value::undefined(std::string what) {
  value v;
  v.data_ = undefined_data{std::make_shared<const std::string>(std::move(what))};
  return v;
}

value value::none() {
  value v;
  v.data_ = nullptr;
  return v;
}

value value::boolean(bool b) {
  value v;
  v.data_ = b;
  return v;
}

value value::integer(std::int64_t i) {
  value v;
  v.data_ = i;
  return v;
}

value value::real(double d) {
  value v;
  v.data_ = d;
  return v;
}

value value::text(std::string s) {
  if (s.size() > max_text_bytes)
    raise(fmt::format("a text grows over {} bytes", max_text_bytes));
  value v;
  v.data_ = std::make_shared<const std::string>(std::move(s));
  return v;
}

value value::list(std::vector<value> items, bool is_tuple) {
  std::uint32_t depth = 0;
  for (const value& item : items)
    depth = std::max(depth, item.depth());
  value v;
  v.data_ = std::make_shared<const list_data>(list_data{std::move(items), deeper(depth), is_tuple});
  return v;
}

value value::dict(std::vector<std::pair<std::string, value>> entries) {
  std::uint32_t depth = 0;
  for (const auto& [key, item] : entries)
    depth = std::max(depth, item.depth());
  value v;
  v.data_ = std::make_shared<const dict_data>(dict_data{std::move(entries), deeper(depth)});
  return v;
}

value value::space(namespace_data* n) {
  value v;
  v.data_ = n;
  return v;
}

value value::loop(std::shared_ptr<loop_data> l) {
  value v;
  v.data_ = std::move(l);
  return v;
}

value value::function(std::shared_ptr<const function_data> f) {
  value v;
  v.data_ = std::move(f);
  return v;
}

const std::string* value::as_text() const {
  const auto* p = std::get_if<std::shared_ptr<const std::string>>(&data_);
  return p != nullptr ? p->get() : nullptr;
}

const list_data* value::as_list() const {
  const auto* p = std::get_if<std::shared_ptr<const list_data>>(&data_);
  return p != nullptr ? p->get() : nullptr;
}

const dict_data* value::as_dict() const {
  const auto* p = std::get_if<std::shared_ptr<const dict_data>>(&data_);
  return p != nullptr ? p->get() : nullptr;
}

namespace_data* value::as_space() const {
  const auto* p = std::get_if<namespace_data*>(&data_);
  return p != nullptr ? *p : nullptr;
}

loop_data* value::as_loop() const {
  const auto* p = std::get_if<std::shared_ptr<loop_data>>(&data_);
  return p != nullptr ? p->get() : nullptr;
}

const function_data* value::as_function() const {
  const auto* p = std::get_if<std::shared_ptr<const function_data>>(&data_);
  return p != nullptr ? p->get() : nullptr;
}

std::int64_t value::to_integer() const {
  if (is_boolean())
    return std::get<bool>(data_) ? 1 : 0;
  if (!is_integer())
    raise(fmt::format("a whole number is needed, not {}", type_name()));
  return std::get<std::int64_t>(data_);
}

double value::to_real() const {
  if (is_real())
    return std::get<double>(data_);
  if (!is_number())
    raise(fmt::format("a number is needed, not {}", type_name()));
  return static_cast<double>(to_integer());
}

bool value::truthy() const {
  if (is_undefined() || is_none())
    return false;
  if (is_real())
    return to_real() != 0.0;
  if (is_number())
    return to_integer() != 0;
  if (const auto* s = as_text())
    return !s->empty();
  if (const auto* l = as_list())
    return !l->items.empty();
  if (const auto* d = as_dict())
    return !d->entries.empty();
  return true;
}

std::uint32_t value::depth() const {
  if (const auto* l = as_list())
    return l->depth;
  if (const auto* d = as_dict())
    return d->depth;
  // What holds other values counts as a level, so that no chain of them grows without end.
  if (const auto* f = as_function())
    return f->self.depth() + 1;
  if (const auto* l = as_loop()) {
    std::uint32_t depth = 0;
    for (const value& item : l->items)
      depth = std::max(depth, item.depth());
    return depth + 1;
  }
  return 0;
}

std::string_view value::type_name() const {
  if (is_undefined())
    return "an undefined value";
  if (is_none())
    return "none";
  if (is_boolean())
    return "a boolean";
  if (is_integer())
    return "an integer";
  if (is_real())
    return "a float";
  if (is_text())
    return "a string";
  if (const auto* l = as_list())
    return l->is_tuple ? "a tuple" : "a list";
  if (is_dict())
    return "a dict";
  if (as_space() != nullptr)
    return "a namespace";
  return as_loop() != nullptr ? "a loop" : "a function";
}

std::string value::undefined_name() const {
  const auto* u = std::get_if<undefined_data>(&data_);
  return u != nullptr && u->what ? *u->what : "a value";
}

bool equals(const value& a, const value& b, budget& cost) {
  cost.take(1);
  if (a.is_number() && b.is_number()) {
    if (a.is_real() || b.is_real())
      return a.to_real() == b.to_real();
    return a.to_integer() == b.to_integer();
  }
  if (a.is_undefined() || b.is_undefined())
    return a.is_undefined() && b.is_undefined();
  if (a.is_none() || b.is_none())
    return a.is_none() && b.is_none();
  if (a.is_text() && b.is_text()) {
    cost.take_bytes(a.as_text()->size());
    return *a.as_text() == *b.as_text();
  }
  if (a.is_list() && b.is_list()) {
    const auto& left = *a.as_list();
    const auto& right = *b.as_list();
    if (left.is_tuple != right.is_tuple || left.items.size() != right.items.size())
      return false;
    for (std::size_t i = 0; i < left.items.size(); ++i)
      if (!equals(left.items[i], right.items[i], cost))
        return false;
    return true;
  }
  if (a.is_dict() && b.is_dict()) {
    const auto& left = *a.as_dict();
    const auto& right = *b.as_dict();
    if (left.entries.size() != right.entries.size())
      return false;
    for (const auto& [key, item] : left.entries) {
      cost.take(1 + right.entries.size() / 8);
      const value* other = right.find(key);
      if (other == nullptr || !equals(item, *other, cost))
        return false;
    }
    return true;
  }
  if (a.as_space() != nullptr)
    return a.as_space() == b.as_space();
  return false;
}

int compare(const value& a, const value& b, budget& cost) {
  cost.take(1);
  if (a.is_number() && b.is_number()) {
    if (a.is_real() || b.is_real())
      return a.to_real() < b.to_real() ? -1 : a.to_real() > b.to_real() ? 1 : 0;
    return a.to_integer() < b.to_integer() ? -1 : a.to_integer() > b.to_integer() ? 1 : 0;
  }
  if (a.is_text() && b.is_text()) { // the order of UTF-8 bytes is that of code points
    cost.take_bytes(std::min(a.as_text()->size(), b.as_text()->size()));
    return a.as_text()->compare(*b.as_text());
  }
  if (a.is_list() && b.is_list()) {
    const auto& left = a.as_list()->items;
    const auto& right = b.as_list()->items;
    for (std::size_t i = 0; i < std::min(left.size(), right.size()); ++i)
      if (!equals(left[i], right[i], cost))
        return compare(left[i], right[i], cost);
    return left.size() < right.size() ? -1 : left.size() > right.size() ? 1 : 0;
  }
  raise(fmt::format("{} and {} cannot be ordered", a.type_name(), b.type_name()));
}

} // namespace troupe::model::jinja
