#include "troupe/schedule/page_pool.hpp"

#include <algorithm>
#include <cassert>

namespace troupe::schedule {

page_pool::page_pool(std::uint32_t num_pages)
  : is_exposed_(num_pages, false), is_free_(num_pages, true) {
  free_.reserve(num_pages);
  resting_.reserve(num_pages);
  for (auto page = num_pages; page-- > 0;)
    free_.push_back(static_cast<std::int32_t>(page));
}

std::int32_t page_pool::take() {
  assert(!free_.empty());
  const auto page = free_.back();
  free_.pop_back();
  is_free_[static_cast<std::size_t>(page)] = false;
  return page;
}

void page_pool::release(std::vector<std::int32_t>& pages) {
  for (auto page : pages) {
    const auto idx = static_cast<std::size_t>(page);
    assert(idx < is_free_.size() && !is_free_[idx]);
    is_free_[idx] = true;
    (is_exposed_[idx] ? resting_ : free_).push_back(page);
  }
  pages.clear();
}

void page_pool::expose(std::int32_t page) {
  assert(!is_free_[static_cast<std::size_t>(page)]);
  is_exposed_[static_cast<std::size_t>(page)] = true;
}

void page_pool::expose_free() {
  resting_.insert(resting_.end(), free_.begin(), free_.end());
  free_.clear();
}

void page_pool::end_rest() {
  free_.insert(free_.end(), resting_.begin(), resting_.end());
  resting_.clear();
  std::fill(is_exposed_.begin(), is_exposed_.end(), false);
}

std::uint32_t page_pool::num_freed_by(const std::vector<std::int32_t>& pages) const {
  return static_cast<std::uint32_t>(std::count_if(pages.begin(), pages.end(), [&](auto page) {
    return !is_exposed_[static_cast<std::size_t>(page)];
  }));
}

} // namespace troupe::schedule
