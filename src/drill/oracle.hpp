#pragma once

#include "troupe/base/error.hpp"

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

namespace troupe::drill {

/// A conversation whose answer is known.
struct conversation {
  std::string question;
  std::vector<std::int32_t> prompt;
  std::vector<std::int32_t> tokens; ///< the greedy answer
};

/// Reads golden.json of a model directory. Fails with not_found or invalid_model.
expected<std::vector<conversation>> load_golden(const std::filesystem::path& model_directory);

/// How an answer differs from the known one, token by token.
struct difference {
  std::size_t lost = 0;       ///< tokens that did not come
  std::size_t duplicated = 0; ///< tokens that are too many
  std::size_t wrong = 0;      ///< tokens in place of others
  std::size_t index = 0;      ///< of the first difference

  bool any() const { return lost + duplicated + wrong > 0; }
  std::string text() const;
};

/// Aligns the two with the fewest changes (Levenshtein): what was inserted is duplicated, what
/// was deleted is lost, what was replaced is wrong.
difference compare(std::span<const std::int32_t> golden, std::span<const std::int32_t> received);

} // namespace troupe::drill
