#include "troupe/model/jinja_lexer.hpp"

#include "troupe/model/jinja_value.hpp"
#include "troupe/model/unicode.hpp"

#include <fmt/format.h>

#include <algorithm>

namespace troupe::model::jinja {

namespace {

bool is_digit(char c) {
  return c >= '0' && c <= '9';
}

bool is_name_char(char c) {
  return is_digit(c) || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'
         || static_cast<unsigned char>(c) >= 0x80;
}

/// Python's rstrip(): how much of the text is left.
std::size_t end_without_space(std::string_view text) {
  std::size_t end = 0;
  for (std::size_t pos = 0; pos < text.size();) {
    const utf8_char c = decode_utf8(text, pos);
    pos += c.size;
    if (!is_python_space(c.code_point))
      end = pos;
  }
  return end;
}

std::size_t skip_space(std::string_view text, std::size_t pos) {
  while (pos < text.size()) {
    const utf8_char c = decode_utf8(text, pos);
    if (!is_python_space(c.code_point))
      break;
    pos += c.size;
  }
  return pos;
}

/// One kind of line end, and none at the very end.
std::string normalize_lines(std::string_view source) {
  std::string out;
  out.reserve(source.size());
  for (std::size_t i = 0; i < source.size(); ++i) {
    if (source[i] == '\r') {
      out += '\n';
      if (i + 1 < source.size() && source[i + 1] == '\n')
        ++i;
    } else {
      out += source[i];
    }
  }
  if (out.ends_with('\n'))
    out.pop_back();
  return out;
}

class lexer {
public:
  explicit lexer(std::string source) : source_(std::move(source)), text_(source_) {}

  std::vector<token> run() {
    while (pos_ < text_.size()) {
      const std::size_t tag = find_tag(pos_);
      if (tag == npos) {
        add_text(text_.substr(pos_));
        advance(text_.size());
        break;
      }
      read_tag(tag);
    }
    add(token_kind::end, "");
    return std::move(tokens_);
  }

private:
  static constexpr std::size_t npos = std::string_view::npos;

  [[noreturn]] void fail(std::string what) const { throw failure{std::move(what), line_}; }

  bool at(std::size_t pos, std::string_view expected) const {
    return text_.substr(pos, expected.size()) == expected;
  }

  void add(token_kind kind, std::string text) { tokens_.push_back({kind, std::move(text), line_}); }

  void add_text(std::string_view text) {
    if (!text.empty())
      add(token_kind::text, std::string(text));
  }

  void advance(std::size_t to) {
    line_ += static_cast<int>(std::count(text_.begin() + static_cast<std::ptrdiff_t>(pos_),
                                         text_.begin() + static_cast<std::ptrdiff_t>(to), '\n'));
    pos_ = to;
  }

  std::size_t find_tag(std::size_t from) const {
    for (std::size_t i = text_.find('{', from); i != npos; i = text_.find('{', i + 1))
      if (at(i, "{{") || at(i, "{%") || at(i, "{#"))
        return i;
    return npos;
  }

  /// Adds the text before a tag, without the white space that the tag takes away: all of it for
  /// a '-', and for blocks and comments that of their own line.
  void add_text_before(std::string_view text, char sign, bool is_output) {
    if (sign == '-') {
      text = text.substr(0, end_without_space(text));
    } else if (sign != '+' && !is_output) {
      const std::size_t newline = text.rfind('\n');
      const std::size_t line_start = newline == npos ? 0 : newline + 1;
      if ((newline != npos || line_starting_) && line_start < text.size()
          && skip_space(text, line_start) == text.size())
        text = text.substr(0, line_start);
    }
    add_text(text);
  }

  /// Goes on after a tag: a '-' takes the white space after it, a block or comment one newline.
  void close(std::size_t end, char sign, bool trim_newline) {
    if (sign == '-')
      end = skip_space(text_, end);
    else if (sign != '+' && trim_newline && end < text_.size() && text_[end] == '\n')
      ++end;
    line_starting_ = text_[end - 1] == '\n';
    advance(end);
  }

  void read_tag(std::size_t tag) {
    const std::string_view before = text_.substr(pos_, tag - pos_);
    const char sign = tag + 2 < text_.size() && (text_[tag + 2] == '-' || text_[tag + 2] == '+')
                        ? text_[tag + 2]
                        : '\0';
    const std::size_t inside = tag + (sign != '\0' ? 3 : 2);
    if (at(tag, "{#")) {
      add_text_before(before, sign, false);
      advance(tag);
      const std::size_t end = text_.find("#}", inside);
      if (end == npos)
        fail("a comment {# is not closed");
      const char last = end > inside ? text_[end - 1] : '\0';
      close(end + 2, last == '-' || last == '+' ? last : '\0', true);
      return;
    }
    const bool is_output = at(tag, "{{");
    if (!is_output) {
      const std::size_t word = skip_space(text_, inside);
      if (at(word, "raw")) {
        const std::size_t after = skip_space(text_, word + 3);
        if (at(after, "%}") || at(after, "-%}")) {
          add_text_before(before, sign, false);
          advance(tag);
          read_raw(after);
          return;
        }
      }
    }
    add_text_before(before, sign, is_output);
    advance(tag);
    add(is_output ? token_kind::output_begin : token_kind::block_begin, "");
    advance(inside);
    read_expression(is_output);
  }

  /// `{% raw %}`: everything up to `{% endraw %}` is text. `end` is where the tag closes.
  void read_raw(std::size_t end) {
    const bool strips = text_[end] == '-';
    advance(strips ? skip_space(text_, end + 3) : end + 2);
    line_starting_ = text_[pos_ - 1] == '\n';
    for (std::size_t tag = text_.find("{%", pos_); tag != npos; tag = text_.find("{%", tag + 1)) {
      std::size_t i = tag + 2;
      char sign = '\0';
      if (i < text_.size() && (text_[i] == '-' || text_[i] == '+'))
        sign = text_[i++];
      i = skip_space(text_, i);
      if (!at(i, "endraw"))
        continue;
      i = skip_space(text_, i + 6);
      const char last = i < text_.size() && (text_[i] == '-' || text_[i] == '+') ? text_[i] : '\0';
      if (last != '\0')
        ++i;
      if (!at(i, "%}"))
        continue;
      add_text_before(text_.substr(pos_, tag - pos_), sign, false);
      close(i + 2, last, true);
      return;
    }
    fail("{% raw %} has no {% endraw %}");
  }

  void read_expression(bool is_output) {
    const std::string_view closing = is_output ? "}}" : "%}";
    std::string open; // brackets that are not closed yet
    while (true) {
      advance(skip_space(text_, pos_));
      if (pos_ >= text_.size())
        fail(is_output ? "{{ is not closed" : "{% is not closed");
      if (open.empty()) {
        const char sign =
          text_[pos_] == '-' || (text_[pos_] == '+' && !is_output) ? text_[pos_] : '\0';
        const std::size_t end = pos_ + (sign != '\0' ? 1 : 0);
        if (at(end, closing)) {
          add(is_output ? token_kind::output_end : token_kind::block_end, "");
          close(end + 2, sign, !is_output);
          return;
        }
      }
      const char c = text_[pos_];
      if (is_digit(c))
        read_number();
      else if (is_name_char(c))
        read_name();
      else if (c == '\'' || c == '"')
        read_string(c);
      else
        read_symbol(open);
    }
  }

  void read_name() {
    std::size_t end = pos_;
    while (end < text_.size() && is_name_char(text_[end]))
      ++end;
    add(token_kind::name, std::string(text_.substr(pos_, end - pos_)));
    advance(end);
  }

  void read_number() {
    std::string digits;
    std::size_t end = pos_;
    const auto read_digits = [&] {
      while (end < text_.size() && (is_digit(text_[end]) || text_[end] == '_')) {
        if (text_[end] != '_')
          digits += text_[end];
        ++end;
      }
    };
    read_digits();
    bool is_real = false;
    // `messages.0.role` is two attributes, not the number 0.
    const bool after_dot = pos_ > 0 && text_[pos_ - 1] == '.';
    if (!after_dot && end + 1 < text_.size() && text_[end] == '.' && is_digit(text_[end + 1])) {
      is_real = true;
      digits += text_[end++];
      read_digits();
    }
    if (!after_dot && end < text_.size() && (text_[end] == 'e' || text_[end] == 'E')) {
      std::size_t exponent = end + 1;
      if (exponent < text_.size() && (text_[exponent] == '+' || text_[exponent] == '-'))
        ++exponent;
      if (exponent < text_.size() && is_digit(text_[exponent])) {
        is_real = true;
        digits += text_.substr(end, exponent - end);
        end = exponent;
        read_digits();
      }
    }
    if (end < text_.size() && is_name_char(text_[end]))
      fail(fmt::format("{} is not a number", text_.substr(pos_, end + 1 - pos_)));
    add(is_real ? token_kind::real : token_kind::integer, digits);
    advance(end);
  }

  void read_string(char quote) {
    std::string out;
    std::size_t i = pos_ + 1;
    for (; i < text_.size() && text_[i] != quote; ++i) {
      if (text_[i] != '\\') {
        out += text_[i];
        continue;
      }
      if (++i >= text_.size())
        break;
      i = read_escape(i, out);
    }
    if (i >= text_.size())
      fail("a string is not closed");
    add(token_kind::string, std::move(out));
    advance(i + 1);
  }

  /// The escape whose letter is at `i`, as in a Python string; returns its last position.
  std::size_t read_escape(std::size_t i, std::string& out) const {
    const auto read_code = [&](std::size_t first, std::size_t count, unsigned base) {
      char32_t code = 0;
      for (std::size_t k = first; k < first + count; ++k) {
        const char c = k < text_.size() ? text_[k] : '\0';
        const unsigned digit = is_digit(c)            ? static_cast<unsigned>(c - '0')
                               : c >= 'a' && c <= 'f' ? static_cast<unsigned>(c - 'a' + 10)
                               : c >= 'A' && c <= 'F' ? static_cast<unsigned>(c - 'A' + 10)
                                                      : 99;
        if (digit >= base)
          fail("a string has a damaged escape");
        code = code * base + digit;
      }
      if (code > 0x10FFFF || (code >= 0xD800 && code <= 0xDFFF))
        fail("a string has an escape that is no character");
      append_utf8(out, code);
    };
    switch (text_[i]) {
    case '\n': return i;
    case '\\': out += '\\'; return i;
    case '\'': out += '\''; return i;
    case '"': out += '"'; return i;
    case 'a': out += '\a'; return i;
    case 'b': out += '\b'; return i;
    case 'f': out += '\f'; return i;
    case 'n': out += '\n'; return i;
    case 'r': out += '\r'; return i;
    case 't': out += '\t'; return i;
    case 'v': out += '\v'; return i;
    case 'x': read_code(i + 1, 2, 16); return i + 2;
    case 'u': read_code(i + 1, 4, 16); return i + 4;
    case 'U': read_code(i + 1, 8, 16); return i + 8;
    default: break;
    }
    if (text_[i] >= '0' && text_[i] <= '7') {
      std::size_t count = 1;
      while (count < 3 && i + count < text_.size() && text_[i + count] >= '0'
             && text_[i + count] <= '7')
        ++count;
      read_code(i, count, 8);
      return i + count - 1;
    }
    out += '\\';
    out += text_[i];
    return i;
  }

  void read_symbol(std::string& open) {
    constexpr std::string_view two[] = {"==", "!=", ">=", "<=", "//", "**"};
    constexpr std::string_view one = "+-*/%~[](){}<>=.:|,";
    for (const std::string_view symbol : two) {
      if (at(pos_, symbol)) {
        add(token_kind::symbol, std::string(symbol));
        advance(pos_ + 2);
        return;
      }
    }
    const char c = text_[pos_];
    if (one.find(c) == npos)
      fail(fmt::format("unexpected character '{}'",
                       text_.substr(pos_, decode_utf8(text_, pos_).size)));
    if (c == '(' || c == '[' || c == '{') {
      open += c == '(' ? ')' : c == '[' ? ']' : '}';
    } else if (c == ')' || c == ']' || c == '}') {
      if (open.empty() || open.back() != c)
        fail(fmt::format("unexpected '{}'", c));
      open.pop_back();
    }
    add(token_kind::symbol, std::string(1, c));
    advance(pos_ + 1);
  }

  std::string source_;
  std::string_view text_;
  std::size_t pos_ = 0;
  int line_ = 1;
  bool line_starting_ = true; // the text starts at the start of a line
  std::vector<token> tokens_;
};

} // namespace

std::vector<token> tokenize(std::string_view source) {
  return lexer(normalize_lines(source)).run();
}

} // namespace troupe::model::jinja
