#pragma once

#include <cstdint>

#include "troupe/kernels/cpu/kernel_table.hpp"
#include "troupe/kernels/cpu/scratch.hpp"
#include "troupe/kernels/ops.hpp"

namespace troupe::kernels::cpu {

/// A token that may be drawn.
struct candidate {
  float logit;
  std::int32_t token;
};

/// Turns rows of logits into tokens. One object a thread; keeps its memory.
class sampler {
public:
  /// Draws from one row as `ops::sample` says.
  sampled_token draw(const kernel_table& kernels, const float* logits, std::int32_t vocabulary,
                     const sampling_params& params);

private:
  std::int32_t choose(const kernel_table& kernels, const float* logits, std::int32_t vocabulary,
                      const sampling_params& params);

  scratch<float> allowed_;        // [vocabulary] logits without the banned tokens
  scratch<float> powers_;         // [vocabulary] exp of the distance to the best, over temperature
  scratch<candidate> candidates_; // [vocabulary] the best ones first, as far as needed
};

} // namespace troupe::kernels::cpu
