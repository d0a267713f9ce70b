#pragma once

#include "troupe/base/error.hpp"

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

/// How far a converted model is from its source, by what both expect of the same tokens.
namespace troupe::model {

/// Tokens that both models are asked about.
struct comparison_text {
  std::vector<std::int32_t> tokens;
  /// With an answer: the first of its tokens; greedy decoding from there gives the others if the
  /// most likely token is the right one at each of them.
  std::size_t answer_begin = 0; ///< 0: there is no answer
};

/// What a model expects behind each token of some texts but the last.
struct expectations {
  std::int32_t vocab_size = 0;
  std::vector<float> logprobs; ///< [tokens, vocab], natural logarithms
};

/// Computes a model of a Hugging Face directory in this process, text by text.
/// Errors: as stage_model::load; invalid_request for tokens outside the vocabulary;
/// resource_exhausted.
expected<expectations> expect_tokens(const std::filesystem::path& model,
                                     std::span<const comparison_text> texts, int num_threads);

struct model_comparison {
  std::size_t num_tokens = 0;
  double mean_kl = 0.0;        ///< of the converted model from its source, nats a token
  double worst_kl = 0.0;       ///< of one token
  double top1_agreement = 0.0; ///< share of tokens for which both expect the same most
  double mean_deviation = 0.0; ///< of the text's own token, absolute log-probability
  double source_perplexity = 0.0;
  double perplexity = 0.0;
  std::size_t num_answers = 0;
  std::size_t num_same_answers = 0; ///< whose every token the converted model would draw greedily
  std::size_t num_answer_tokens = 0;
  std::size_t num_same_answer_tokens = 0;
};

/// Both must be of the same vocabulary and of these texts.
model_comparison compare(std::span<const comparison_text> texts, const expectations& source,
                         const expectations& converted);

/// The conversations of a golden.json beside a model: `prompt` and `tokens` of each.
/// Errors: invalid_model.
expected<std::vector<comparison_text>> read_conversations(const std::filesystem::path& file);

/// A text file, tokenized with a model's tokenizer and cut into pieces of at most `max_piece`
/// tokens, `max_tokens` in all. Errors: as tokenizer::load and encode; io_failed.
expected<std::vector<comparison_text>> read_comparison_text(const std::filesystem::path& file,
                                                            const std::filesystem::path& model,
                                                            std::size_t max_piece,
                                                            std::size_t max_tokens);

} // namespace troupe::model
