#pragma once

#include "troupe/model/json_shape.hpp"

#include <bitset>
#include <cstdint>
#include <string_view>

namespace troupe::model {

/// Follows one JSON object byte by byte (RFC 8259) and says what each byte is. Strings may hold
/// raw control characters, which models do write. Allocates nothing; a copy goes on by itself.
class json_scanner {
public:
  enum class mark : std::uint8_t {
    none,
    key_begin,   ///< the opening quote of a member's name
    key_end,     ///< its closing quote
    value_begin, ///< the first byte of a member's value or an element
    value_end,   ///< the last byte of a string, list, object, true, false or null; not of a number
    complete,    ///< the brace that closes the object
    invalid,     ///< this cannot become an object
  };

  /// Takes the next byte; the first is to be '{'. After complete or invalid it stays invalid.
  mark push(char byte);

  /// Levels that are open after the last byte. The byte that closes a value counts as outside of
  /// it: the members of the object itself begin and end at depth 1 (but for the first byte of a
  /// list or object, which is at depth 2).
  std::size_t depth() const { return depth_; }

private:
  enum class state : std::uint8_t {
    start,
    first_key, ///< behind '{'
    key,
    colon,
    first_element, ///< behind '['
    value,
    after_value,
    string,
    escape,
    unicode,
    literal,
    minus,
    zero,
    integer,
    point,
    fraction,
    exponent,
    exponent_sign,
    exponent_digits,
    done,
  };

  mark begin_value(char byte);
  mark end_value();
  mark structure(char byte);
  mark number(char byte);
  mark open(bool is_object);
  mark fail();

  state state_ = state::start;
  bool is_key_ = false;           ///< the string is a member's name
  std::uint8_t digits_left_ = 0;  ///< of \uXXXX
  std::string_view literal_left_; ///< of true, false or null
  std::size_t depth_ = 0;
  std::bitset<max_json_depth> is_object_; ///< by level
};

} // namespace troupe::model
