#pragma once

#include "troupe/base/error.hpp"

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace troupe::model::jinja {

struct node;
class value;

/// How a template fails, inside this module only: thrown while parsing or rendering and turned
/// into an `error` by chat_template.
struct failure {
  std::string text;
  int line = 0;             ///< of the template; 0 where it is not known yet
  bool by_template = false; ///< the template itself called raise_exception
};

[[noreturn]] void raise(std::string text);

/// What a rendering may still spend. Every step of the interpreter and every piece of text or
/// list that it makes is paid for, so that no template runs or grows without end.
class budget {
public:
  /// Enough for a prompt of several megabytes in any template known; about a second of work.
  static constexpr std::uint64_t default_steps = 20'000'000;

  explicit budget(std::uint64_t steps = default_steps) : left_(steps) {}

  /// Pays for work; throws failure when nothing is left.
  void take(std::uint64_t steps) {
    if (steps > left_)
      exhausted();
    left_ -= steps;
  }

  void take_bytes(std::uint64_t bytes) { take(1 + bytes / 16); }

private:
  [[noreturn]] void exhausted();

  std::uint64_t left_;
};

struct list_data {
  std::vector<value> items;
  std::uint32_t depth = 1; ///< levels of lists and dicts, itself included
  bool is_tuple = false;
};

/// Keys in the order in which they came, as in Python.
struct dict_data {
  std::vector<std::pair<std::string, value>> entries;
  std::uint32_t depth = 1;

  const value* find(std::string_view key) const;
};

/// `namespace(...)`: the only value that a template can change. Owned by the rendering.
struct namespace_data {
  std::vector<std::pair<std::string, value>> entries;

  value* find(std::string_view key);
};

struct loop_data;
struct function_data;

/// A value of the template language, with Python's meaning. Strings are valid UTF-8. Lists, dicts
/// and strings are shared and never change, so copies are cheap and cycles cannot arise.
class value {
public:
  struct undefined_data {
    std::shared_ptr<const std::string> what; ///< the name that was not found
  };

  value() = default; ///< undefined
  static value undefined(std::string what);
  static value none();
  static value boolean(bool b);
  static value integer(std::int64_t i);
  static value real(double d);
  static value text(std::string s);
  static value list(std::vector<value> items, bool is_tuple = false);
  static value dict(std::vector<std::pair<std::string, value>> entries);
  static value space(namespace_data* n);
  static value loop(std::shared_ptr<loop_data> l);
  static value function(std::shared_ptr<const function_data> f);

  bool is_undefined() const { return std::holds_alternative<undefined_data>(data_); }
  bool is_none() const { return std::holds_alternative<std::nullptr_t>(data_); }
  bool is_boolean() const { return std::holds_alternative<bool>(data_); }
  bool is_integer() const { return std::holds_alternative<std::int64_t>(data_); }
  bool is_real() const { return std::holds_alternative<double>(data_); }
  bool is_text() const { return as_text() != nullptr; }
  bool is_list() const { return as_list() != nullptr; }
  bool is_dict() const { return as_dict() != nullptr; }
  /// Numbers include booleans, as in Python.
  bool is_number() const { return is_boolean() || is_integer() || is_real(); }

  const std::string* as_text() const;
  const list_data* as_list() const;
  const dict_data* as_dict() const;
  namespace_data* as_space() const;
  loop_data* as_loop() const;
  const function_data* as_function() const;

  /// The value of an integer or boolean; throws failure for others.
  std::int64_t to_integer() const;
  /// The value of any number; throws failure for others.
  double to_real() const;

  bool truthy() const;
  std::uint32_t depth() const;
  /// Python-like name of the type, for messages.
  std::string_view type_name() const;
  /// The name behind an undefined value, for messages.
  std::string undefined_name() const;

private:
  std::variant<undefined_data, std::nullptr_t, bool, std::int64_t, double,
               std::shared_ptr<const std::string>, std::shared_ptr<const list_data>,
               std::shared_ptr<const dict_data>, namespace_data*, std::shared_ptr<loop_data>,
               std::shared_ptr<const function_data>>
    data_;
};

/// The loop variable of a running `for`.
struct loop_data {
  std::vector<value> items;
  std::size_t index = 0;
};

/// Something that can be called.
struct function_data {
  enum class kind { global, method, macro, cycle };
  kind what = kind::global;
  std::string name;
  value self;                       ///< method: its object; cycle: the loop
  const node* definition = nullptr; ///< macro
  std::size_t scope = 0;            ///< macro: the scope it was defined in
};

bool equals(const value& a, const value& b, budget& cost);

/// Python's ordering: negative, 0 or positive. Throws failure where the types have no order.
int compare(const value& a, const value& b, budget& cost);

/// str(v): what `{{ v }}` prints.
std::string to_text(const value& v, budget& cost);

/// A float as Python prints it.
std::string real_to_text(double d);

struct json_format {
  bool ensure_ascii = false;
  int indent = -1; ///< below 0: on one line
  std::string item_separator = ", ";
  std::string key_separator = ": ";
  bool sort_keys = false;
};

/// json.dumps(v).
std::string to_json(const value& v, const json_format& format, budget& cost);

} // namespace troupe::model::jinja
