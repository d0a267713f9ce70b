#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>

namespace troupe::memory {

/// Room in a block of memory, taken one piece behind the other and round again. Pieces have
/// ascending numbers. They come back in any order; their room is used again when all pieces with
/// lower numbers have come back too, which suits pieces that are given back in about the order in
/// which they were taken. So `oldest` tells all that can be known of what was taken from outside:
/// pieces from that number on hold what was put into them. Pure.
class piece_ring {
public:
  struct piece {
    std::uint64_t number;
    std::size_t begin;
  };

  /// Pieces begin at multiples of `alignment`, at least 1.
  piece_ring(std::size_t bytes, std::size_t alignment, std::uint64_t first_number)
    : bytes_(bytes), alignment_(alignment), next_number_(first_number) {}

  /// Nothing where there is no room for so many bytes at present.
  std::optional<piece> take(std::size_t bytes);

  /// The piece of that number, once.
  void give_back(std::uint64_t number);

  /// The lowest number of a piece whose room cannot have been used again.
  std::uint64_t oldest() const { return next_number_ - pieces_.size(); }

  std::size_t num_taken() const { return num_taken_; }

private:
  struct room {
    std::size_t begin;
    std::size_t end;
    bool is_back;
  };

  std::size_t bytes_;
  std::size_t alignment_;
  std::uint64_t next_number_;
  std::size_t num_taken_ = 0;
  std::deque<room> pieces_; ///< in order of numbers; the first one is not back
};

} // namespace troupe::memory
