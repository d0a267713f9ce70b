#include "troupe/memory/page_seals.hpp"

#include <catch2/catch.hpp>

#include <algorithm>
#include <cstring>
#include <vector>

using troupe::memory::page_seals;

namespace {

constexpr page_seals::layout shape{3, 8, 40, 2};

struct kv_memory {
  std::vector<std::uint64_t> words =
    std::vector<std::uint64_t>((shape.bytes() + page_seals::bytes(shape.num_pages)) / 8);

  std::span<std::byte> bytes() { return std::as_writable_bytes(std::span(words)); }
  std::byte& at(std::size_t layer, std::size_t page, std::size_t offset) {
    return bytes()[(layer * shape.num_pages + page) * shape.page_bytes + offset];
  }
};

const std::vector<std::int32_t> all_pages{0, 1, 2, 3, 4, 5, 6, 7};

} // namespace

TEST_CASE("a sealed page that changes in any byte of any layer is found") {
  kv_memory memory;
  for (std::size_t i = 0; i < shape.bytes(); ++i)
    memory.bytes()[i] = static_cast<std::byte>(i * 7);
  page_seals seals(memory.bytes(), shape);
  for (auto page : all_pages)
    seals.seal(page);
  CHECK_FALSE(seals.find_damage(all_pages, true));
  for (std::size_t layer = 0; layer < shape.num_layers; ++layer)
    for (std::size_t page = 0; page < shape.num_pages; ++page)
      for (std::size_t offset = 0; offset < shape.page_bytes; ++offset) {
        memory.at(layer, page, offset) ^= std::byte{16};
        REQUIRE(seals.find_damage(all_pages, true) == static_cast<std::int32_t>(page));
        memory.at(layer, page, offset) ^= std::byte{16};
      }
  CHECK_FALSE(seals.find_damage(all_pages, true));
}

TEST_CASE("a page that is not sealed may change") {
  kv_memory memory;
  page_seals seals(memory.bytes(), shape);
  memory.at(0, 1, 0) = std::byte{1};
  CHECK_FALSE(seals.find_damage(all_pages, true)); // fresh memory has no seals
  seals.seal(1);
  seals.open(1);
  CHECK_FALSE(seals.is_sealed(1));
  memory.at(0, 1, 0) = std::byte{2};
  CHECK_FALSE(seals.find_damage(all_pages, true));
  seals.seal(1);
  CHECK_FALSE(seals.find_damage(all_pages, true));
}

TEST_CASE("what another process sealed is verified at its first use") {
  kv_memory memory;
  {
    page_seals before(memory.bytes(), shape);
    for (auto page : all_pages)
      before.seal(page);
  }
  memory.at(2, 6, 39) = std::byte{1};
  page_seals after(memory.bytes(), shape);
  std::vector<std::int32_t> others{0, 1, 2};
  CHECK_FALSE(after.find_damage(others));
  std::vector<std::int32_t> with{0, 1, 2, 3, 4, 5, 6};
  CHECK(after.find_damage(with) == 6);
  CHECK(after.find_damage(with) == 6); // until it is written anew
  after.open(6);
  CHECK_FALSE(after.find_damage(with));
}

TEST_CASE("in steady state every page of the steps is verified in turn") {
  kv_memory memory;
  page_seals seals(memory.bytes(), shape);
  for (auto page : all_pages)
    seals.seal(page);
  memory.at(1, 7, 3) = std::byte{9};
  int num_steps = 1;
  while (!seals.find_damage(all_pages)) {
    REQUIRE(num_steps < 8);
    ++num_steps;
  }
  CHECK(num_steps == static_cast<int>(shape.num_pages / page_seals::pages_a_step));
}

TEST_CASE("a drill's flipped bit is found, and it flips only what is sealed") {
  kv_memory memory;
  page_seals seals(memory.bytes(), shape);
  CHECK_FALSE(seals.flip_bit(all_pages, 1));
  CHECK_FALSE(seals.flip_bit({}, 1));
  seals.seal(5);
  for (std::uint64_t random = 1; random < 1000000; random = random * 3 + 1) {
    REQUIRE(seals.flip_bit(all_pages, random));
    REQUIRE(seals.find_damage(all_pages, true) == 5);
    REQUIRE(seals.flip_bit(all_pages, random));
    REQUIRE_FALSE(seals.find_damage(all_pages, true));
  }
}
