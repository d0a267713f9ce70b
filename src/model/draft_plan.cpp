#include "troupe/model/draft_plan.hpp"

#include <algorithm>

#include <fmt/format.h>

namespace troupe::model {

expected<void> draft_plan::build(std::span<const slice> slices,
                                 std::span<const std::int32_t> tokens,
                                 std::span<const std::int32_t> output_rows,
                                 std::span<const std::int32_t> drawn) {
  rows_.clear();
  next_tokens_.clear();
  chains_.clear();
  if (output_rows.size() != drawn.size())
    return fail(error_code::internal, fmt::format("{} output rows came with {} tokens",
                                                  output_rows.size(), drawn.size()));
  std::size_t first = 0;
  std::size_t output = 0;
  for (std::size_t s = 0; s < slices.size(); ++s) {
    const auto& one = slices[s];
    const auto end = first + static_cast<std::size_t>(std::max(one.num_rows, 0));
    if (one.num_rows < 1 || one.num_drafts < 0 || one.num_drafts >= one.num_rows
        || end > tokens.size() || (one.next_token >= 0 && one.num_drafts > 0))
      return fail(error_code::internal,
                  fmt::format("slice {} has {} rows, {} of them drafts, of {} rows left", s,
                              one.num_rows, one.num_drafts, tokens.size() - first));
    const auto row_of = [&](std::size_t row) { return static_cast<std::int32_t>(row); };
    const auto draws_from = end - 1 - static_cast<std::size_t>(one.num_drafts);
    for (auto row = first; row < draws_from; ++row) {
      rows_.push_back(row_of(row));
      next_tokens_.push_back(tokens[row + 1]);
    }
    if (one.next_token >= 0) {
      rows_.push_back(row_of(draws_from));
      next_tokens_.push_back(one.next_token);
      first = end;
      continue;
    }
    while (output < output_rows.size() && output_rows[output] < row_of(draws_from))
      ++output;
    for (auto row = draws_from; row < end; ++row, ++output) {
      if (output >= output_rows.size() || output_rows[output] != row_of(row))
        return fail(error_code::internal, fmt::format("row {} of slice {} draws nothing", row, s));
      rows_.push_back(row_of(row));
      next_tokens_.push_back(drawn[output]);
      if (row + 1 == end || tokens[row + 1] != drawn[output])
        break;
    }
    if (one.num_wanted > 0)
      chains_.push_back({static_cast<std::int32_t>(s), static_cast<std::int32_t>(rows_.size()) - 1,
                         output, one.num_wanted});
    first = end;
  }
  return {};
}

} // namespace troupe::model
