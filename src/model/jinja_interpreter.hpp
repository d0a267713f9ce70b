#pragma once

#include "troupe/model/jinja_ast.hpp"

#include <ctime>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace troupe::model::jinja {

/// Runs a parsed template over variables and returns the text. Does at most the work that
/// `cost` allows; to it the time is `now`. Throws `failure` with the line of the statement that
/// failed.
std::string render(const node& root, std::vector<std::pair<std::string, value>> variables,
                   budget& cost, std::time_t now);

} // namespace troupe::model::jinja
