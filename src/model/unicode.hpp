#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace troupe::model {

/// One code point read from UTF-8 text.
struct utf8_char {
  char32_t code_point = 0; ///< U+FFFD where the bytes are not valid
  std::uint32_t size = 0;  ///< bytes it takes; for invalid bytes, those one U+FFFD stands for
  bool valid = true;
};

/// Reads the code point at `pos`, which must be inside `text`. Invalid bytes are grouped as the
/// Unicode standard advises (section 3.9, "maximal subparts"), and as Python and Rust do it.
utf8_char decode_utf8(std::string_view text, std::size_t pos);

/// Offset of the first byte that is not part of valid UTF-8, or npos.
std::size_t find_invalid_utf8(std::string_view text);

/// Appends a code point; surrogates and values over U+10FFFF become U+FFFD.
void append_utf8(std::string& out, char32_t code_point);

/// Number of code points of valid UTF-8.
std::size_t count_code_points(std::string_view text);

/// What Python's str.isspace and its `\s` call white space.
bool is_python_space(char32_t code_point);

/// Turns a stream of bytes into valid UTF-8: an incomplete sequence is kept until its rest
/// arrives, and invalid ones become U+FFFD as with Python's errors="replace". However the bytes
/// are cut into pieces, the text is the same. Holds at most three bytes; never allocates itself.
class utf8_replacer {
public:
  /// Appends to `out` what `bytes` completes.
  void push(std::string_view bytes, std::string& out);

  /// Ends the stream: an incomplete sequence becomes one U+FFFD. Ready for a new stream after.
  void finish(std::string& out);

  bool has_pending() const { return num_pending_ > 0; }

private:
  std::array<char, 4> pending_{};
  std::uint8_t num_pending_ = 0;
  std::uint8_t num_missing_ = 0;
  unsigned char lower_ = 0x80; // what the next byte may be
  unsigned char upper_ = 0xBF;
};

/// GPT-2's visible stand-in for each byte, as byte-level BPE vocabularies write them: printable
/// Latin-1 stands for itself, the others are U+0100 and up in order (encoder.py of GPT-2).
char32_t byte_to_symbol(unsigned char byte);

/// The byte a stand-in means, or -1.
int symbol_to_byte(char32_t symbol);

} // namespace troupe::model
