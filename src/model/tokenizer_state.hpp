#pragma once

#include "troupe/model/tokenizer.hpp"
#include "troupe/model/tokenizer_added.hpp"
#include "troupe/model/tokenizer_bpe.hpp"
#include "troupe/model/tokenizer_split.hpp"

#include <unordered_map>

namespace troupe::model {

/// What a tokenizer holds; shared by reading (tokenizer_reader) and use.
struct tokenizer::state {
  struct token {
    std::uint32_t offset = 0; // into bytes
    std::uint32_t size = 0;
    bool exists = false;
    bool special = false;
  };

  regex_splitter splitter;
  byte_pair_encoder pairs;
  // Added tokens in the order they are looked for: those that match the text as it is, then
  // those marked `normalized`.
  added_token_finder finders[2];
  std::unordered_map<std::string, std::int32_t> added;
  std::vector<token> tokens; // by id
  std::string bytes;
  std::optional<std::int32_t> bos;
  std::optional<std::int32_t> eos;
  bool adds_bos = false;

  void set_token(std::int32_t id, std::string_view text, bool special);
};

} // namespace troupe::model
