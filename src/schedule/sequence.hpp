#pragma once

#include "troupe/schedule/types.hpp"

#include <cstdint>
#include <vector>

namespace troupe::schedule {

/// Where a sequence stands.
///
///     waiting --admit--> in_flight --complete--> ready --next--> in_flight
///        ^                   |                     |
///        |                cancel                preempt
///        |                   v                     |
///        |                 ended                   |
///        +-----------------------------------------+
enum class phase : std::uint8_t {
  waiting,   ///< in the queue, holds no pages
  ready,     ///< admitted, may go into the next micro-batch
  in_flight, ///< in a micro-batch that is not complete
  ended,     ///< its last event is out; its pages wait for its micro-batch to complete
};

/// A request while it is served: its token log and its block table. Owned by the scheduler.
struct sequence {
  /// Takes over `r`; its prompt and what it has generated become the head of the token log.
  /// `max_length` is the number of tokens, prompt included, that the replica can hold of one
  /// sequence.
  sequence(request&& r, std::uint32_t max_length);

  request what;                     ///< prompt and generated moved away
  std::vector<std::int32_t> tokens; ///< the token log: prompt, then what was generated
  std::vector<std::int32_t> drafts; ///< guesses at the tokens behind the log
  std::vector<std::int32_t> pages;  ///< block table: page i holds positions from i * page_tokens
  std::uint32_t num_prompt = 0;     ///< tokens of the prompt
  std::uint32_t length_limit = 0;   ///< the log ends with `length` at this many tokens
  std::uint32_t num_computed = 0;   ///< positions whose KV lies in the pages
  std::uint32_t num_scored = 0;     ///< prompt positions below have had their output row
  phase where = phase::waiting;

  std::uint32_t num_generated() const {
    return static_cast<std::uint32_t>(tokens.size()) - num_prompt;
  }

  /// True when the request ends with the scores of its prompt and nothing is drawn.
  bool only_scores() const { return length_limit == num_prompt; }

  /// Positions that have to be computed, as far as the log goes: all of it, since the row of
  /// the last token draws the next one; without that row where nothing is drawn.
  std::uint32_t num_known() const {
    return static_cast<std::uint32_t>(tokens.size()) - (only_scores() ? 1 : 0);
  }

  /// Rows still to be computed before the log can grow.
  std::uint32_t num_remaining() const { return num_known() - num_computed; }

  /// True when one row is missing, as between two generated tokens.
  bool is_decode() const { return num_remaining() == 1; }

  /// Appends a drawn token to the log. Says if and how the request ends with it.
  finish_reason append(std::int32_t token);

  /// Drafts that can go behind the next rows, if these reach the end of the log: no more than the
  /// tokens that may still be drawn, less the one that is drawn anyway.
  std::uint32_t num_usable_drafts() const;

  /// Adds the next `num_rows` positions to `batch` as a slice with its tokens and its output
  /// rows; the last `num_drafts` of them are drafts. The pages must be there. Up to `max_drafts`
  /// are asked for, for the step after. `slice` is cleared first; its memory is used again.
  void write_slice(micro_batch& batch, sequence_slice&& slice, std::uint32_t num_rows,
                   std::uint32_t num_drafts = 0, std::uint32_t max_drafts = 0);
};

} // namespace troupe::schedule
