#include "troupe/memory/piece_ring.hpp"

#include <catch2/catch.hpp>

#include <deque>
#include <random>
#include <vector>

using troupe::memory::piece_ring;

namespace {

constexpr std::size_t alignment = 4;
constexpr std::uint64_t first_number = 100;

/// A ring and the block that it divides: whoever takes a piece writes its number all over it.
class checked_ring {
public:
  explicit checked_ring(std::size_t bytes)
    : ring_(bytes, alignment, first_number), block_(bytes, 0) {}

  bool take(std::size_t size) {
    auto taken = ring_.take(size);
    if (!taken)
      return false;
    REQUIRE(taken->number == first_number + pieces_.size());
    REQUIRE(taken->begin % alignment == 0);
    REQUIRE(taken->begin + size <= block_.size());
    for (std::size_t i = 0; i < size; ++i)
      block_[taken->begin + i] = taken->number;
    pieces_.push_back({taken->begin, size});
    out_.push_back(taken->number);
    check();
    return true;
  }

  void give_back(std::size_t index) {
    auto number = out_.at(index);
    out_.erase(out_.begin() + static_cast<std::ptrdiff_t>(index));
    ring_.give_back(number);
    ring_.give_back(number); // a second time changes nothing
    check();
  }

  std::size_t num_taken() const { return out_.size(); }
  std::uint64_t oldest() const { return ring_.oldest(); }

private:
  struct piece {
    std::size_t begin;
    std::size_t size;
  };

  /// What is out holds what was put there, and so does all from the oldest on.
  void check() const {
    REQUIRE(ring_.num_taken() == out_.size());
    for (auto number : out_)
      REQUIRE(number >= ring_.oldest());
    for (auto number = ring_.oldest(); number < first_number + pieces_.size(); ++number) {
      const auto& p = pieces_[number - first_number];
      for (std::size_t i = 0; i < p.size; ++i)
        REQUIRE(block_[p.begin + i] == number);
    }
  }

  piece_ring ring_;
  std::vector<std::uint64_t> block_; ///< by byte, the number of the last piece there
  std::vector<piece> pieces_;        ///< by number, all that there ever were
  std::deque<std::uint64_t> out_;
};

/// Every sequence of so many moves: pieces of any of these sizes, and any piece back.
void try_all(const checked_ring& ring, int moves, std::size_t& num_tried) {
  ++num_tried;
  if (moves == 0)
    return;
  for (std::size_t size : {1U, 4U, 5U, 12U}) {
    auto next = ring;
    if (next.take(size))
      try_all(next, moves - 1, num_tried);
  }
  for (std::size_t i = 0; i < ring.num_taken(); ++i) {
    auto next = ring;
    next.give_back(i);
    try_all(next, moves - 1, num_tried);
  }
}

} // namespace

TEST_CASE("a piece keeps what is in it until it is older than the oldest, in every order") {
  for (std::size_t bytes : {0U, 3U, 4U, 11U, 12U, 16U, 20U, 28U}) {
    CAPTURE(bytes);
    std::size_t num_tried = 0;
    try_all(checked_ring(bytes), 6, num_tried);
    CHECK(num_tried >= (bytes < 4 ? 1U : 7U));
  }
}

TEST_CASE("pieces that come back in order leave room for as many again, for ever") {
  checked_ring ring(4 * 12); // one more than there are, for the end that is left out
  std::mt19937 random(1);
  for (int i = 0; i < 300; ++i) {
    if (ring.num_taken() == 2)
      ring.give_back(0);
    REQUIRE(ring.take(1 + random() % 12));
  }
  CHECK(ring.oldest() == first_number + 298);
}

TEST_CASE("a ring gives all of its room, and again once all pieces are back") {
  checked_ring ring(16);
  for (int round = 0; round < 3; ++round) {
    REQUIRE(ring.take(16));
    CHECK_FALSE(ring.take(1));
    ring.give_back(0);
    for (int i = 0; i < 4; ++i)
      REQUIRE(ring.take(3));
    CHECK_FALSE(ring.take(1));
    ring.give_back(1);
    CHECK_FALSE(ring.take(1)); // one before it is out
    ring.give_back(0);
    REQUIRE(ring.take(8));
    CHECK_FALSE(ring.take(1));
    while (ring.num_taken() > 0)
      ring.give_back(ring.num_taken() - 1);
  }
  CHECK_FALSE(ring.take(17));
}
