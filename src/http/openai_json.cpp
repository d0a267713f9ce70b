#include "troupe/http/openai_json.hpp"

#include "troupe/model/unicode.hpp"

#include <fmt/format.h>

#include <iterator>

namespace troupe::http {

namespace {

bool is_plain(char c) {
  const auto byte = static_cast<unsigned char>(c);
  return byte >= 0x20 && byte < 0x80 && c != '"' && c != '\\';
}

void append_escaped(std::string& out, char c) {
  switch (c) {
  case '"': out += "\\\""; break;
  case '\\': out += "\\\\"; break;
  case '\n': out += "\\n"; break;
  case '\r': out += "\\r"; break;
  case '\t': out += "\\t"; break;
  case '\b': out += "\\b"; break;
  case '\f': out += "\\f"; break;
  default:
    fmt::format_to(std::back_inserter(out), "\\u{:04x}",
                   static_cast<unsigned>(static_cast<unsigned char>(c)));
  }
}

/// Appends the character at `pos`, which is no ASCII, and returns the bytes that it took.
std::size_t append_character(std::string& out, std::string_view text, std::size_t pos) {
  const model::utf8_char c = model::decode_utf8(text, pos);
  if (c.valid)
    out += text.substr(pos, c.size);
  else
    model::append_utf8(out, c.code_point);
  return c.size;
}

} // namespace

void append_json_string(std::string& out, std::string_view text) {
  out += '"';
  std::size_t pos = 0;
  while (pos < text.size()) {
    // Whole runs at once: nearly all text is plain ASCII.
    std::size_t end = pos;
    while (end < text.size() && is_plain(text[end]))
      ++end;
    out += text.substr(pos, end - pos);
    pos = end;
    if (pos == text.size())
      break;
    if (static_cast<unsigned char>(text[pos]) < 0x80)
      append_escaped(out, text[pos++]);
    else
      pos += append_character(out, text, pos);
  }
  out += '"';
}

void append_json_logprob(std::string& out, float logprob) {
  if (!(logprob > -9999.0F)) // also true for NaN
    out += "-9999.0";
  else
    fmt::format_to(std::back_inserter(out), "{}", logprob);
}

void append_valid_utf8(std::string& out, std::string_view text) {
  std::size_t pos = 0;
  while (pos < text.size()) {
    if (static_cast<unsigned char>(text[pos]) < 0x80)
      out += text[pos++];
    else
      pos += append_character(out, text, pos);
  }
}

} // namespace troupe::http
