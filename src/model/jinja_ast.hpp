#pragma once

#include "troupe/model/jinja_value.hpp"

#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace troupe::model::jinja {

enum class node_kind {
  // Expressions; [..] lists the children, which may be null where marked ?.
  constant,    ///< literal
  name,        ///< text
  list,        ///< [items...]
  tuple,       ///< [items...]
  dict,        ///< [key, value, key, value...]
  negate,      ///< [operand]
  plus,        ///< [operand]
  arithmetic,  ///< [left, right], text: + - * / // % ** ~
  comparison,  ///< [first, operands...], ops: == != < <= > >= in "not in"
  logical_and, ///< [left, right]
  logical_or,  ///< [left, right]
  logical_not, ///< [operand]
  conditional, ///< [condition, then, else?]
  attribute,   ///< [object], text
  subscript,   ///< [object, index]
  slice,       ///< [object, start?, stop?, step?]
  call,        ///< [callee, arguments...], named
  spread,      ///< [list]: `*list` among arguments
  filter,      ///< [input?, arguments...], text, named; input is null for `filter` and `set` blocks
  test,        ///< [input, arguments...], text, named
  // Statements.
  sequence,     ///< [statements...]
  output_text,  ///< text
  output,       ///< [expression]
  branch,       ///< [condition, body, condition, body..., else body?]: an odd last one is the else
  loop,         ///< [target, items, condition?, body, else?]
  assign,       ///< [target, value]
  assign_block, ///< [target, filter?, body]
  namespace_target, ///< text: namespace, ops[0]: attribute
  macro,            ///< text: name, ops: parameters, [body, defaults of the last parameters...]
  call_block,       ///< [call, macro named "caller"]
  filter_block,     ///< [filter, body]
  scoped,           ///< [body]: what is set inside stays inside
  loop_break,
  loop_continue,
};

/// A part of a parsed template.
struct node {
  node_kind kind = node_kind::constant;
  int line = 0;
  int depth = 1; ///< levels below and including this one; limited by the parser
  std::string text;
  value literal;
  std::vector<std::string> ops;
  std::vector<std::unique_ptr<node>> children;
  std::vector<std::pair<std::string, std::unique_ptr<node>>> named;
};

using node_ptr = std::unique_ptr<node>;

} // namespace troupe::model::jinja
