#include "troupe/transport/ring_inlets.hpp"

#include <algorithm>
#include <utility>

#include <spdlog/spdlog.h>

namespace troupe::transport {

std::vector<ring_inlets::inlet>::iterator ring_inlets::find(const std::string& name) {
  return std::find_if(inlets_.begin(), inlets_.end(),
                      [&](const inlet& each) { return each.from.name == name; });
}

void ring_inlets::open(const sender& from, const proto::RingOffer& offer) {
  if (const auto earlier = find(from.name); earlier != inlets_.end()) {
    if (earlier->from.incarnation > from.incarnation)
      return;
    read_to_end(earlier);
  }
  auto waker = neighbour::open(offer.from());
  if (!waker) {
    spdlog::info("'{}' offers a ring: {}", from.name, waker.error().cause);
    return;
  }
  auto ring = ring_reader::attach(waker->pid(), static_cast<int>(offer.memory()));
  if (!ring) {
    spdlog::info("'{}' offers a ring: {}", from.name, ring.error().cause);
    return;
  }
  inlets_.push_back({from, offer, std::move(*waker), frame_reader{std::move(*ring), inbox_}});
  inlets_.back().waker.ring(); // frames wait for the ring to be attached
}

void ring_inlets::close(const std::string& name, const proto::RingOffer& offer) {
  const auto found = find(name);
  if (found != inlets_.end() && found->offer.memory() == offer.memory()
      && found->offer.from().mark() == offer.from().mark())
    read_to_end(found);
}

void ring_inlets::drain(const std::string& name) {
  if (const auto found = find(name); found != inlets_.end())
    found->reader.poll();
}

void ring_inlets::read_to_end(std::vector<inlet>::iterator which) {
  auto ended = std::move(*which);
  inlets_.erase(which);
  ended.reader.poll();
}

bool ring_inlets::poll() {
  bool busy = false;
  for (auto& each : inlets_) {
    const auto outcome = each.reader.poll();
    busy |= outcome.has_read;
    if (outcome.writer_waits)
      each.waker.ring();
    if (each.reader.is_damaged())
      damaged_.push_back(each.from);
  }
  for (const auto& each : damaged_)
    std::erase_if(inlets_, [&](const inlet& other) { return other.from == each; });
  return busy;
}

bool ring_inlets::is_ready() const {
  return std::any_of(inlets_.begin(), inlets_.end(),
                     [](const inlet& each) { return each.reader.is_ready(); });
}

std::vector<ring_inlets::sender> ring_inlets::take_damaged() {
  return std::exchange(damaged_, {});
}

} // namespace troupe::transport
