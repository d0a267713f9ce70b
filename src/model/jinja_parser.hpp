#pragma once

#include "troupe/model/jinja_ast.hpp"

#include <string_view>

namespace troupe::model::jinja {

/// Parses a template with the grammar of Jinja 3.1 as far as chat templates use it; the root is
/// a `sequence`. Throws `failure` with a line for syntax errors, for statements, filters and
/// tests that do not exist here, and for nesting too deep to be run safely.
node_ptr parse_template(std::string_view source);

} // namespace troupe::model::jinja
