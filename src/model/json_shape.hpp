#pragma once

#include <cstddef>
#include <string_view>

namespace troupe::model {

/// What a JSON text asks of who reads it.
struct json_shape {
  std::size_t depth = 0;        ///< levels of lists and objects
  std::size_t most_members = 0; ///< elements of the longest object; lists do not count
};

/// Nesting that no sensible text reaches; deeper ones could overflow the stack of a reader.
inline constexpr std::size_t max_json_depth = 64;

/// Members of one object. Objects that keep the order of their keys find them one by one, so
/// that an object of a megabyte would take seconds to read.
inline constexpr std::size_t max_json_members = 1024;

/// Looks at the brackets and commas outside of strings, in one pass: what is not JSON is left for
/// a parser to refuse. Pure.
json_shape shape_of_json(std::string_view text);

} // namespace troupe::model
