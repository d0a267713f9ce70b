#include "troupe/model/tokenizer_split.hpp"

#include "troupe/model/unicode_pattern.hpp"

#include <fmt/format.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <array>
#include <string>

namespace troupe::model {

namespace {

struct pcre2_free {
  void operator()(pcre2_code* p) const { pcre2_code_free(p); }
  void operator()(pcre2_match_data* p) const { pcre2_match_data_free(p); }
  void operator()(pcre2_match_context* p) const { pcre2_match_context_free(p); }
  void operator()(pcre2_jit_stack* p) const { pcre2_jit_stack_free(p); }
};

std::string describe(int code) {
  std::array<PCRE2_UCHAR, 256> text{};
  pcre2_get_error_message(code, text.data(), text.size());
  return reinterpret_cast<const char*>(text.data());
}

} // namespace

struct regex_splitter::pattern {
  std::string source;
  std::unique_ptr<pcre2_code, pcre2_free> code;
};

struct regex_splitter::scratch::state {
  std::unique_ptr<pcre2_match_data, pcre2_free> match{pcre2_match_data_create(1, nullptr)};
  std::unique_ptr<pcre2_match_context, pcre2_free> context{pcre2_match_context_create(nullptr)};
  std::unique_ptr<pcre2_jit_stack, pcre2_free> stack{
    pcre2_jit_stack_create(32 * 1024, 4 * 1024 * 1024, nullptr)};
  std::vector<std::string_view> pieces;

  state() { pcre2_jit_stack_assign(context.get(), nullptr, stack.get()); }
};

regex_splitter::scratch::scratch() : state_(std::make_unique<state>()) {}
regex_splitter::scratch::~scratch() = default;

regex_splitter::regex_splitter() = default;
regex_splitter::~regex_splitter() = default;
regex_splitter::regex_splitter(regex_splitter&&) noexcept = default;
regex_splitter& regex_splitter::operator=(regex_splitter&&) noexcept = default;

expected<void> regex_splitter::add(std::string_view source) {
  auto translated = translate_pattern(source);
  if (!translated)
    return tl::unexpected(std::move(translated.error()));
  int code = 0;
  PCRE2_SIZE offset = 0;
  auto compiled = std::make_unique<pattern>();
  compiled->source = source;
  compiled->code.reset(
    pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated->data()), translated->size(),
                  PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &code, &offset, nullptr));
  if (!compiled->code)
    return fail(error_code::invalid_model,
                fmt::format("regular expression {} does not compile: {}", source, describe(code)));
  // Without JIT (some sandboxes forbid executable pages) the same matches come out, slower.
  pcre2_jit_compile(compiled->code.get(), PCRE2_JIT_COMPLETE);
  patterns_.push_back(std::move(compiled));
  return {};
}

expected<void> regex_splitter::split(std::string_view text, scratch& s,
                                     std::vector<std::string_view>& pieces) const {
  pieces.clear();
  if (text.empty())
    return {};
  pieces.push_back(text);
  auto& state = *s.state_;
  for (const auto& p : patterns_) {
    state.pieces.swap(pieces);
    pieces.clear();
    for (const std::string_view piece : state.pieces) {
      std::size_t done = 0;
      std::size_t from = 0;
      while (from < piece.size()) {
        const int rc =
          pcre2_match(p->code.get(), reinterpret_cast<PCRE2_SPTR>(piece.data()), piece.size(), from,
                      PCRE2_NO_UTF_CHECK, state.match.get(), state.context.get());
        if (rc == PCRE2_ERROR_NOMATCH)
          break;
        if (rc < 0)
          return fail(error_code::invalid_request,
                      fmt::format("the text cannot be split by {}: {}", p->source, describe(rc)));
        const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer(state.match.get());
        const std::size_t first = bounds[0];
        const std::size_t last = bounds[1];
        if (last <= first) { // an empty match cuts nothing; go on at the next character
          from = first + 1;
          while (from < piece.size() && (static_cast<unsigned char>(piece[from]) & 0xC0U) == 0x80)
            ++from;
          continue;
        }
        if (first > done)
          pieces.push_back(piece.substr(done, first - done));
        pieces.push_back(piece.substr(first, last - first));
        done = last;
        from = last;
      }
      if (done < piece.size())
        pieces.push_back(piece.substr(done));
    }
  }
  return {};
}

} // namespace troupe::model
