#pragma once

#include "troupe/base/error.hpp"

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace troupe::model {

/// Verifies drafts: which rows of a micro-batch stand once its tokens have been drawn, and where
/// drafting goes on.
///
/// A slice of a sequence ends with the token that was drawn last and the drafts behind it, as if
/// they had been drawn. Every one of these rows draws. The first draw is right whatever the drafts
/// are; the next is right if the first equals the first draft, and so on (speculative decoding,
/// arXiv 2211.17192, with draws that are keyed by seed and position: the tokens are those of a run
/// without drafts, bit for bit, whether greedy or sampled). Rows behind the first wrong draft fall:
/// what they wrote is written anew by the step that follows.
///
/// No I/O. Not thread-safe.
class draft_plan {
public:
  /// Consecutive rows of one sequence.
  struct slice {
    std::int32_t num_rows = 0;
    std::int32_t num_drafts = 0;  ///< the last so many rows are drafts
    std::int32_t next_token = -1; ///< behind the last row; -1: drawn in this step
    std::int32_t num_wanted = 0;  ///< drafts for the next step, at most
  };

  /// Where drafts are wanted.
  struct chain {
    std::int32_t slice = 0;
    std::int32_t row = 0;   ///< index into `rows`: the last row of the slice that stands
    std::size_t output = 0; ///< its draw
    std::int32_t num_drafts = 0;
  };

  /// `tokens` has one entry a row; `output_rows` and `drawn` one an output, rows ascending.
  /// Errors: internal where the arrays do not fit each other.
  expected<void> build(std::span<const slice> slices, std::span<const std::int32_t> tokens,
                       std::span<const std::int32_t> output_rows,
                       std::span<const std::int32_t> drawn);

  std::span<const std::int32_t> rows() const { return rows_; } ///< that stand
  std::span<const std::int32_t> next_tokens() const {
    return next_tokens_;
  } ///< behind each of them
  std::span<const chain> chains() const { return chains_; }

private:
  std::vector<std::int32_t> rows_, next_tokens_;
  std::vector<chain> chains_;
};

} // namespace troupe::model
