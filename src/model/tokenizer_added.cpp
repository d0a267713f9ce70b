#include "troupe/model/tokenizer_added.hpp"

namespace troupe::model {

added_token_finder::added_token_finder() : nodes_(1) {}

std::int32_t added_token_finder::child_of(std::int32_t index, char byte) const {
  for (const auto& [label, child] : nodes_[static_cast<std::size_t>(index)].children)
    if (label == byte)
      return child;
  return -1;
}

void added_token_finder::add(std::string_view content, std::int32_t token) {
  starts_[static_cast<unsigned char>(content.front())] = true;
  std::int32_t index = 0;
  for (const char byte : content) {
    std::int32_t child = child_of(index, byte);
    if (child < 0) {
      child = static_cast<std::int32_t>(nodes_.size());
      nodes_[static_cast<std::size_t>(index)].children.emplace_back(byte, child);
      nodes_.emplace_back();
    }
    index = child;
  }
  nodes_[static_cast<std::size_t>(index)].token = token;
}

std::optional<added_token_finder::match> added_token_finder::find(std::string_view text,
                                                                  std::size_t from) const {
  for (std::size_t begin = from; begin < text.size(); ++begin) {
    if (!starts_[static_cast<unsigned char>(text[begin])])
      continue;
    std::optional<match> longest;
    std::int32_t index = 0;
    for (std::size_t end = begin; end < text.size();) {
      index = child_of(index, text[end++]);
      if (index < 0)
        break;
      const std::int32_t token = nodes_[static_cast<std::size_t>(index)].token;
      if (token >= 0)
        longest = match{begin, end, token};
    }
    if (longest)
      return longest;
  }
  return std::nullopt;
}

} // namespace troupe::model
