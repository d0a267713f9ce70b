#include "troupe/model/unicode.hpp"

namespace troupe::model {

namespace {

constexpr std::string_view replacement = "\xEF\xBF\xBD";

/// What a lead byte announces: how many bytes follow, and what the first of them may be.
struct lead_byte {
  std::uint8_t num_following;
  unsigned char lower;
  unsigned char upper;
};

// Unicode standard, table 3-7. num_following 0 stands for a byte that cannot lead.
constexpr lead_byte classify(unsigned char byte) {
  if (byte >= 0xC2 && byte <= 0xDF)
    return {1, 0x80, 0xBF};
  if (byte == 0xE0)
    return {2, 0xA0, 0xBF};
  if (byte == 0xED)
    return {2, 0x80, 0x9F};
  if (byte >= 0xE1 && byte <= 0xEF)
    return {2, 0x80, 0xBF};
  if (byte == 0xF0)
    return {3, 0x90, 0xBF};
  if (byte >= 0xF1 && byte <= 0xF3)
    return {3, 0x80, 0xBF};
  if (byte == 0xF4)
    return {3, 0x80, 0x8F};
  return {0, 0x80, 0xBF};
}

struct byte_alphabet {
  std::array<char32_t, 256> symbols{};
  std::array<std::int16_t, 0x144> bytes{};

  constexpr byte_alphabet() {
    for (auto& byte : bytes)
      byte = -1;
    char32_t next = 0x100;
    for (int byte = 0; byte < 256; ++byte) {
      const bool visible =
        (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
      const char32_t symbol = visible ? static_cast<char32_t>(byte) : next++;
      symbols[static_cast<std::size_t>(byte)] = symbol;
      bytes[symbol] = static_cast<std::int16_t>(byte);
    }
  }
};

constexpr byte_alphabet alphabet;

} // namespace

utf8_char decode_utf8(std::string_view text, std::size_t pos) {
  const auto byte_at = [text](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = byte_at(pos);
  if (first < 0x80)
    return {first, 1, true};
  const lead_byte lead = classify(first);
  if (lead.num_following == 0)
    return {0xFFFD, 1, false};
  char32_t code_point = first & (0x3FU >> lead.num_following);
  for (std::uint32_t i = 1; i <= lead.num_following; ++i) {
    if (pos + i >= text.size())
      return {0xFFFD, i, false};
    const unsigned char byte = byte_at(pos + i);
    const unsigned char lower = i == 1 ? lead.lower : 0x80;
    const unsigned char upper = i == 1 ? lead.upper : 0xBF;
    if (byte < lower || byte > upper)
      return {0xFFFD, i, false};
    code_point = (code_point << 6U) | (byte & 0x3FU);
  }
  return {code_point, lead.num_following + 1U, true};
}

std::size_t find_invalid_utf8(std::string_view text) {
  for (std::size_t pos = 0; pos < text.size();) {
    const utf8_char c = decode_utf8(text, pos);
    if (!c.valid)
      return pos;
    pos += c.size;
  }
  return std::string_view::npos;
}

void append_utf8(std::string& out, char32_t code_point) {
  const auto put = [&out](char32_t byte) { out += static_cast<char>(byte); };
  if (code_point < 0x80) {
    put(code_point);
  } else if (code_point < 0x800) {
    put(0xC0 | (code_point >> 6U));
    put(0x80 | (code_point & 0x3F));
  } else if (code_point > 0x10FFFF || (code_point >= 0xD800 && code_point <= 0xDFFF)) {
    out += replacement;
  } else if (code_point < 0x10000) {
    put(0xE0 | (code_point >> 12U));
    put(0x80 | ((code_point >> 6U) & 0x3F));
    put(0x80 | (code_point & 0x3F));
  } else {
    put(0xF0 | (code_point >> 18U));
    put(0x80 | ((code_point >> 12U) & 0x3F));
    put(0x80 | ((code_point >> 6U) & 0x3F));
    put(0x80 | (code_point & 0x3F));
  }
}

std::size_t count_code_points(std::string_view text) {
  std::size_t count = 0;
  for (const char c : text)
    count += (static_cast<unsigned char>(c) & 0xC0U) != 0x80U ? 1 : 0;
  return count;
}

bool is_python_space(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0
         || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F
         || c == 0x205F || c == 0x3000;
}

void utf8_replacer::push(std::string_view bytes, std::string& out) {
  for (const char c : bytes) {
    const auto byte = static_cast<unsigned char>(c);
    if (num_missing_ > 0) {
      if (byte >= lower_ && byte <= upper_) {
        pending_[num_pending_++] = c;
        lower_ = 0x80;
        upper_ = 0xBF;
        if (--num_missing_ == 0) {
          out.append(pending_.data(), num_pending_);
          num_pending_ = 0;
        }
        continue;
      }
      finish(out); // the sequence broke off; this byte starts anew
    }
    if (byte < 0x80) {
      out += c;
      continue;
    }
    const lead_byte lead = classify(byte);
    if (lead.num_following == 0) {
      out += replacement;
      continue;
    }
    pending_[0] = c;
    num_pending_ = 1;
    num_missing_ = lead.num_following;
    lower_ = lead.lower;
    upper_ = lead.upper;
  }
}

void utf8_replacer::finish(std::string& out) {
  if (num_pending_ > 0)
    out += replacement;
  num_pending_ = 0;
  num_missing_ = 0;
}

char32_t byte_to_symbol(unsigned char byte) {
  return alphabet.symbols[byte];
}

int symbol_to_byte(char32_t symbol) {
  return symbol < alphabet.bytes.size() ? alphabet.bytes[symbol] : -1;
}

} // namespace troupe::model
