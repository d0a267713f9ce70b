#pragma once

#include "troupe/base/error.hpp"

#include <memory>
#include <string_view>
#include <vector>

namespace troupe::model {

/// The regular-expression part of a pre-tokenizer: each pattern cuts the pieces of the one
/// before it into its matches and what lies between them ("Split, Isolated" in
/// tokenizer.json). Immutable once made and safe to use from several threads: what a match
/// writes to belongs to the call.
class regex_splitter {
public:
  regex_splitter();
  ~regex_splitter();
  regex_splitter(regex_splitter&&) noexcept;
  regex_splitter& operator=(regex_splitter&&) noexcept;

  /// Adds a pattern after those before. Fails with invalid_model naming the pattern.
  expected<void> add(std::string_view pattern);

  /// What one call of `split` works in; make one a call or a thread.
  class scratch {
  public:
    scratch();
    ~scratch();

  private:
    friend class regex_splitter;
    struct state;
    std::unique_ptr<state> state_;
  };

  /// Cuts `text` (valid UTF-8) into `pieces` (cleared first), which together are the text.
  /// Fails with invalid_request where PCRE2 gives up (its match limit).
  expected<void> split(std::string_view text, scratch& s,
                       std::vector<std::string_view>& pieces) const;

private:
  struct pattern;
  std::vector<std::unique_ptr<const pattern>> patterns_;
};

} // namespace troupe::model
