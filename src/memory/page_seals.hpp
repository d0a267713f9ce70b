#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace troupe::memory {

/// Check sums of full KV pages: finds memory that changed by itself. A page is opened before it is
/// written and sealed when its last position has been; the sums (XXH3 over the page's bytes of all
/// layers) lie in the KV memory behind the pages, and so outlive the process as the pages do.
///
/// A page that this process has not sealed itself is verified at its first use; beyond that a few
/// pages a step are, in turn. Used by one thread.
class page_seals {
public:
  /// How the pages lie: [num_layers, num_pages, page_bytes].
  struct layout {
    std::size_t num_layers = 0;
    std::size_t num_pages = 0;
    std::size_t page_bytes = 0;  ///< of one layer
    std::size_t page_tokens = 0; ///< positions of one page

    std::size_t bytes() const { return num_layers * num_pages * page_bytes; }
  };

  /// Pages verified in turn with each step.
  static constexpr std::size_t pages_a_step = 2;

  /// Memory that the sums take.
  static constexpr std::size_t bytes(std::size_t num_pages) {
    return num_pages * sizeof(std::uint64_t);
  }

  /// `memory` holds the pages and behind them the sums, at an address aligned to 8.
  page_seals(std::span<std::byte> memory, layout pages);

  const layout& shape() const { return pages_; }

  /// Pages that are about to be written: they have no sum until they are sealed again.
  void open(std::int32_t page) { sums_[index(page)] = 0; }

  /// All positions of a page are there.
  void seal(std::int32_t page);

  bool is_sealed(std::int32_t page) const { return sums_[index(page)] != 0; }

  /// Verifies those of `pages` that are sealed and due, or all that are sealed. Gives the first
  /// damaged one. Numbers must be in range.
  std::optional<std::int32_t> find_damage(std::span<const std::int32_t> pages, bool all = false);

  /// For drills: flips the bit that `random` picks in one of the sealed ones of `pages`. False:
  /// none is sealed.
  bool flip_bit(std::span<const std::int32_t> pages, std::uint64_t random);

private:
  static std::size_t index(std::int32_t page) { return static_cast<std::size_t>(page); }
  std::uint64_t sum(std::int32_t page) const;

  std::byte* data_;
  layout pages_;
  std::uint64_t* sums_;
  std::vector<bool> is_known_; ///< sealed or verified by this process
  std::size_t turn_ = 0;
};

} // namespace troupe::memory
