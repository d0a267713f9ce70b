#include "troupe/model/json_shape.hpp"

#include <algorithm>
#include <array>

namespace troupe::model {

json_shape shape_of_json(std::string_view text) {
  json_shape shape;
  std::array<std::size_t, max_json_depth>
    commas{}; // of the open objects, by level; lists have none
  std::array<bool, max_json_depth> is_object{};
  std::size_t depth = 0;
  bool in_string = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\')
        ++i;
      else if (c == '"')
        in_string = false;
      continue;
    }
    switch (c) {
    case '"': in_string = true; break;
    case '[':
    case '{':
      if (depth < max_json_depth) {
        commas[depth] = 0;
        is_object[depth] = c == '{';
      }
      shape.depth = std::max(shape.depth, ++depth);
      break;
    case ',':
      if (depth > 0 && depth <= max_json_depth && is_object[depth - 1])
        shape.most_members = std::max(shape.most_members, ++commas[depth - 1] + 1);
      break;
    case ']':
    case '}':
      if (depth > 0)
        --depth;
      break;
    default: break;
    }
  }
  return shape;
}

} // namespace troupe::model
