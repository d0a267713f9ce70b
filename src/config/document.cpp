#include "troupe/config/document.hpp"

#include <algorithm>
#include <exception>
#include <map>
#include <optional>
#include <sstream>
#include <string>

#include <fmt/format.h>
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/mark.h>
#include <yaml-cpp/parser.h>

namespace troupe::config {

namespace {

position position_of(const YAML::Mark& mark) {
  return {mark.line + 1, mark.column + 1};
}

/// Bytes of the UTF-8 sequence that `text` starts with, 0 when it is not one
/// (RFC 3629: no surrogates, no overlong forms, nothing above U+10FFFF).
std::size_t sequence_length(std::string_view text) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const auto continues = [&](std::size_t i, unsigned low, unsigned high) {
    return i < text.size() && byte(i) >= low && byte(i) <= high;
  };
  const unsigned first = byte(0);
  if (first < 0x80)
    return 1;
  if (first >= 0xC2 && first <= 0xDF)
    return continues(1, 0x80, 0xBF) ? 2 : 0;
  if (first >= 0xE0 && first <= 0xEF) {
    const unsigned low = first == 0xE0 ? 0xA0 : 0x80;
    const unsigned high = first == 0xED ? 0x9F : 0xBF;
    return continues(1, low, high) && continues(2, 0x80, 0xBF) ? 3 : 0;
  }
  if (first >= 0xF0 && first <= 0xF4) {
    const unsigned low = first == 0xF0 ? 0x90 : 0x80;
    const unsigned high = first == 0xF4 ? 0x8F : 0xBF;
    return continues(1, low, high) && continues(2, 0x80, 0xBF) && continues(3, 0x80, 0xBF) ? 4 : 0;
  }
  return 0;
}

/// Leaves the parser from within, with words of our own.
struct refusal : YAML::ParserException {
  using ParserException::ParserException;
};

bool is_indented_by_tab(std::string_view text, int line) {
  for (; line > 1 && !text.empty(); --line)
    text.remove_prefix(std::min(text.find('\n'), text.size() - 1) + 1);
  return text.substr(0, text.find_first_not_of(" \t")).find('\t') != std::string_view::npos;
}

class builder final : public YAML::EventHandler {
public:
  value_ptr root() const { return root_; }

  /// Where the last quoted text began.
  position last_quote() const { return last_quote_; }

  void OnDocumentStart(const YAML::Mark& mark) override {
    if (started_)
      refuse(mark, "a second YAML document starts here; keep one document a file");
    started_ = true;
  }

  void OnDocumentEnd() override {}

  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    if (!open_.empty() && open_.back().made->kind == value_kind::map && !open_.back().key)
      refuse(mark, "an empty key; write KEY: VALUE");
    auto made = start(value_kind::nothing, mark, "?");
    // Where nothing is written, the key is what a reader can find.
    if (!open_.empty() && open_.back().key)
      made->at = open_.back().key->at;
    finish(std::move(made), anchor, mark);
  }

  void OnAlias(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    const auto known = anchors_.find(anchor);
    if (known == anchors_.end())
      refuse(mark, "this alias (*) stands inside its own anchor (&); write the value out");
    add(known->second, mark);
  }

  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& text) override {
    auto made = start(value_kind::scalar, mark, tag);
    made->text = text;
    if (tag == "!")
      last_quote_ = made->at;
    made->style =
      tag == "!" || tag == "tag:yaml.org,2002:str" ? scalar_style::quoted : scalar_style::plain;
    finish(std::move(made), anchor, mark);
  }

  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    open_.push_back({start(value_kind::list, mark, tag), anchor, mark, {}});
  }

  void OnSequenceEnd() override { close(); }

  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    open_.push_back({start(value_kind::map, mark, tag), anchor, mark, {}});
  }

  void OnMapEnd() override { close(); }

private:
  struct collection {
    std::shared_ptr<value> made;
    YAML::anchor_t anchor;
    YAML::Mark mark;
    std::optional<map_entry> key; ///< of the entry whose value comes next
  };

  [[noreturn]] static void refuse(const YAML::Mark& mark, const std::string& why) {
    throw refusal(mark, why);
  }

  std::shared_ptr<value> start(value_kind kind, const YAML::Mark& mark, const std::string& tag) {
    constexpr std::string_view standard = "tag:yaml.org,2002:";
    if (!tag.empty() && tag != "?" && tag != "!" && !tag.starts_with(standard))
      refuse(mark, fmt::format("the tag {} means nothing here; remove it", tag));
    if (++num_made_ > max_document_values)
      refuse(mark, too_many());
    auto made = std::make_shared<value>();
    made->kind = kind;
    made->at = position_of(mark);
    return made;
  }

  void finish(std::shared_ptr<value> made, YAML::anchor_t anchor, const YAML::Mark& mark) {
    if (anchor != YAML::NullAnchor)
      anchors_[anchor] = made;
    add(std::move(made), mark);
  }

  void close() {
    collection done = std::move(open_.back());
    open_.pop_back();
    finish(std::move(done.made), done.anchor, done.mark);
  }

  void add(value_ptr made, const YAML::Mark& mark) {
    if (open_.empty()) {
      root_ = std::move(made);
      return;
    }
    collection& parent = open_.back();
    if (parent.made->kind == value_kind::map && !parent.key) {
      if (made->kind != value_kind::scalar)
        refuse(mark, "a key is a list or a mapping; write KEY: VALUE with a plain word as key");
      parent.key = map_entry{made->text, position_of(mark), nullptr};
      return;
    }
    parent.made->num_values += made->num_values;
    if (parent.made->num_values > max_document_values)
      refuse(mark, too_many());
    if (parent.made->kind == value_kind::list) {
      parent.made->items.push_back(std::move(made));
      return;
    }
    parent.key->content = std::move(made);
    parent.made->entries.push_back(std::move(*parent.key));
    parent.key.reset();
  }

  static std::string too_many() {
    return fmt::format("more than {} values, aliases (*) written out; no cluster needs that many",
                       max_document_values);
  }

  bool started_ = false;
  position last_quote_;
  std::size_t num_made_ = 0;
  value_ptr root_ = std::make_shared<value>();
  std::vector<collection> open_;
  std::map<YAML::anchor_t, value_ptr> anchors_;
};

void run(const std::string& text, builder& made) {
  std::istringstream stream(text);
  YAML::Parser parser(stream);
  while (parser.HandleNextDocument(made)) {
  }
}

} // namespace

std::optional<syntax_error> check_text(std::string_view text) {
  position at{1, 1};
  while (!text.empty()) {
    const auto first = static_cast<unsigned char>(text.front());
    const std::size_t length = sequence_length(text);
    if (length == 0)
      return syntax_error{at, fmt::format("byte 0x{:02X} is not UTF-8; write UTF-8", first)};
    if ((first < 0x20 && first != '\t' && first != '\n' && first != '\r') || first == 0x7F)
      return syntax_error{at, fmt::format("control character 0x{:02X}; remove it", first)};
    at = first == '\n' ? position{at.line + 1, 1}
                       : position{at.line, at.column + static_cast<int>(length)};
    text.remove_prefix(length);
  }
  return std::nullopt;
}

const map_entry* value::find(std::string_view key) const {
  const auto found = std::ranges::find(entries, key, &map_entry::key);
  return found == entries.end() ? nullptr : &*found;
}

tl::expected<value_ptr, syntax_error> read_document(std::string_view text) {
  if (text.size() > max_document_bytes)
    return tl::unexpected(syntax_error{
      {},
      fmt::format("{} bytes are too many; at most {} are read", text.size(), max_document_bytes)});
  // yaml-cpp guesses other encodings and takes byte 4 for the end of the file.
  if (auto bad = check_text(text))
    return tl::unexpected(std::move(*bad));
  try {
    builder made;
    run(fmt::format("{}\n", text), made);
    // yaml-cpp lets a file end within a quoted text, but no document.
    try {
      builder ignored;
      run(fmt::format("{}\n...\n", text), ignored);
    } catch (const YAML::Exception&) {
      return tl::unexpected(syntax_error{made.last_quote(), "this quoted text is never closed"});
    }
    return made.root();
  } catch (const refusal& broken) {
    return tl::unexpected(syntax_error{position_of(broken.mark), broken.msg});
  } catch (const YAML::Exception& broken) {
    if (broken.mark.is_null())
      return tl::unexpected(syntax_error{{}, broken.msg});
    const position at = position_of(broken.mark);
    const std::string_view cure =
      is_indented_by_tab(text, at.line)
        ? "indent with spaces, not tabs"
        : "check indentation, brackets and quotes here and in the line before";
    return tl::unexpected(syntax_error{at, fmt::format("{}; {}", broken.msg, cure)});
  } catch (const std::exception& broken) {
    return tl::unexpected(syntax_error{{}, broken.what()});
  }
}

} // namespace troupe::config
