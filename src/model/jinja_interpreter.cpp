#include "troupe/model/jinja_interpreter.hpp"

#include "troupe/model/jinja_builtins.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <ctime>
#include <deque>
#include <exception>

namespace troupe::model::jinja {

namespace {

// Nested evaluations and calls; each takes well under 2 KiB of stack.
constexpr int max_stack = 700;
constexpr std::int64_t max_range = 100'000; // as Jinja's sandbox

enum class flow { go_on, next_iteration, leave_loop };

class interpreter {
public:
  interpreter(std::vector<std::pair<std::string, value>> variables, budget& cost, std::time_t now)
    : cost_(cost), now_(now) {
    scopes_.push_back({std::move(variables), none});
  }

  std::string run(const node& root) {
    execute(root);
    return std::move(out_);
  }

private:
  static constexpr std::size_t none = static_cast<std::size_t>(-1);

  struct scope {
    std::vector<std::pair<std::string, value>> variables;
    std::size_t parent = none;
  };

  /// A new scope inside another, while it lives.
  class scoped {
  public:
    scoped(interpreter& i, std::size_t parent) : interpreter_(i), previous_(i.current_) {
      i.scopes_.push_back({{}, parent});
      i.current_ = i.scopes_.size() - 1;
    }
    explicit scoped(interpreter& i) : scoped(i, i.current_) {}
    ~scoped() {
      interpreter_.scopes_.pop_back();
      interpreter_.current_ = previous_;
    }
    scoped(const scoped&) = delete;
    scoped& operator=(const scoped&) = delete;

  private:
    interpreter& interpreter_;
    std::size_t previous_;
  };

  /// Counts the depth of the recursion and, where something fails, says in which line.
  class step {
  public:
    step(interpreter& i, const node& n) : interpreter_(i), previous_line_(i.line_) {
      i.cost_.take(1);
      if (++i.stack_ > max_stack) {
        --i.stack_;
        raise("the template calls itself too deeply");
      }
      i.line_ = n.line;
    }
    ~step() {
      --interpreter_.stack_;
      if (std::uncaught_exceptions() == 0)
        interpreter_.line_ = previous_line_;
    }
    step(const step&) = delete;
    step& operator=(const step&) = delete;

  private:
    interpreter& interpreter_;
    int previous_line_;
  };

public:
  int line() const { return line_; }

private:
  // Variables.

  const value* find(std::string_view name) {
    for (std::size_t i = current_; i != none; i = scopes_[i].parent) {
      cost_.take(1);
      for (const auto& [key, v] : scopes_[i].variables)
        if (key == name)
          return &v;
    }
    return nullptr;
  }

  void set(const std::string& name, value v) {
    auto& variables = scopes_[current_].variables;
    for (auto& [key, old] : variables) {
      if (key == name) {
        old = std::move(v);
        return;
      }
    }
    variables.emplace_back(name, std::move(v));
  }

  void assign(const node& target, const value& v) {
    if (target.kind == node_kind::name) {
      set(target.text, v);
    } else if (target.kind == node_kind::namespace_target) {
      const value* object = find(target.text);
      namespace_data* space = object != nullptr ? object->as_space() : nullptr;
      if (space == nullptr)
        raise(fmt::format("'{}' is not a namespace, so its '{}' cannot be set", target.text,
                          target.ops[0]));
      set_attribute(*space, target.ops[0], v);
    } else {
      const std::vector<value> items = to_items(v, cost_);
      if (items.size() != target.children.size())
        raise(fmt::format("{} values cannot be given to {} variables", items.size(),
                          target.children.size()));
      for (std::size_t i = 0; i < items.size(); ++i)
        assign(*target.children[i], items[i]);
    }
  }

  static void set_attribute(namespace_data& space, const std::string& name, value v) {
    if (name.starts_with('_'))
      raise(fmt::format("'{}' may not be set on a namespace", name));
    if (value* old = space.find(name))
      *old = std::move(v);
    else
      space.entries.emplace_back(name, std::move(v));
  }

  // Statements.

  void emit(std::string_view text) {
    cost_.take_bytes(text.size());
    out_ += text;
  }

  /// What a statement writes, instead of writing it.
  std::string capture(const node& body) {
    std::string outer = std::exchange(out_, {});
    execute(body);
    return std::exchange(out_, std::move(outer));
  }

  flow execute(const node& n) {
    const step guard(*this, n);
    switch (n.kind) {
    case node_kind::sequence:
      for (const node_ptr& child : n.children)
        if (const flow f = execute(*child); f != flow::go_on)
          return f;
      break;
    case node_kind::output_text: emit(n.text); break;
    case node_kind::output: emit(to_text(evaluate(*n.children[0]), cost_)); break;
    case node_kind::branch: return execute_branch(n);
    case node_kind::loop: execute_loop(n); break;
    case node_kind::assign: assign(*n.children[0], evaluate(*n.children[1])); break;
    case node_kind::assign_block: {
      value text = value::text(capture_scoped(*n.children[2]));
      if (n.children[1])
        text = filter_block(*n.children[1], std::move(text));
      assign(*n.children[0], text);
      break;
    }
    case node_kind::macro: set(n.text, make_macro(n)); break;
    case node_kind::call_block: {
      const node& call = *n.children[0];
      const value callee = evaluate(*call.children[0]);
      arguments args = evaluate_arguments(call, 1, describe(*call.children[0]));
      args.named.emplace_back("caller", make_macro(*n.children[1]));
      emit(to_text(call_value(callee, args), cost_));
      break;
    }
    case node_kind::filter_block:
      emit(
        to_text(filter_block(*n.children[0], value::text(capture_scoped(*n.children[1]))), cost_));
      break;
    case node_kind::scoped: {
      const scoped inner(*this);
      return execute(*n.children[0]);
    }
    case node_kind::loop_break: return flow::leave_loop;
    case node_kind::loop_continue: return flow::next_iteration;
    default: raise("an expression stands where a statement should");
    }
    return flow::go_on;
  }

  std::string capture_scoped(const node& body) {
    const scoped inner(*this);
    return capture(body);
  }

  flow execute_branch(const node& n) {
    const std::size_t count = n.children.size();
    for (std::size_t i = 0; i + 1 < count; i += 2)
      if (evaluate(*n.children[i]).truthy())
        return execute(*n.children[i + 1]);
    return count % 2 == 1 ? execute(*n.children[count - 1]) : flow::go_on;
  }

  void execute_loop(const node& n) {
    const node& target = *n.children[0];
    auto loop = std::make_shared<loop_data>();
    loop->items = to_items(evaluate(*n.children[1]), cost_);
    if (n.children[2]) {
      std::vector<value> kept;
      for (value& item : loop->items) {
        const scoped inner(*this);
        assign(target, item);
        if (evaluate(*n.children[2]).truthy())
          kept.push_back(std::move(item));
      }
      loop->items = std::move(kept);
    }
    if (loop->items.empty()) {
      if (n.children[4]) {
        const scoped inner(*this);
        execute(*n.children[4]);
      }
      return;
    }
    const value loop_variable = value::loop(loop);
    for (std::size_t i = 0; i < loop->items.size(); ++i) {
      loop->index = i;
      const scoped inner(*this);
      set("loop", loop_variable);
      assign(target, loop->items[i]);
      if (execute(*n.children[3]) == flow::leave_loop)
        break;
    }
  }

  /// The filters of a block, innermost first; the innermost has no input of its own.
  value filter_block(const node& filter, value input) {
    if (filter.children[0])
      input = filter_block(*filter.children[0], std::move(input));
    return apply_filter(filter.text, input, evaluate_arguments(filter, 1, filter.text), cost_);
  }

  // Expressions.

  value evaluate(const node& n) {
    const step guard(*this, n);
    switch (n.kind) {
    case node_kind::constant: return n.literal;
    case node_kind::name: return evaluate_name(n.text);
    case node_kind::list: return value::list(evaluate_all(n));
    case node_kind::tuple: return value::list(evaluate_all(n), true);
    case node_kind::dict: return evaluate_dict(n);
    case node_kind::negate: {
      const value v = evaluate(*n.children[0]);
      return v.is_real() ? value::real(-v.to_real()) : arithmetic("-", value::integer(0), v, cost_);
    }
    case node_kind::plus:
      return arithmetic("+", value::integer(0), evaluate(*n.children[0]), cost_);
    case node_kind::arithmetic: {
      const value left = evaluate(*n.children[0]);
      return arithmetic(n.text, left, evaluate(*n.children[1]), cost_);
    }
    case node_kind::comparison: return evaluate_comparison(n);
    case node_kind::logical_and: {
      value left = evaluate(*n.children[0]);
      return left.truthy() ? evaluate(*n.children[1]) : left;
    }
    case node_kind::logical_or: {
      value left = evaluate(*n.children[0]);
      return left.truthy() ? left : evaluate(*n.children[1]);
    }
    case node_kind::logical_not: return value::boolean(!evaluate(*n.children[0]).truthy());
    case node_kind::conditional:
      if (evaluate(*n.children[0]).truthy())
        return evaluate(*n.children[1]);
      return n.children.size() > 2 ? evaluate(*n.children[2])
                                   : value::undefined("an if without else");
    case node_kind::attribute: return get_attribute(evaluate(*n.children[0]), n.text, cost_);
    case node_kind::subscript: {
      const value object = evaluate(*n.children[0]);
      return get_item(object, evaluate(*n.children[1]), cost_);
    }
    case node_kind::slice: {
      const value object = evaluate(*n.children[0]);
      const auto part = [&](std::size_t i) {
        return n.children[i] ? evaluate(*n.children[i]) : value::none();
      };
      const value start = part(1);
      const value stop = part(2);
      return get_slice(object, start, stop, part(3), cost_);
    }
    case node_kind::call: {
      const value callee = evaluate(*n.children[0]);
      return call_value(callee, evaluate_arguments(n, 1, describe(*n.children[0])));
    }
    case node_kind::filter: {
      const value input = evaluate(*n.children[0]);
      return apply_filter(n.text, input, evaluate_arguments(n, 1, n.text), cost_);
    }
    case node_kind::test: {
      const value input = evaluate(*n.children[0]);
      return value::boolean(apply_test(n.text, input, evaluate_arguments(n, 1, n.text), cost_));
    }
    default: raise("a statement stands where an expression should");
    }
  }

  value evaluate_name(const std::string& name) {
    if (const value* found = find(name))
      return *found;
    constexpr std::array<std::string_view, 5> globals = {"namespace", "range", "raise_exception",
                                                         "strftime_now", "dict"};
    for (const std::string_view global : globals)
      if (global == name)
        return value::function(
          std::make_shared<const function_data>(function_data{function_data::kind::global, name}));
    return value::undefined(name);
  }

  std::vector<value> evaluate_all(const node& n) {
    std::vector<value> items;
    items.reserve(n.children.size());
    for (const node_ptr& child : n.children)
      items.push_back(evaluate(*child));
    return items;
  }

  value evaluate_dict(const node& n) {
    std::vector<std::pair<std::string, value>> entries;
    for (std::size_t i = 0; i < n.children.size(); i += 2) {
      const value key = evaluate(*n.children[i]);
      if (!key.is_text())
        raise(fmt::format("a dict's key must be a string, not {}", key.type_name()));
      put(entries, *key.as_text(), evaluate(*n.children[i + 1]));
    }
    return value::dict(std::move(entries));
  }

  static void put(std::vector<std::pair<std::string, value>>& entries, const std::string& key,
                  value v) {
    for (auto& [name, old] : entries) {
      if (name == key) {
        old = std::move(v);
        return;
      }
    }
    entries.emplace_back(key, std::move(v));
  }

  value evaluate_comparison(const node& n) {
    value left = evaluate(*n.children[0]);
    for (std::size_t i = 0; i < n.ops.size(); ++i) {
      value right = evaluate(*n.children[i + 1]);
      if (!compare_with(n.ops[i], left, right))
        return value::boolean(false);
      left = std::move(right);
    }
    return value::boolean(true);
  }

  bool compare_with(const std::string& op, const value& left, const value& right) {
    if (op == "==")
      return equals(left, right, cost_);
    if (op == "!=")
      return !equals(left, right, cost_);
    if (op == "in")
      return contains(right, left, cost_);
    if (op == "not in")
      return !contains(right, left, cost_);
    const int c = compare(left, right, cost_);
    if (op == "<")
      return c < 0;
    if (op == "<=")
      return c <= 0;
    return op == ">" ? c > 0 : c >= 0;
  }

  // Calls.

  /// How a callee is written, for messages.
  static std::string describe(const node& callee) {
    return callee.text.empty() ? "a function" : callee.text;
  }

  arguments evaluate_arguments(const node& n, std::size_t first, std::string function) {
    arguments args(std::move(function));
    for (std::size_t i = first; i < n.children.size(); ++i) {
      const node& argument = *n.children[i];
      if (argument.kind != node_kind::spread) {
        args.positional.push_back(evaluate(argument));
        continue;
      }
      for (value& item : to_items(evaluate(*argument.children[0]), cost_))
        args.positional.push_back(std::move(item));
    }
    for (const auto& [name, expression] : n.named)
      args.named.emplace_back(name, evaluate(*expression));
    return args;
  }

  value make_macro(const node& definition) {
    return value::function(std::make_shared<const function_data>(
      function_data{function_data::kind::macro, definition.text, value(), &definition, current_}));
  }

  value call_value(const value& callee, const arguments& args) {
    const function_data* function = callee.as_function();
    if (function == nullptr) {
      if (callee.is_undefined())
        raise(fmt::format("'{}' is undefined and cannot be called", callee.undefined_name()));
      raise(fmt::format("{} cannot be called", callee.type_name()));
    }
    switch (function->what) {
    case function_data::kind::method: return call_method(*function, args, cost_);
    case function_data::kind::macro: return call_macro(*function, args);
    case function_data::kind::cycle: {
      if (args.positional.empty())
        raise("loop.cycle needs items");
      return args.positional[function->self.as_loop()->index % args.positional.size()];
    }
    default: return call_global(function->name, args);
    }
  }

  value call_macro(const function_data& macro, const arguments& args) {
    const node& definition = *macro.definition;
    const std::size_t num_parameters = definition.ops.size();
    const std::size_t num_defaults = definition.children.size() - 1;
    if (args.positional.size() > num_parameters)
      raise(fmt::format("the macro {} takes at most {} arguments, not {}", macro.name,
                        num_parameters, args.positional.size()));
    // The scope of its definition may be gone by now; what is in its place is as good.
    const scoped inner(*this, std::min(macro.scope, scopes_.size() - 1));
    for (std::size_t i = 0; i < num_parameters; ++i) {
      const std::string& name = definition.ops[i];
      if (const value* given = args.find(i, name)) {
        set(name, *given);
      } else if (i + num_defaults >= num_parameters) {
        const std::size_t index = 1 + i - (num_parameters - num_defaults);
        set(name, evaluate(*definition.children[index]));
      } else {
        set(name, value::undefined(name));
      }
    }
    for (const auto& [name, v] : args.named) {
      if (name == "caller")
        set(name, v);
      else if (std::find(definition.ops.begin(), definition.ops.end(), name)
               == definition.ops.end())
        raise(fmt::format("the macro {} has no parameter {}", macro.name, name));
    }
    return value::text(capture(*definition.children[0]));
  }

  value call_global(const std::string& name, const arguments& args) {
    if (name == "raise_exception") {
      args.allow(1, {"message"});
      throw failure{to_text(args.get(0, "message"), cost_), line_, true};
    }
    if (name == "range")
      return call_range(args);
    if (name == "strftime_now")
      return call_strftime(args);
    return call_dict(name == "namespace", args);
  }

  /// namespace(...) and dict(...): an optional dict to start from, then named values.
  value call_dict(bool is_namespace, const arguments& args) {
    std::vector<std::pair<std::string, value>> entries;
    if (!args.positional.empty()) {
      const dict_data* start = args.positional[0].as_dict();
      if (start == nullptr || args.positional.size() > 1)
        raise(fmt::format("{} takes one dict and named values", args.function()));
      cost_.take(start->entries.size());
      entries = start->entries;
    }
    for (const auto& [name, v] : args.named)
      put(entries, name, v);
    if (!is_namespace)
      return value::dict(std::move(entries));
    namespace_data& space = spaces_.emplace_back();
    for (auto& [name, v] : entries)
      set_attribute(space, name, std::move(v));
    return value::space(&space);
  }

  value call_range(const arguments& args) {
    args.allow(3);
    const std::int64_t first = args.positional.size() > 1 ? args.get(0, "").to_integer() : 0;
    const std::int64_t last = args.get(args.positional.size() > 1 ? 1 : 0, "").to_integer();
    const std::int64_t stride = args.get_or(2, "", value::integer(1)).to_integer();
    if (stride == 0)
      raise("range needs a step that is not zero");
    std::vector<value> items;
    for (std::int64_t i = first; stride > 0 ? i < last : i > last;) {
      if (static_cast<std::int64_t>(items.size()) >= max_range)
        raise(fmt::format("range is longer than {}", max_range));
      items.push_back(value::integer(i));
      if (__builtin_add_overflow(i, stride, &i))
        break;
    }
    cost_.take(items.size());
    return value::list(std::move(items));
  }

  value call_strftime(const arguments& args) const {
    args.allow(1, {"format"});
    std::tm local{};
    localtime_r(&now_, &local);
    std::array<char, 512> text{};
    const std::size_t size =
      std::strftime(text.data(), text.size(), args.get_text(0, "format").c_str(), &local);
    return value::text(std::string(text.data(), size));
  }

  budget& cost_;
  const std::time_t now_;
  std::vector<scope> scopes_;
  std::size_t current_ = 0;
  std::deque<namespace_data> spaces_; // values point to them
  std::string out_;
  int stack_ = 0;
  int line_ = 0;
};

} // namespace

std::string render(const node& root, std::vector<std::pair<std::string, value>> variables,
                   budget& cost, std::time_t now) {
  interpreter run(std::move(variables), cost, now);
  try {
    return run.run(root);
  } catch (failure& f) {
    if (f.line == 0)
      f.line = run.line();
    throw;
  }
}

} // namespace troupe::model::jinja
