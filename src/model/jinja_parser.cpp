#include "troupe/model/jinja_parser.hpp"

#include "troupe/model/jinja_expression_parser.hpp"

#include <array>

namespace troupe::model::jinja {

namespace {

/// Reads statements and the text between them.
class parser : private expression_parser {
public:
  explicit parser(std::vector<token> tokens) : expression_parser(std::move(tokens)) {}

  node_ptr run() { return parse_body({}); }

private:
  /// Statements up to a block that starts with one of `ends`, whose word becomes current; or to
  /// the end of the template where there are none.
  node_ptr parse_body(std::initializer_list<std::string_view> ends) {
    const nested guard(*this);
    node_ptr body = make(node_kind::sequence, current().line);
    while (true) {
      const int line = current().line;
      switch (current().kind) {
      case token_kind::end:
        if (ends.size() > 0)
          fail(fmt::format("{{% {} %}} is missing at the end of the template", *(ends.end() - 1)));
        return body;
      case token_kind::text:
        adopt(*body, make(node_kind::output_text, line, current().text));
        next();
        break;
      case token_kind::output_begin: {
        next();
        node_ptr expression = parse_tuple(true);
        expect(token_kind::output_end, "}}");
        adopt(*body, make(node_kind::output, line, "", std::move(expression)));
        break;
      }
      case token_kind::block_begin:
        next();
        if (current().kind == token_kind::name
            && std::find(ends.begin(), ends.end(), current().text) != ends.end())
          return body;
        adopt(*body, parse_statement());
        expect(token_kind::block_end, "%}");
        break;
      default: fail(fmt::format("unexpected {}", describe_current()));
      }
    }
  }

  /// A body that ends with `{% end %}`; its closing %} is left to the caller.
  node_ptr parse_block(std::string_view end) {
    expect(token_kind::block_end, "%}");
    node_ptr body = parse_body({end});
    next();
    return body;
  }

  node_ptr parse_statement() {
    const int line = current().line;
    const std::string word = expect_name("a statement");
    if (word == "if")
      return parse_if(line);
    if (word == "for")
      return parse_for(line);
    if (word == "set")
      return parse_set(line);
    if (word == "macro")
      return parse_macro(line);
    if (word == "call")
      return parse_call_block(line);
    if (word == "filter") {
      node_ptr filter = parse_filters(nullptr, true);
      return make(node_kind::filter_block, line, "", std::move(filter), parse_block("endfilter"));
    }
    if (word == "generation") // marks the assistant's tokens for training; plain text here
      return make(node_kind::scoped, line, "", parse_block("endgeneration"));
    if (word == "break" || word == "continue") {
      if (num_loops_ == 0)
        fail(fmt::format("{{% {} %}} outside of a loop", word));
      return make(word == "break" ? node_kind::loop_break : node_kind::loop_continue, line);
    }
    fail(fmt::format("the statement '{}' is not supported in chat templates", word));
  }

  node_ptr parse_if(int line) {
    node_ptr branch = make(node_kind::branch, line);
    while (true) {
      adopt(*branch, parse_tuple(false));
      expect(token_kind::block_end, "%}");
      adopt(*branch, parse_body({"elif", "else", "endif"}));
      if (skip_word("elif"))
        continue;
      if (skip_word("else")) {
        expect(token_kind::block_end, "%}");
        adopt(*branch, parse_body({"endif"}));
      }
      next();
      return branch;
    }
  }

  node_ptr parse_for(int line) {
    node_ptr loop = make(node_kind::loop, line);
    adopt(*loop, parse_target(false));
    if (!skip_word("in"))
      fail(fmt::format("'in' expected, not {}", describe_current()));
    adopt(*loop, parse_tuple(false));
    node_ptr condition = skip_word("if") ? parse_expression() : nullptr;
    if (is_word("recursive"))
      fail("recursive loops are not supported in chat templates");
    expect(token_kind::block_end, "%}");
    ++num_loops_;
    node_ptr body = parse_body({"else", "endfor"});
    --num_loops_;
    node_ptr otherwise;
    if (skip_word("else")) {
      expect(token_kind::block_end, "%}");
      otherwise = parse_body({"endfor"});
    }
    next();
    adopt(*loop, std::move(condition));
    adopt(*loop, std::move(body));
    adopt(*loop, std::move(otherwise));
    return loop;
  }

  node_ptr parse_set(int line) {
    node_ptr target = parse_target(true);
    if (skip_symbol("="))
      return make(node_kind::assign, line, "", std::move(target), parse_tuple(true));
    node_ptr set = make(node_kind::assign_block, line, "", std::move(target));
    adopt(*set, is_symbol("|") ? parse_filters(nullptr, false) : nullptr);
    adopt(*set, parse_block("endset"));
    return set;
  }

  /// A name, several in a tuple, or namespace.attribute where `attributes` allows it.
  node_ptr parse_target(bool attributes) {
    const int line = current().line;
    node_ptr first = parse_single_target(attributes);
    if (!is_symbol(","))
      return first;
    node_ptr all = make(node_kind::tuple, line, "", std::move(first));
    while (skip_symbol(",") && !is_word("in") && !is_symbol("=") && !is_symbol(")"))
      adopt(*all, parse_single_target(attributes));
    return all;
  }

  node_ptr parse_single_target(bool attributes) {
    const nested guard(*this);
    const int line = current().line;
    if (skip_symbol("(")) {
      node_ptr inner = parse_target(attributes);
      expect_symbol(")");
      return inner;
    }
    constexpr std::array<std::string_view, 7> reserved = {"true",  "false", "none", "True",
                                                          "False", "None",  "loop"};
    std::string name = expect_name("a variable");
    if (std::find(reserved.begin(), reserved.end(), name) != reserved.end())
      fail(fmt::format("'{}' cannot be assigned to", name));
    if (attributes && skip_symbol(".")) {
      node_ptr target = make(node_kind::namespace_target, line, std::move(name));
      target->ops.push_back(expect_name("an attribute"));
      return target;
    }
    return make(node_kind::name, line, std::move(name));
  }

  /// `(a, b=1)` of a macro or call, into names and the defaults of the last ones.
  void parse_signature(node& macro, std::vector<node_ptr>& defaults) {
    expect_symbol("(");
    while (!is_symbol(")")) {
      if (!macro.ops.empty())
        expect_symbol(",");
      if (is_symbol(")"))
        break;
      macro.ops.push_back(expect_name("a parameter"));
      if (skip_symbol("="))
        defaults.push_back(parse_expression());
      else if (!defaults.empty())
        fail(fmt::format("parameter '{}' without a default follows one with it", macro.ops.back()));
    }
    expect_symbol(")");
  }

  void finish_macro(node& macro, std::vector<node_ptr> defaults, std::string_view end) {
    const int loops = std::exchange(num_loops_, 0);
    adopt(macro, parse_block(end));
    num_loops_ = loops;
    for (node_ptr& d : defaults)
      adopt(macro, std::move(d));
  }

  node_ptr parse_macro(int line) {
    node_ptr macro = make(node_kind::macro, line, expect_name("the macro's name"));
    std::vector<node_ptr> defaults;
    parse_signature(*macro, defaults);
    finish_macro(*macro, std::move(defaults), "endmacro");
    return macro;
  }

  node_ptr parse_call_block(int line) {
    node_ptr caller = make(node_kind::macro, line, "caller");
    std::vector<node_ptr> defaults;
    if (is_symbol("("))
      parse_signature(*caller, defaults);
    node_ptr call = parse_expression();
    if (call->kind != node_kind::call)
      fail("{% call %} needs a call");
    finish_macro(*caller, std::move(defaults), "endcall");
    return make(node_kind::call_block, line, "", std::move(call), std::move(caller));
  }

  int num_loops_ = 0; // around the current statement
};

} // namespace

node_ptr parse_template(std::string_view source) {
  return parser(tokenize(source)).run();
}

} // namespace troupe::model::jinja
