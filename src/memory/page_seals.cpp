#include "troupe/memory/page_seals.hpp"

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace troupe::memory {

page_seals::page_seals(std::span<std::byte> memory, layout pages)
  : data_(memory.data()),
    pages_(pages),
    sums_(reinterpret_cast<std::uint64_t*>(memory.data() + pages.bytes())),
    is_known_(pages.num_pages) {}

std::uint64_t page_seals::sum(std::int32_t page) const {
  std::uint64_t result = 0;
  for (std::size_t layer = 0; layer < pages_.num_layers; ++layer) {
    const auto* strip = data_ + (layer * pages_.num_pages + index(page)) * pages_.page_bytes;
    result = XXH3_64bits_withSeed(strip, pages_.page_bytes, result);
  }
  return result == 0 ? 1 : result; // 0 says that there is none
}

void page_seals::seal(std::int32_t page) {
  sums_[index(page)] = sum(page);
  is_known_[index(page)] = true;
}

std::optional<std::int32_t> page_seals::find_damage(std::span<const std::int32_t> pages, bool all) {
  // A damaged page is found again by whoever reads it, until it is written anew.
  auto is_damaged = [this](std::int32_t page) {
    bool is_sound = sum(page) == sums_[index(page)];
    is_known_[index(page)] = is_sound;
    return !is_sound;
  };
  for (auto page : pages)
    if (is_sealed(page) && (all || !is_known_[index(page)]) && is_damaged(page))
      return page;
  for (std::size_t i = 0; i < pages_a_step && i < pages.size(); ++i)
    if (auto page = pages[turn_++ % pages.size()]; is_sealed(page) && is_damaged(page))
      return page;
  return std::nullopt;
}

bool page_seals::flip_bit(std::span<const std::int32_t> pages, std::uint64_t random) {
  for (std::size_t i = 0; i < pages.size(); ++i) {
    auto page = pages[(random + i) % pages.size()];
    if (!is_sealed(page))
      continue;
    auto layer = random / 8 % pages_.num_layers;
    auto* strip = data_ + (layer * pages_.num_pages + index(page)) * pages_.page_bytes;
    strip[random / 64 % pages_.page_bytes] ^=
      std::byte{static_cast<unsigned char>(1U << random % 8)};
    return true;
  }
  return false;
}

} // namespace troupe::memory
