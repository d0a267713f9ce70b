#pragma once

#include "troupe/base/error.hpp"

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace troupe::model {

struct encode_options {
  bool add_bos = false;
  /// Whether special tokens written out in the text become their ids. Where it is off they are
  /// ordinary text, so that a user cannot forge a turn. Added tokens that are not special
  /// (`<think>`) are found either way, as by Hugging Face's tokenizers.
  bool parse_special = true;
};

/// A byte-level BPE tokenizer read from Hugging Face's tokenizer.json and
/// tokenizer_config.json. Immutable: every const function may be called from any thread.
class tokenizer {
public:
  /// Reads `tokenizer.json` and, where there is one, `tokenizer_config.json` of a model
  /// directory. Fails with invalid_model naming the file and the key that is missing, damaged
  /// or not supported.
  static expected<tokenizer> load(const std::filesystem::path& model_dir);

  /// The same from the files' contents; `origin` stands for the directory in errors, and an
  /// empty `config_json` for a file that is not there.
  static expected<tokenizer> parse(std::string_view tokenizer_json, std::string_view config_json,
                                   std::string_view origin);

  ~tokenizer();
  tokenizer(tokenizer&&) noexcept;
  tokenizer& operator=(tokenizer&&) noexcept;

  /// The token ids of a text. Fails with invalid_request where it is not valid UTF-8 (the cause
  /// names the offset), over 1 GiB long, or where add_bos is asked of a model without BOS.
  expected<std::vector<std::int32_t>> encode(std::string_view text,
                                             const encode_options& options = {}) const;

  /// The text of token ids; bytes that are not UTF-8 become U+FFFD. Fails with invalid_request
  /// naming an id that has no token.
  expected<std::string> decode(std::span<const std::int32_t> ids, bool skip_special) const;

  /// The bytes a token stands for, which need not be whole characters; for an added token its
  /// text. Empty where the id has no token. Valid as long as the tokenizer.
  std::string_view token_bytes(std::int32_t id) const;

  /// False for ids out of range and for those that only pad a model's embedding.
  bool has_token(std::int32_t id) const;

  /// True for added tokens marked as special (BOS, turns), which are not shown to a reader.
  bool is_special(std::int32_t id) const;

  /// The id of an added token by its text, e.g. "</think>".
  std::optional<std::int32_t> added_token(std::string_view content) const;

  /// One more than the largest id. A model's own vocab_size may be larger (padding).
  std::int32_t vocab_size() const;

  std::optional<std::int32_t> bos_id() const;
  std::optional<std::int32_t> eos_id() const;

  /// `add_bos_token` of tokenizer_config.json: what raw completions want for add_bos. Text made
  /// by a chat template already starts with BOS.
  bool adds_bos() const;

private:
  friend class tokenizer_reader;
  struct state;
  explicit tokenizer(std::unique_ptr<const state> s);
  std::unique_ptr<const state> state_;
};

} // namespace troupe::model
