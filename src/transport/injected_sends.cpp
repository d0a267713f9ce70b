#include "troupe/transport/injected_sends.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

namespace troupe::transport {

namespace {

std::unique_ptr<send_operation> copy_of(const send_operation& original) {
  auto result = std::make_unique<send_operation>();
  result->to = original.to;
  result->header = original.header;
  result->payload = original.payload;
  result->done = [](const expected<void>&) {};
  return result;
}

/// Changes the header; a frame whose own header cannot be read is left alone.
template <class Change>
void change_header(send_operation& operation, Change change) {
  proto::FrameHeader header;
  if (!header.ParseFromString(operation.header))
    return;
  change(header);
  operation.header = header.SerializeAsString();
}

/// Changes a byte of the payload, or, where there is none, of the check sum.
void corrupt(send_operation& operation, std::uint64_t random) {
  auto size = operation.payload.bytes.size();
  if (size == 0) {
    change_header(operation, [](auto& header) { header.set_checksum(header.checksum() + 1); });
    return;
  }
  auto damaged = std::make_shared<std::vector<std::byte>>(operation.payload.bytes.begin(),
                                                          operation.payload.bytes.end());
  (*damaged)[random % size] ^= std::byte{static_cast<unsigned char>(1U << (random / size % 8))};
  operation.payload = {*damaged, damaged};
}

} // namespace

void injected_sends::take(operation_ptr operation, std::optional<faults::fault> what,
                          time_point now) {
  const auto peer = operation->to;
  switch (what ? what->what : faults::kind::none) {
  case faults::kind::drop:
    operation->done({}); // as for a frame that was lost on its way
    return;
  case faults::kind::delay:
    held_.push_back({std::move(operation), now + std::chrono::milliseconds(what->delay_ms), false});
    return;
  case faults::kind::reorder:
    held_.push_back({std::move(operation), now + longest_hold, true});
    return;
  case faults::kind::duplicate: ready_.push_back(copy_of(*operation)); break;
  case faults::kind::corrupt: corrupt(*operation, what->random); break;
  case faults::kind::truncate: {
    auto& bytes = operation->payload.bytes;
    bytes = bytes.first(bytes.empty() ? 0 : what->random % bytes.size());
    break;
  }
  case faults::kind::wrong_epoch:
    change_header(*operation, [](auto& header) {
      header.set_epoch(header.epoch() == 0 ? 0 : header.epoch() - 1);
    });
    break;
  default: break;
  }
  ready_.push_back(std::move(operation));
  release_followers(peer);
}

void injected_sends::release_followers(const std::string& peer) {
  for (auto& each : held_)
    if (each.until_next && each.operation->to == peer)
      ready_.push_back(std::move(each.operation));
  std::erase_if(held_, [](const auto& each) { return each.operation == nullptr; });
}

void injected_sends::release_due(time_point now) {
  for (auto& each : held_)
    if (each.due <= now)
      ready_.push_back(std::move(each.operation));
  std::erase_if(held_, [](const auto& each) { return each.operation == nullptr; });
}

} // namespace troupe::transport
