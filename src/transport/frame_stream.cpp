#include "troupe/transport/frame_stream.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

namespace troupe::transport {

namespace {

/// A FrameHeader has some hundred bytes, most of them a name.
constexpr std::uint64_t max_header_bytes = std::uint64_t{64} << 10;

} // namespace

/// True if the first frame that waits is written to its end.
bool frame_writer::write_front() {
  const auto& front = *waiting_.front();
  const std::uint64_t lengths[2] = {front.header.size(), front.payload.bytes.size()};
  const std::span<const std::byte> parts[] = {
    std::as_bytes(std::span{lengths}), std::as_bytes(std::span{front.header}), front.payload.bytes};
  std::size_t begin = 0;
  for (const auto& part : parts) {
    if (written_ < begin + part.size()) {
      const auto rest = part.subspan(written_ - begin);
      const auto count = ring_.put(rest);
      written_ += count;
      if (count < rest.size())
        return false;
    }
    begin += part.size();
  }
  written_ = 0;
  return true;
}

bool frame_writer::push() {
  bool any = false;
  while (!waiting_.empty()) {
    const auto before = written_;
    if (!write_front()) {
      any |= written_ != before;
      ring_.publish();
      if (!ring_.ask_for_room())
        return any;
      continue;
    }
    any = true;
    ring_.publish();
    const auto finished = std::move(waiting_.front());
    waiting_.pop_front();
    finished->done({});
  }
  return any;
}

void frame_writer::fail_all(const error& why) {
  for (auto& each : std::exchange(waiting_, {}))
    each->done(tl::unexpected(why));
}

frame_reader::outcome frame_reader::poll() {
  outcome result;
  std::size_t budget = ring_capacity;
  while (budget != 0 && !is_damaged()) {
    const auto bytes = ring_.next();
    if (bytes.empty())
      break;
    const auto part = bytes.first(std::min(bytes.size(), budget));
    read(part);
    ring_.take(part.size());
    budget -= part.size();
  }
  result.has_read = budget != ring_capacity;
  result.writer_waits = result.has_read && ring_.release();
  return result;
}

void frame_reader::read(std::span<const std::byte> bytes) {
  while (!is_damaged_) {
    const auto count = std::min<std::uint64_t>(bytes.size(), part_bytes() - done_);
    keep(bytes.first(count));
    done_ += count;
    bytes = bytes.subspan(count);
    if (done_ < part_bytes())
      return;
    end_part();
  }
}

std::uint64_t frame_reader::part_bytes() const {
  switch (part_) {
  case part::lengths: return sizeof lengths_;
  case part::header: return lengths_[0];
  default: return lengths_[1];
  }
}

void frame_reader::keep(std::span<const std::byte> bytes) {
  if (bytes.empty())
    return;
  if (part_ == part::lengths)
    std::memcpy(reinterpret_cast<std::byte*>(lengths_) + done_, bytes.data(), bytes.size());
  else if (part_ == part::header)
    header_.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  else if (content_)
    std::memcpy(content_->payload.data() + done_, bytes.data(), bytes.size());
}

void frame_reader::end_part() {
  done_ = 0;
  switch (part_) {
  case part::lengths:
    is_damaged_ = lengths_[0] > max_header_bytes;
    header_.clear();
    part_ = part::header;
    break;
  case part::header:
    content_ = inbox_->accept(header_, lengths_[1]);
    part_ = part::payload;
    break;
  case part::payload:
    part_ = part::lengths;
    if (auto arrived = std::exchange(content_, std::nullopt))
      inbox_->arrive(std::move(*arrived));
    break;
  }
}

} // namespace troupe::transport
