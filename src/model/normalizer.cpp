#include "troupe/model/normalizer.hpp"

#include "troupe/model/unicode.hpp"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <vector>

namespace troupe::model {

namespace {

struct range {
  utf8proc_int32_t first;
  utf8proc_int32_t last;
};

// Marks with a combining class that were assigned in Unicode 10.0 to 15.0 (DerivedAge.txt,
// DerivedCombiningClass.txt), and U+11930, which composes since 13.0.
constexpr range later_marks[] = {
  {0x7FD, 0x7FD},     {0x898, 0x89F},     {0x8CA, 0x8D3},     {0x9FE, 0x9FE},
  {0xC3C, 0xC3C},     {0xD3B, 0xD3C},     {0xEBA, 0xEBA},     {0xECE, 0xECE},
  {0x1715, 0x1715},   {0x1ABF, 0x1ACE},   {0x1DF6, 0x1DFA},   {0xA82C, 0xA82C},
  {0x10D24, 0x10D27}, {0x10EAB, 0x10EAC}, {0x10EFD, 0x10EFF}, {0x10F46, 0x10F50},
  {0x10F82, 0x10F85}, {0x11070, 0x11070}, {0x1133B, 0x1133B}, {0x1145E, 0x1145E},
  {0x11839, 0x1183A}, {0x11930, 0x11930}, {0x1193D, 0x1193E}, {0x11943, 0x11943},
  {0x119E0, 0x119E0}, {0x11A34, 0x11A34}, {0x11A47, 0x11A47}, {0x11A99, 0x11A99},
  {0x11D42, 0x11D42}, {0x11D44, 0x11D45}, {0x11D97, 0x11D97}, {0x11F41, 0x11F42},
  {0x16FF0, 0x16FF1}, {0x1E08F, 0x1E08F}, {0x1E130, 0x1E136}, {0x1E2AE, 0x1E2AE},
  {0x1E2EC, 0x1E2EF}, {0x1E4EC, 0x1E4EF}};

// What U+11935 and U+11930 compose to since 13.0.
constexpr char32_t later_composite = 0x11938;

bool is_later_mark(utf8proc_int32_t code_point) {
  const auto* found =
    std::upper_bound(std::begin(later_marks), std::end(later_marks), code_point,
                     [](utf8proc_int32_t c, const range& r) { return c < r.first; });
  return found != std::begin(later_marks) && code_point <= (found - 1)->last;
}

/// What nothing before it composes with: a later mark, and U+11A7, which stands below the first
/// trailing consonant (Unicode 3.12, T index 0) and which utf8proc 2.8 swallows behind a syllable.
bool begins_anew(utf8proc_int32_t code_point) {
  return code_point == 0x11A7 || is_later_mark(code_point);
}

int combining_class(utf8proc_int32_t code_point) {
  if (code_point < 0x300)
    return 0;
  const int found = utf8proc_get_property(code_point)->combining_class;
  return found != 0 && is_later_mark(code_point) ? 0 : found;
}

/// Puts each run of marks in the order of their classes. (utf8proc does it as well, but in time
/// that grows with the square of the run.)
void order_marks(std::vector<utf8proc_int32_t>& code_points) {
  const auto is_starter = [](utf8proc_int32_t c) { return combining_class(c) == 0; };
  auto first = code_points.begin();
  while (first != code_points.end()) {
    first = std::find_if_not(first, code_points.end(), is_starter);
    const auto last = std::find_if(first, code_points.end(), is_starter);
    if (last - first > 1)
      std::stable_sort(first, last, [](utf8proc_int32_t a, utf8proc_int32_t b) {
        return combining_class(a) < combining_class(b);
      });
    first = last;
  }
}

} // namespace

std::string_view normalize_nfc(std::string_view text, std::string& buffer) {
  // U+0300 is the first code point that composes or decomposes with others: bytes CC 80.
  if (std::all_of(text.begin(), text.end(),
                  [](char c) { return static_cast<unsigned char>(c) < 0xCC; }))
    return text;
  std::vector<utf8proc_int32_t> code_points;
  code_points.reserve(text.size());
  for (std::size_t pos = 0; pos < text.size();) {
    const utf8_char c = decode_utf8(text, pos);
    pos += c.size;
    if (c.code_point < 0x80 || c.code_point == later_composite) {
      code_points.push_back(static_cast<utf8proc_int32_t>(c.code_point));
      continue;
    }
    std::array<utf8proc_int32_t, 8> parts{}; // no canonical decomposition is longer than four
    int boundary = 0;
    const auto count =
      utf8proc_decompose_char(static_cast<utf8proc_int32_t>(c.code_point), parts.data(),
                              parts.size(), UTF8PROC_DECOMPOSE, &boundary);
    code_points.insert(code_points.end(), parts.begin(), parts.begin() + count);
  }
  order_marks(code_points);
  buffer.clear();
  // Nothing composes across these, so what lies between them is composed by itself.
  for (auto first = code_points.begin(); first != code_points.end();) {
    const auto last = std::find_if(first + 1, code_points.end(), begins_anew);
    const auto size = utf8proc_normalize_utf32(
      &*first, last - first, static_cast<utf8proc_option_t>(UTF8PROC_COMPOSE | UTF8PROC_STABLE));
    std::for_each(first, first + size,
                  [&buffer](utf8proc_int32_t c) { append_utf8(buffer, static_cast<char32_t>(c)); });
    first = last;
  }
  return buffer;
}

} // namespace troupe::model
