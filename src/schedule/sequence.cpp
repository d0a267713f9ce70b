#include "troupe/schedule/sequence.hpp"

#include <algorithm>
#include <utility>

namespace troupe::schedule {

sequence::sequence(request&& r, std::uint32_t max_length) : what(std::move(r)) {
  tokens = std::exchange(what.prompt, {});
  num_prompt = static_cast<std::uint32_t>(tokens.size());
  // Not the sum of both: max_tokens may be the largest number there is.
  length_limit = num_prompt + std::min(what.max_tokens, max_length - num_prompt);
  // The prompt was scored before the first token was drawn.
  if (what.num_prompt_logprobs < 0 || !what.generated.empty())
    num_scored = num_prompt - 1;
  const auto generated = std::exchange(what.generated, {});
  tokens.insert(tokens.end(), generated.begin(), generated.end());
}

finish_reason sequence::append(std::int32_t token) {
  tokens.push_back(token);
  if (std::find(what.stop_tokens.begin(), what.stop_tokens.end(), token) != what.stop_tokens.end())
    return finish_reason::stop;
  return tokens.size() >= length_limit ? finish_reason::length : finish_reason::none;
}

std::uint32_t sequence::num_usable_drafts() const {
  const auto num_tokens = static_cast<std::uint32_t>(tokens.size());
  return length_limit > num_tokens
           ? std::min(static_cast<std::uint32_t>(drafts.size()), length_limit - num_tokens - 1)
           : 0;
}

void sequence::write_slice(micro_batch& batch, sequence_slice&& slice, std::uint32_t num_rows,
                           std::uint32_t num_drafts, std::uint32_t max_drafts) {
  const auto first_row = static_cast<std::uint32_t>(batch.tokens.size());
  const auto index = static_cast<std::int32_t>(batch.sequences.size());
  const auto num_tokens = static_cast<std::uint32_t>(tokens.size());
  const auto end = num_computed + num_rows - num_drafts; // of the rows whose tokens are known

  slice.request = what.id;
  slice.first_position = num_computed;
  slice.num_rows = num_rows;
  slice.pages.reserve(pages.capacity()); // assign alone would grow by one page at a time
  slice.pages.assign(pages.begin(), pages.end());
  slice.draw = what.draw;
  slice.stop_tokens.clear();
  slice.num_drafts = num_drafts;
  slice.num_wanted = 0;
  slice.next_token = end < num_tokens ? tokens[end] : -1;
  batch.tokens.insert(batch.tokens.end(), tokens.begin() + num_computed, tokens.begin() + end);
  batch.tokens.insert(batch.tokens.end(), drafts.begin(), drafts.begin() + num_drafts);

  // Positions before the last one of the prompt score the token that follows them, once.
  for (auto p = std::max(num_computed, num_scored); p < std::min(end, num_prompt - 1); ++p)
    batch.outputs.push_back({.row = static_cast<std::int32_t>(first_row + p - num_computed),
                             .sequence = index,
                             .target = tokens[p + 1],
                             .num_logprobs = what.num_prompt_logprobs,
                             .ban_stop_tokens = false,
                             .position = p + 1});
  if (end == num_tokens) {
    // At least one token is drawn, and one more would be drawn without any draft.
    slice.num_wanted = std::min(max_drafts, length_limit - std::min(length_limit, num_tokens + 2));
    for (std::uint32_t i = 0; i <= num_drafts; ++i) {
      const bool ban = num_generated() + i < what.min_tokens && !what.stop_tokens.empty();
      if (ban)
        slice.stop_tokens.assign(what.stop_tokens.begin(), what.stop_tokens.end());
      batch.outputs.push_back(
        {.row = static_cast<std::int32_t>(first_row + end - 1 - num_computed + i),
         .sequence = index,
         .target = -1,
         .num_logprobs = std::max(what.num_logprobs, 0),
         .ban_stop_tokens = ban,
         .position = end + i});
    }
  }
  batch.sequences.push_back(std::move(slice));
}

} // namespace troupe::schedule
