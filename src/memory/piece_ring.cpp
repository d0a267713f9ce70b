#include "troupe/memory/piece_ring.hpp"

#include <algorithm>

namespace troupe::memory {

std::optional<piece_ring::piece> piece_ring::take(std::size_t bytes) {
  if (bytes > bytes_)
    return std::nullopt;
  const auto size = (std::max<std::size_t>(bytes, 1) + alignment_ - 1) / alignment_ * alignment_;
  const auto has_room = [size](std::size_t from, std::size_t to) {
    return from <= to && to - from >= size;
  };
  std::size_t begin = 0;
  auto end = bytes_;
  if (!pieces_.empty()) {
    const auto first = pieces_.front().begin;
    const auto last = pieces_.back().end;
    const bool has_wrapped = pieces_.back().begin < first;
    if (has_wrapped || has_room(last, bytes_))
      begin = last;
    if (has_wrapped || begin == 0)
      end = first;
  }
  if (!has_room(begin, end))
    return std::nullopt;
  pieces_.push_back({begin, begin + size, false});
  ++num_taken_;
  return piece{next_number_++, begin};
}

void piece_ring::give_back(std::uint64_t number) {
  if (number < oldest() || number >= next_number_)
    return;
  auto& returned = pieces_[static_cast<std::size_t>(number - oldest())];
  num_taken_ -= returned.is_back ? 0 : 1;
  returned.is_back = true;
  while (!pieces_.empty() && pieces_.front().is_back)
    pieces_.pop_front();
}

} // namespace troupe::memory
