#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace troupe::schedule {

/// Names a request within a frontend, never used again.
using request_id = std::uint64_t;

/// Time as the scheduler sees it: handed in, never read.
using time_point = std::chrono::steady_clock::time_point;

/// How tokens are drawn; the meaning of the fields is that of kernels::sampling_params.
struct sampling {
  float temperature = 0.0F;
  std::int32_t top_k = 0;
  float top_p = 1.0F;
  float min_p = 0.0F;
  std::uint64_t seed = 0;
};

/// A request as it enters the queue.
struct request {
  request_id id = 0;
  std::vector<std::int32_t> prompt; ///< token ids, at least one
  /// Of a request that goes on after its scheduler died: what was generated already. Computed
  /// again without events; counts for max_tokens, min_tokens and token_index as if drawn here.
  std::vector<std::int32_t> generated;
  bool resumed = false; ///< accepted before: the bound of the queue does not apply
  sampling draw;
  std::uint32_t max_tokens = 16;           ///< 0: nothing is drawn, the prompt may be scored
  std::uint32_t min_tokens = 0;            ///< stop_tokens cannot be drawn before this many
  std::vector<std::int32_t> stop_tokens;   ///< end of text; empty with ignore_eos
  std::int32_t num_logprobs = -1;          ///< -1: none; 0: of the token; n: and of the n best
  std::int32_t num_prompt_logprobs = -1;   ///< the same for the tokens of the prompt
  time_point deadline = time_point::max(); ///< past it the request fails with deadline_exceeded
};

/// What the last stage has to do with one row's logits. Rows that draw are the last one of their
/// slice and, with drafts, as many before it.
struct output_row {
  std::int32_t row = 0;      ///< row within the micro-batch
  std::int32_t sequence = 0; ///< index into micro_batch::sequences
  std::int32_t target = -1;  ///< >= 0: score this token of the prompt instead of drawing one
  std::int32_t num_logprobs = 0;
  bool ban_stop_tokens = false; ///< the slice's stop_tokens must not be drawn
  std::uint32_t position = 0;   ///< of the token drawn or scored; with the seed, the draw's key
};

/// A run of consecutive positions of one sequence. Row i of the slice is position
/// first_position + i; it reads the KV of every position up to its own and writes its own. What the
/// rows of wrong drafts write is written again by the next slice of the sequence.
struct sequence_slice {
  request_id request = 0;
  std::uint32_t first_position = 0;
  std::uint32_t num_rows = 0;
  std::vector<std::int32_t> pages; ///< block table up to the slice's last position
  sampling draw;
  std::vector<std::int32_t> stop_tokens; ///< only where an output row bans them
  std::uint32_t num_drafts = 0;          ///< the last so many rows are drafts to be verified
  std::uint32_t num_wanted = 0;          ///< drafts for the next step, at most
  std::int32_t next_token = -1;          ///< behind the last row; -1: drawn in this step
};

/// A micro-batch: what every stage of the replica needs to know of one step.
struct micro_batch {
  std::uint64_t step = 0; ///< counts up by one from 1, per replica
  std::vector<sequence_slice> sequences;
  std::vector<std::int32_t> tokens; ///< one a row, slices in order
  std::vector<output_row> outputs;  ///< ascending rows
};

/// One answer of the last stage, in the order of micro_batch::outputs.
struct output_token {
  std::int32_t token = 0;
  float logprob = 0.0F;
  std::vector<std::int32_t> top_tokens;
  std::vector<float> top_logprobs;
};

/// Drafts that came with the answers to a step, for the next one. Empty where none are made.
struct draft_list {
  std::span<const std::uint32_t> counts; ///< one a slice of the micro-batch
  std::span<const std::int32_t> tokens;  ///< of all slices, one behind the other
};

enum class finish_reason : std::uint8_t {
  none,   ///< goes on
  stop,   ///< a stop token was drawn (it is part of the event, not of the text)
  length, ///< max_tokens or the model's context is reached
  cancelled,
  failed, ///< see the error
};

/// One step of a request's life, in order; exactly one event per (request, token index), and
/// exactly one with a finish reason, the last. The tokens of the prompt come first: 1 to the
/// last one, as nothing comes before token 0 that could score it.
struct token_event {
  request_id request = 0;
  bool is_prompt = false;        ///< a prompt token's log-probability; token_index is its position
  bool has_token = false;        ///< false for a finish without a token (cancelled, failed)
  std::uint32_t token_index = 0; ///< 0 for the first generated token
  output_token token;
  finish_reason finish = finish_reason::none;
};

/// How long a fence stands. What a process that is no more can still write is the one step that its
/// device was computing.
inline constexpr std::chrono::milliseconds fence_time{250};

/// The same on GPUs: the step is over when it is computed, or when the driver has cleared the
/// process away, whatever is first. On H200s that takes 50 to 60 ms as a rule, 250 after an illegal
/// access, 370 with two of them.
inline constexpr std::chrono::milliseconds gpu_fence_time{600};

/// Limits of one replica, all at least one.
struct limits {
  std::uint32_t num_pages = 0;
  std::uint32_t page_tokens = 16;
  std::uint32_t max_batch_tokens = 2048;    ///< rows of one micro-batch
  std::uint32_t max_batch_sequences = 256;  ///< sequences of one micro-batch
  std::uint32_t prefill_chunk_tokens = 512; ///< rows of one sequence in one micro-batch
  std::uint32_t max_in_flight = 2;          ///< micro-batches, stages + 1
  std::uint32_t max_decoding = 1;   ///< of them, those with decodes: stages that can compute
                                    ///< at the same time
  std::uint32_t max_queued = 1024;  ///< requests waiting for admission
  std::uint32_t max_context = 2048; ///< tokens of one sequence, prompt included
  std::uint32_t draft_tokens = 0;   ///< drafts of a sequence in one step; may be none
};

} // namespace troupe::schedule
