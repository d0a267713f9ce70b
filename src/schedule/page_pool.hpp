#pragma once

#include <cstdint>
#include <vector>

namespace troupe::schedule {

/// The KV pages of one replica by number, 0 to num_pages - 1: which ones are free. The same
/// number names the page of every layer on every stage. Giving back a page that is free
/// already is a broken invariant and fails an assertion.
class page_pool {
public:
  explicit page_pool(std::uint32_t num_pages);

  std::uint32_t num_free() const { return static_cast<std::uint32_t>(free_.size()); }

  /// Takes a free page. At least one must be free.
  std::int32_t take();

  /// Gives pages back and leaves `pages` empty.
  void release(std::vector<std::int32_t>& pages);

  /// Somebody may write to this page, which is taken, until `end_rest`: when it is given back it
  /// rests, and is not free before.
  void expose(std::int32_t page);
  /// The same of all pages that are free now.
  void expose_free();
  void end_rest();
  std::uint32_t num_resting() const { return static_cast<std::uint32_t>(resting_.size()); }
  /// How many of these would be free if they were given back.
  std::uint32_t num_freed_by(const std::vector<std::int32_t>& pages) const;

private:
  std::vector<std::int32_t> free_; ///< used as a stack: the page freed last is the warmest
  std::vector<std::int32_t> resting_;
  std::vector<bool> is_exposed_;
  std::vector<bool> is_free_; ///< or rests
};

} // namespace troupe::schedule
