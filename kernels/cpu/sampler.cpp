#include "troupe/kernels/cpu/sampler.hpp"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <limits>

#include "troupe/kernels/cpu/philox.hpp"

namespace troupe::kernels::cpu {

namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

/// Below this the distribution has collapsed on its best token (vLLM draws the same line).
constexpr float kGreedyTemperature = 1e-5F;

bool before(const candidate& a, const candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

/// Gives the tokens of a row in descending order of their logits, without sorting more than is
/// asked for: tokens are collected and sorted in bands below the best.
class descending_tokens {
public:
  descending_tokens(const float* logits, std::int32_t count, float best, float width,
                    candidate* memory)
    : logits_(logits),
      count_(count),
      upper_(std::numeric_limits<float>::infinity()),
      lower_(best - width),
      best_(best),
      width_(width),
      list_(memory) {}

  /// The token at a place of the order, 0 the best; null behind the last token above -infinity.
  const candidate* at(std::int32_t index) {
    while (index >= size_ && upper_ > kNever) {
      collect();
    }
    return index < size_ ? list_ + index : nullptr;
  }

private:
  void collect() {
    const std::int32_t begin = size_;
    for (std::int32_t i = 0; i < count_; ++i) {
      if (logits_[i] < upper_ && logits_[i] >= lower_ && logits_[i] > kNever) {
        list_[size_++] = {logits_[i], i};
      }
    }
    std::sort(list_ + begin, list_ + size_, before);
    upper_ = lower_;
    width_ *= 3.0F;
    // Three bands reach 36 temperatures down, behind which hardly anything can be drawn.
    lower_ = ++bands_ >= 3 ? kNever : best_ - width_;
  }

  const float* logits_;
  std::int32_t count_;
  float upper_;
  float lower_;
  float best_;
  float width_;
  candidate* list_;
  std::int32_t size_ = 0;
  int bands_ = 0;
};

void report_best(const float* logits, std::int32_t vocabulary, double log_sum, float largest,
                 std::int32_t count, sampled_token& result) {
  candidate best[kMaxLogprobs + 1];
  std::int32_t size = 0;
  for (std::int32_t token = 0; token < vocabulary; ++token) {
    const candidate next{logits[token], token};
    if (size == count && !before(next, best[size - 1])) {
      continue;
    }
    std::int32_t at = size;
    for (; at > 0 && before(next, best[at - 1]); --at) {
      best[at] = best[at - 1];
    }
    best[at] = next;
    size = std::min(size + 1, count);
  }
  result.num_top = size;
  for (std::int32_t i = 0; i < size; ++i) {
    result.top_tokens[i] = best[i].token;
    result.top_logprobs[i] =
      static_cast<float>(static_cast<double>(best[i].logit) - largest - log_sum);
  }
}

} // namespace

std::int32_t sampler::choose(const kernel_table& kernels, const float* logits,
                             std::int32_t vocabulary, const sampling_params& params) {
  if (!params.banned.empty()) {
    float* allowed = allowed_.take(vocabulary);
    std::copy_n(logits, vocabulary, allowed);
    for (const std::int32_t token : params.banned) {
      if (token >= 0 && token < vocabulary) {
        allowed[token] = kNever;
      }
    }
    logits = allowed;
  }
  const float best = kernels.max(logits, vocabulary);
  if (best == kNever) {
    return -1;
  }
  if (!(params.temperature >= kGreedyTemperature) || !std::isfinite(best)) {
    return static_cast<std::int32_t>(std::find(logits, logits + vocabulary, best) - logits);
  }

  float* powers = powers_.take(vocabulary);
  double total = kernels.exp_sum(logits, best, params.temperature, vocabulary, powers);
  descending_tokens order(logits, vocabulary, best, 4.0F * params.temperature,
                          candidates_.take(vocabulary));

  // How many tokens, best first, each filter leaves: the best one always stays.
  std::int32_t limit = params.top_k > 0 ? std::min(params.top_k, vocabulary) : vocabulary;
  const bool filtered = limit < vocabulary || params.min_p > 0.0F;
  const auto kept = [&](std::int32_t index) -> const candidate* {
    const candidate* next = index < limit ? order.at(index) : nullptr;
    const bool stays =
      next != nullptr
      && (index == 0 || (powers[next->token] > 0.0F && powers[next->token] >= params.min_p));
    return stays ? next : nullptr;
  };
  if (filtered) {
    total = 0.0;
    std::int32_t count = 0;
    for (const candidate* next = kept(0); next != nullptr; next = kept(count)) {
      total += powers[next->token];
      ++count;
    }
    limit = count;
  }
  if (params.top_p < 1.0F) {
    const double enough = total * std::max(params.top_p, 0.0F);
    double sum = 0.0;
    std::int32_t count = 0;
    for (const candidate* next = kept(0); next != nullptr; next = kept(count)) {
      sum += powers[next->token];
      ++count;
      if (sum >= enough) {
        break;
      }
    }
    total = sum;
    limit = count;
  }

  const double target = uniform(params.seed, params.position) * total;
  double sum = 0.0;
  std::int32_t token = -1;
  std::int32_t index = 0;
  for (const candidate* next = kept(0); next != nullptr; next = kept(++index)) {
    // Sums in two orders may differ in the last bit, so the last token stands in for the end.
    token = next->token;
    sum += powers[token];
    if (sum > target) {
      break;
    }
  }
  return token;
}

sampled_token sampler::draw(const kernel_table& kernels, const float* logits,
                            std::int32_t vocabulary, const sampling_params& params) {
  sampled_token result;
  const float largest = kernels.max(logits, vocabulary);
  const double log_sum = std::log(kernels.exp_sum(logits, largest, 1.0F, vocabulary, nullptr));
  assert(params.target < vocabulary);
  result.token = params.target >= 0 ? params.target : choose(kernels, logits, vocabulary, params);
  if (result.token >= 0) {
    result.logprob =
      static_cast<float>(static_cast<double>(logits[result.token]) - largest - log_sum);
  } else {
    result.logprob = kNever;
  }
  const std::int32_t count = std::clamp(params.num_logprobs, 0, std::min(kMaxLogprobs, vocabulary));
  if (count > 0) {
    report_best(logits, vocabulary, log_sum, largest, count, result);
  }
  return result;
}

} // namespace troupe::kernels::cpu
