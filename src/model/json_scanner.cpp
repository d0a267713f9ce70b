#include "troupe/model/json_scanner.hpp"

namespace troupe::model {

namespace {

bool is_space(char c) {
  return c == ' ' || c == '\t' || c == '\r' || c == '\n';
}

bool is_digit(char c) {
  return c >= '0' && c <= '9';
}

bool is_hex(char c) {
  return is_digit(c) || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F');
}

} // namespace

json_scanner::mark json_scanner::fail() {
  state_ = state::done;
  return mark::invalid;
}

json_scanner::mark json_scanner::open(bool is_object) {
  if (depth_ == is_object_.size())
    return fail();
  is_object_[depth_++] = is_object;
  state_ = is_object ? state::first_key : state::first_element;
  return mark::value_begin;
}

json_scanner::mark json_scanner::end_value() {
  state_ = state::after_value;
  return mark::value_end;
}

json_scanner::mark json_scanner::begin_value(char byte) {
  switch (byte) {
  case '{': return open(true);
  case '[': return open(false);
  case '"':
    is_key_ = false;
    state_ = state::string;
    return mark::value_begin;
  case 't': literal_left_ = "rue"; break;
  case 'f': literal_left_ = "alse"; break;
  case 'n': literal_left_ = "ull"; break;
  case '-': state_ = state::minus; return mark::value_begin;
  case '0': state_ = state::zero; return mark::value_begin;
  default:
    if (!is_digit(byte))
      return fail();
    state_ = state::integer;
    return mark::value_begin;
  }
  state_ = state::literal;
  return mark::value_begin;
}

/// Behind a value: a comma or the bracket that closes what it is in.
json_scanner::mark json_scanner::structure(char byte) {
  if (is_space(byte)) {
    state_ = state::after_value;
    return mark::none;
  }
  const bool in_object = is_object_[depth_ - 1];
  if (byte == ',') {
    state_ = in_object ? state::key : state::value;
    return mark::none;
  }
  if (byte != (in_object ? '}' : ']'))
    return fail();
  if (--depth_ > 0)
    return end_value();
  state_ = state::done;
  return mark::complete;
}

json_scanner::mark json_scanner::number(char byte) {
  switch (state_) {
  case state::minus:
  case state::integer:
    if (is_digit(byte)) {
      state_ = state_ == state::minus && byte == '0' ? state::zero : state::integer;
      return mark::none;
    }
    if (state_ == state::minus)
      return fail();
    [[fallthrough]];
  case state::zero:
    if (byte == '.')
      state_ = state::point;
    else if (byte == 'e' || byte == 'E')
      state_ = state::exponent;
    else
      return structure(byte);
    return mark::none;
  case state::point:
  case state::fraction:
    if (is_digit(byte))
      state_ = state::fraction;
    else if (state_ == state::point)
      return fail();
    else if (byte == 'e' || byte == 'E')
      state_ = state::exponent;
    else
      return structure(byte);
    return mark::none;
  case state::exponent:
    if (byte == '+' || byte == '-')
      state_ = state::exponent_sign;
    else if (is_digit(byte))
      state_ = state::exponent_digits;
    else
      return fail();
    return mark::none;
  default:
    if (is_digit(byte))
      state_ = state::exponent_digits;
    else if (state_ == state::exponent_sign)
      return fail();
    else
      return structure(byte);
    return mark::none;
  }
}

json_scanner::mark json_scanner::push(char byte) {
  switch (state_) {
  case state::start:
    if (byte != '{')
      return fail();
    open(true);
    return mark::none;
  case state::first_key:
  case state::key:
    if (is_space(byte))
      return mark::none;
    if (byte == '"') {
      is_key_ = true;
      state_ = state::string;
      return mark::key_begin;
    }
    return state_ == state::first_key ? structure(byte == ',' ? '\0' : byte) : fail();
  case state::colon:
    if (is_space(byte))
      return mark::none;
    if (byte != ':')
      return fail();
    state_ = state::value;
    return mark::none;
  case state::first_element:
    if (byte == ']')
      return structure(byte);
    [[fallthrough]];
  case state::value: return is_space(byte) ? mark::none : begin_value(byte);
  case state::after_value: return structure(byte);
  case state::string:
    if (byte == '\\') {
      state_ = state::escape;
    } else if (byte == '"') {
      if (!is_key_)
        return end_value();
      state_ = state::colon;
      return mark::key_end;
    }
    return mark::none;
  case state::escape:
    if (byte == 'u') {
      digits_left_ = 4;
      state_ = state::unicode;
      return mark::none;
    }
    if (std::string_view("\"\\/bfnrt").find(byte) == std::string_view::npos)
      return fail();
    state_ = state::string;
    return mark::none;
  case state::unicode:
    if (!is_hex(byte))
      return fail();
    if (--digits_left_ == 0)
      state_ = state::string;
    return mark::none;
  case state::literal:
    if (byte != literal_left_.front())
      return fail();
    literal_left_.remove_prefix(1);
    return literal_left_.empty() ? end_value() : mark::none;
  case state::done: return mark::invalid;
  default: return number(byte);
  }
}

} // namespace troupe::model
