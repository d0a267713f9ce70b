#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace troupe::model::jinja {

enum class token_kind {
  text,         ///< outside of tags
  output_begin, ///< {{
  output_end,   ///< }}
  block_begin,  ///< {%
  block_end,    ///< %}
  name,
  string, ///< text: its value, escapes resolved
  integer,
  real,
  symbol, ///< operators and brackets
  end,    ///< of the template
};

struct token {
  token_kind kind = token_kind::end;
  std::string text;
  int line = 1;
};

/// Cuts a template into tokens, as Jinja 3.1 does with trim_blocks and lstrip_blocks on and
/// keep_trailing_newline off; comments and raw blocks are resolved. The last token is `end`.
/// Throws `failure` with the line of what cannot be read.
std::vector<token> tokenize(std::string_view source);

} // namespace troupe::model::jinja
