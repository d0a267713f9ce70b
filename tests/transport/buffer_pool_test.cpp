#include "troupe/transport/buffer_pool.hpp"

#include <catch2/catch.hpp>

#include <cstdint>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

namespace troupe::transport {

TEST_CASE("buffers are aligned, writable and do not overlap") {
  buffer_pool pool{std::size_t{1} << 24};
  std::mt19937_64 random{7};
  std::vector<buffer> lent;
  for (int i = 0; i < 300; ++i) {
    const std::size_t size = 1 + random() % (std::size_t{1} << (1 + random() % 20));
    auto taken = pool.take(size);
    REQUIRE(taken);
    CHECK(taken->size() == size);
    CHECK(reinterpret_cast<std::uintptr_t>(taken->data()) % buffer_pool::alignment == 0);
    std::memset(taken->data(), i & 0xff, size);
    lent.push_back(std::move(*taken));
    if (random() % 3 == 0)
      lent.erase(lent.begin() + static_cast<long>(random() % lent.size()));
  }
  for (const auto& each : lent)
    CHECK(std::memcmp(each.data(), each.data() + each.size() - 1, 1) == 0);
}

TEST_CASE("every size fits its block, and the next of that size reuses it") {
  buffer_pool pool{std::size_t{1} << 30};
  for (std::size_t power = 4096; power <= (std::size_t{1} << 26); power *= 2) {
    for (const std::size_t size : {power - 1, power, power + 1, power + power / 4 + 1}) {
      const auto idle = pool.cached_bytes();
      auto taken = pool.take(size);
      REQUIRE(taken);
      taken->data()[size - 1] = std::byte{1};
      const auto* place = taken->data();
      *taken = buffer{};
      const auto block = pool.cached_bytes() - idle;
      const bool reused_smaller_class = block == 0;
      if (!reused_smaller_class) {
        CHECK(block >= size);
        CHECK(block <= std::max<std::size_t>(4096, size + size / 4));
      }
      auto again = pool.take(size);
      REQUIRE(again);
      CHECK(again->data() == place);
    }
  }
}

TEST_CASE("what lies idle is bounded, and sizes out of use make room") {
  buffer_pool pool{std::size_t{64} << 10};
  std::vector<buffer> lent;
  for (int i = 0; i < 32; ++i)
    lent.push_back(*pool.take(4096));
  lent.clear();
  CHECK(pool.cached_bytes() == std::size_t{64} << 10);
  auto larger = pool.take(std::size_t{32} << 10);
  const auto* place = larger->data();
  *larger = buffer{};
  CHECK(pool.cached_bytes() == std::size_t{64} << 10);
  CHECK(pool.take(std::size_t{32} << 10)->data() == place);
  auto too_large_to_keep = pool.take(std::size_t{1} << 20);
  *too_large_to_keep = buffer{};
  CHECK(pool.cached_bytes() <= std::size_t{64} << 10);
}

TEST_CASE("a buffer may outlive its pool, and empty ones need no memory") {
  buffer survivor;
  {
    buffer_pool pool{4096};
    survivor = *pool.take(100);
    auto empty = pool.take(0);
    REQUIRE(empty);
    CHECK(empty->empty());
    CHECK(empty->data() == nullptr);
  }
  survivor.data()[99] = std::byte{1};
  CHECK(survivor.bytes().size() == 100);
}

TEST_CASE("an impossible size is an error") {
  buffer_pool pool{4096};
  for (const auto size : {~std::size_t{0}, std::size_t{1} << 41, std::size_t{1} << 63}) {
    const auto taken = pool.take(size);
    REQUIRE_FALSE(taken);
    CHECK(taken.error().code == error_code::resource_exhausted);
  }
}

TEST_CASE("threads take and return buffers of each other") {
  buffer_pool pool{std::size_t{1} << 20};
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < 4; ++seed)
    threads.emplace_back([pool, seed]() mutable {
      std::mt19937 random{seed};
      std::vector<buffer> held;
      for (int i = 0; i < 2000; ++i) {
        auto taken = pool.take(1 + random() % 20000);
        std::memset(taken->data(), static_cast<int>(seed), taken->size());
        held.push_back(std::move(*taken));
        if (held.size() > 16)
          held.erase(held.begin() + random() % 16);
      }
    });
  for (auto& each : threads)
    each.join();
  CHECK(pool.cached_bytes() > 0);
  CHECK(pool.cached_bytes() <= std::size_t{1} << 20);
}

} // namespace troupe::transport
