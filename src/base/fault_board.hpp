#pragma once

#include "troupe/base/fault_point.hpp"

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

/// The layout of the shared file behind `faults::board`, and how it is read and written.
namespace troupe::faults::detail {

/// What a rule says, as it lies on the board. Globs end with a zero byte.
struct rule_content {
  std::uint8_t where = 0;
  std::uint8_t what = 0;
  std::uint8_t is_cut = 0; ///< `process` is the receiving end, `peer` the sending one
  std::uint8_t any_peer = 0;
  std::uint32_t count = 0;
  std::uint32_t delay_ms = 0;
  std::uint32_t reserved = 0;
  std::uint64_t seed = 0;
  std::uint64_t threshold = 0; ///< strikes where a draw of 53 bits is below
  std::array<char, 64> process{};
  std::array<char, 64> peer{};
};

/// A place for one rule. A reader copies the words between two looks at `generation` and uses
/// the copy only if both found the same odd number (a seqlock of atomic words: no reader ever
/// waits, and none acts on half a rule). The counts carry the generation in their upper bits, so
/// that who is late counts nothing on the rule that came after.
class rule_slot {
public:
  /// For the one writer; the place must be free.
  void publish(const rule_content& content);
  void retract();
  bool is_in_force() const { return generation_.load(std::memory_order_acquire) % 2 == 1; }
  std::uint64_t num_hits() const;

  /// What happens at a pass, if this rule is in force, matches and strikes now.
  std::optional<fault> strike(point where, std::string_view process, std::string_view peer);
  bool cuts(std::string_view process, std::string_view peer) const;

private:
  static constexpr std::size_t num_words = sizeof(rule_content) / sizeof(std::uint64_t);
  static_assert(sizeof(rule_content) % sizeof(std::uint64_t) == 0);

  /// The rule and its generation; nothing if it is not in force or changes just now.
  std::optional<std::uint64_t> read(rule_content& content) const;

  /// False if this rule is surely not one for `where`, or not a cut; spares most of `read`.
  bool may_be(point where) const;
  bool may_be_cut() const;

  std::atomic<std::uint64_t> generation_; ///< odd: in force
  std::atomic<std::uint64_t> passes_;
  std::atomic<std::uint64_t> hits_;
  std::array<std::atomic<std::uint64_t>, num_words> words_;
};

/// The file. Zeros are a board without rules.
struct board_page {
  static constexpr std::uint64_t magic_value = 0x6472616f42746c46; // "FltBoard"
  static constexpr std::uint32_t version_value = 1;

  std::atomic<std::uint64_t> magic; ///< written last
  std::uint32_t version;
  std::atomic<std::uint32_t> num_used; ///< places from here on have never held a rule
  std::array<rule_slot, board::max_rules> slots;
};

static_assert(std::atomic<std::uint64_t>::is_always_lock_free);

/// True when `text` matches `glob`, where `*` stands for any number of characters. Does
/// not allocate.
bool matches(std::string_view glob, std::string_view text);

} // namespace troupe::faults::detail
