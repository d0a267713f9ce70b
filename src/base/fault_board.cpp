#include "troupe/base/fault_board.hpp"

#include <bit>
#include <cstddef>
#include <cstring>

namespace troupe::faults::detail {

namespace {

/// A count with the generation that it belongs to: 24 bits of generation, 40 of count.
constexpr unsigned count_bits = 40;
constexpr std::uint64_t count_mask = (std::uint64_t{1} << count_bits) - 1;

std::uint64_t tagged(std::uint64_t generation) {
  return generation << count_bits;
}

/// Counts one more of this generation and says which it was, from 0; nothing when the rule is
/// gone or `limit` (if any) is reached.
std::optional<std::uint64_t> count_one(std::atomic<std::uint64_t>& counter,
                                       std::uint64_t generation, std::uint64_t limit) {
  auto seen = counter.load(std::memory_order_relaxed);
  do {
    if ((seen & ~count_mask) != tagged(generation))
      return std::nullopt;
    if (limit != 0 && (seen & count_mask) >= limit)
      return std::nullopt;
  } while (!counter.compare_exchange_weak(seen, seen + 1, std::memory_order_relaxed));
  return seen & count_mask;
}

/// SplitMix64's output function (Steele, Lea, Flood: Fast splittable pseudorandom number
/// generators, 2014) at place `index` of the sequence of `seed`.
std::uint64_t draw(std::uint64_t seed, std::uint64_t index) {
  std::uint64_t z = seed + (index + 1) * 0x9e3779b97f4a7c15U;
  z = (z ^ (z >> 30U)) * 0xbf58476d1ce4e5b9U;
  z = (z ^ (z >> 27U)) * 0x94d049bb133111ebU;
  return z ^ (z >> 31U);
}

std::string_view text_of(const std::array<char, 64>& field) {
  return {field.data(), ::strnlen(field.data(), field.size())};
}

} // namespace

bool matches(std::string_view glob, std::string_view text) {
  std::size_t g = 0;
  std::size_t t = 0;
  std::size_t star = std::string_view::npos; // the last one passed, and what it has swallowed
  std::size_t swallowed = 0;
  while (t < text.size()) {
    if (g < glob.size() && glob[g] == '*') {
      star = g++;
      swallowed = t;
    } else if (g < glob.size() && glob[g] == text[t]) {
      ++g;
      ++t;
    } else if (star != std::string_view::npos) {
      g = star + 1;
      t = ++swallowed;
    } else {
      return false;
    }
  }
  while (g < glob.size() && glob[g] == '*')
    ++g;
  return g == glob.size();
}

void rule_slot::publish(const rule_content& content) {
  const auto next = generation_.load(std::memory_order_relaxed) + 1;
  const auto words = std::bit_cast<std::array<std::uint64_t, num_words>>(content);
  for (std::size_t i = 0; i < num_words; ++i)
    words_[i].store(words[i], std::memory_order_release);
  passes_.store(tagged(next), std::memory_order_release);
  hits_.store(tagged(next), std::memory_order_release);
  generation_.store(next, std::memory_order_release);
}

void rule_slot::retract() {
  const auto generation = generation_.load(std::memory_order_relaxed);
  if (generation % 2 == 1)
    generation_.store(generation + 1, std::memory_order_release);
}

std::uint64_t rule_slot::num_hits() const {
  return hits_.load(std::memory_order_relaxed) & count_mask;
}

std::optional<std::uint64_t> rule_slot::read(rule_content& content) const {
  const auto generation = generation_.load(std::memory_order_acquire);
  if (generation % 2 == 0)
    return std::nullopt;
  std::array<std::uint64_t, num_words> words{};
  for (std::size_t i = 0; i < num_words; ++i)
    words[i] = words_[i].load(std::memory_order_acquire);
  if (generation_.load(std::memory_order_relaxed) != generation)
    return std::nullopt;
  content = std::bit_cast<rule_content>(words);
  return generation;
}

bool rule_slot::may_be(point where) const {
  static_assert(offsetof(rule_content, where) == 0 && offsetof(rule_content, is_cut) == 2);
  const auto first = words_[0].load(std::memory_order_relaxed);
  return is_in_force() && (first & 0xffU) == static_cast<std::uint8_t>(where);
}

bool rule_slot::may_be_cut() const {
  return is_in_force() && (words_[0].load(std::memory_order_relaxed) >> 16U & 0xffU) != 0;
}

std::optional<fault> rule_slot::strike(point where, std::string_view process,
                                       std::string_view peer) {
  if (!may_be(where))
    return std::nullopt;
  rule_content rule;
  const auto generation = read(rule);
  if (!generation || rule.is_cut != 0 || rule.where != static_cast<std::uint8_t>(where))
    return std::nullopt;
  if (!matches(text_of(rule.process), process)
      || (rule.any_peer == 0 && !matches(text_of(rule.peer), peer)))
    return std::nullopt;
  if (rule.count != 0 && (hits_.load(std::memory_order_relaxed) & count_mask) >= rule.count)
    return std::nullopt; // spent: passes count no more
  const auto pass = count_one(passes_, *generation, 0);
  if (!pass || (draw(rule.seed, 2 * *pass) >> 11U) >= rule.threshold)
    return std::nullopt;
  if (!count_one(hits_, *generation, rule.count))
    return std::nullopt;
  return fault{static_cast<kind>(rule.what), rule.delay_ms, draw(rule.seed, 2 * *pass + 1)};
}

bool rule_slot::cuts(std::string_view process, std::string_view peer) const {
  if (!may_be_cut())
    return false;
  rule_content rule;
  return read(rule) && rule.is_cut != 0 && matches(text_of(rule.process), process)
         && matches(text_of(rule.peer), peer);
}

} // namespace troupe::faults::detail
