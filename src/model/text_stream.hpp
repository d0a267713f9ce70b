#pragma once

#include "troupe/model/tokenizer.hpp"
#include "troupe/model/unicode.hpp"

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace troupe::model {

struct text_stream_options {
  bool skip_special = true; ///< leave special tokens (EOS, turns) out of the text
  /// Texts that end the output, which is cut before the first of them to be complete (of two
  /// that are complete at once, before the longer one). Empty strings never match.
  std::vector<std::string> stop;
  bool include_stop = false;    ///< cut after the stop string instead of before it
  std::uint32_t min_tokens = 0; ///< stop strings that end within so many tokens do not count
  /// Split the text as a model that thinks first writes it: all up to `</think>` is reasoning,
  /// whether or not the output opens with `<think>`; what follows is content. The two tags are
  /// left out. Where it is off, all is content and tags are ordinary text.
  bool split_reasoning = false;
  /// With split_reasoning: whether the prompt has opened the reasoning. Otherwise there is some
  /// only where the output itself begins with `<think>`.
  bool reasoning_open = true;
  /// Special tokens that stay in the text.
  std::vector<std::string> shown;
};

/// What one token added. Either part may be empty: text is held back while it may be the start
/// of a stop string, of a tag, or of a character.
struct text_delta {
  std::string reasoning;
  std::string content;
  bool stopped = false; ///< a stop string is complete: the request is to end
};

/// Turns the generated tokens of one request into text. However the text is cut into tokens, the
/// pieces put together are the same. Pure and single-threaded; allocates only while its strings
/// grow. The tokenizer must outlive it.
class text_stream {
public:
  text_stream(const tokenizer& t, text_stream_options options);

  /// Takes the next token; one without text (or that the tokenizer lacks) adds nothing. The
  /// result is valid until the next call. After a stop it stays empty and `stopped`.
  const text_delta& push(std::int32_t token);

  /// Ends the stream and releases what was held back. An unfinished character becomes U+FFFD.
  /// This may complete a stop string. Further calls add nothing.
  const text_delta& finish();

  bool stopped() const { return delta_.stopped; }

  /// The stop string that ended the text; empty before.
  std::string_view matched_stop() const { return matched_; }

  /// True while text counts as reasoning (for counting its tokens). Never with split_reasoning
  /// off.
  bool in_reasoning() const { return in_reasoning_ && !undecided_; }

private:
  /// A stop string with its prefix function (Knuth, Morris and Pratt) and how much of it the
  /// text so far ends with.
  struct matcher {
    std::string text;
    std::vector<std::uint32_t> fallback; // by matched length
    std::uint32_t matched = 0;

    explicit matcher(std::string stop);
    void push(char byte);
    bool complete() const { return matched == text.size(); }
  };

  void take_text();
  void release(std::size_t size);
  void split(char byte);
  void decide(char byte);
  void flush_tag();

  const tokenizer* tokenizer_;
  bool skip_special_;
  bool include_stop_;
  bool in_reasoning_;
  bool may_open_;  // `<think>` has not been seen
  bool undecided_; // only `<think>` begins the reasoning
  bool finished_ = false;
  std::uint32_t min_tokens_;
  std::uint32_t num_tokens_ = 0;
  std::vector<std::int32_t> shown_ids_; // text even where they are special: tags, for the splitter
  std::vector<matcher> stops_;
  utf8_replacer replacer_;
  std::string text_; // valid UTF-8 of this call
  std::string held_; // may be the start of a stop string
  std::string tag_;  // may be the start of a tag
  std::string matched_;
  text_delta delta_;
};

/// What a prompt says about reasoning, by its last text.
enum class reasoning_start : std::uint8_t {
  open,   ///< `<think>`: the output begins inside
  closed, ///< `</think>`: a template that turns thinking off
  unsaid, ///< neither
};
reasoning_start reasoning_after(std::string_view prompt);

} // namespace troupe::model
