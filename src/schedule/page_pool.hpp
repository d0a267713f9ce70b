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

  /// From now on, pages that are given back rest: they are not free before `end_rest`.
  void begin_rest() { is_resting_ = true; }
  /// The same; those that are free rest, too.
  void begin_rest_of_all();
  void end_rest();
  bool is_resting() const { return is_resting_; }
  std::uint32_t num_resting() const { return static_cast<std::uint32_t>(resting_.size()); }

private:
  std::vector<std::int32_t> free_; ///< used as a stack: the page freed last is the warmest
  std::vector<std::int32_t> resting_;
  bool is_resting_ = false;
  std::vector<bool> is_free_; ///< or rests
};

} // namespace troupe::schedule
