#include "troupe/placement/seating.hpp"

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <optional>
#include <tuple>
#include <utility>

namespace troupe::placement {

namespace {

/// The seats that are still free. Every device has `floor(actors / devices)` seats of its
/// own; the seats that are left after that are shared, at most one a device. All of them
/// together are exactly as many as the actors, so whoever fills them shares evenly.
class free_seats {
public:
  free_seats(std::span<const std::uint32_t> num_devices, std::uint64_t num_actors) {
    const std::uint64_t total =
      std::accumulate(num_devices.begin(), num_devices.end(), std::uint64_t{0});
    own_ = num_actors / total;
    shared_left_ = num_actors % total;
    for (const std::uint32_t devices : num_devices) {
      load_.emplace_back(devices, 0);
      own_left_.push_back(own_ * devices);
      shareable_.push_back(devices);
    }
  }

  std::uint32_t num_nodes() const { return static_cast<std::uint32_t>(load_.size()); }
  std::uint32_t num_devices(std::uint32_t node) const {
    return static_cast<std::uint32_t>(load_[node].size());
  }
  std::uint64_t load(seat at) const { return load_[at.node][at.device]; }

  bool is_free(seat at) const { return load(at) < own_ || (load(at) == own_ && shared_left_ > 0); }

  std::uint64_t free_on(std::uint32_t node) const {
    return own_left_[node] + std::min<std::uint64_t>(shareable_[node], shared_left_);
  }

  void take(seat at) {
    if (load_[at.node][at.device]++ < own_) {
      --own_left_[at.node];
    } else {
      --shareable_[at.node];
      --shared_left_;
    }
  }

private:
  std::uint64_t own_ = 0;
  std::uint64_t shared_left_ = 0;
  std::vector<std::vector<std::uint64_t>> load_; // [node][device]
  std::vector<std::uint64_t> own_left_;          // by node
  std::vector<std::uint64_t> shareable_;         // by node: devices without a shared seat taken
};

/// The node for the next stages of a replica: one with room for all `wanted`, on which
/// fewest replicas are; failing that, the one with most room.
std::uint32_t choose_node(const free_seats& seats, std::span<const std::uint32_t> replicas_on,
                          std::uint64_t wanted) {
  std::uint32_t best = 0;
  for (std::uint32_t node = 1; node < seats.num_nodes(); ++node) {
    const auto rank = [&](std::uint32_t n) {
      const std::uint64_t room = seats.free_on(n);
      const bool all_fit = room >= wanted;
      return std::tuple(!all_fit, all_fit ? replicas_on[n] : 0, ~room);
    };
    if (rank(node) < rank(best))
      best = node;
  }
  return best;
}

/// The free device of `node` with fewest of the copies `taken`, then with least load.
/// Needs one that is free.
seat choose_device(const free_seats& seats, std::span<const seat> taken, std::uint32_t node) {
  std::optional<seat> best;
  std::pair<std::ptrdiff_t, std::uint64_t> best_rank;
  for (std::uint32_t device = 0; device < seats.num_devices(node); ++device) {
    const seat here{node, device};
    if (!seats.is_free(here))
      continue;
    const std::pair rank(std::ranges::count(taken, here), seats.load(here));
    if (!best || rank < best_rank) {
      best = here;
      best_rank = rank;
    }
  }
  return *best;
}

std::vector<seat> seat_replica(free_seats& seats, std::vector<std::uint32_t>& replicas_on,
                               std::uint32_t num_stages) {
  std::vector<seat> taken;
  while (taken.size() < num_stages) {
    const std::uint64_t wanted = num_stages - taken.size();
    const std::uint32_t node = choose_node(seats, replicas_on, wanted);
    ++replicas_on[node];
    for (std::uint64_t n = std::min(wanted, seats.free_on(node)); n > 0; --n) {
      const seat chosen = choose_device(seats, {}, node);
      seats.take(chosen);
      taken.push_back(chosen);
    }
  }
  return taken;
}

/// Copies avoid each other's devices, then each other's nodes. Taking from where most is
/// free keeps as many places as possible open for the copies of later groups.
std::vector<seat> seat_group(free_seats& seats, std::uint32_t num_copies) {
  std::vector<seat> taken;
  while (taken.size() < num_copies) {
    std::optional<seat> best;
    std::tuple<std::ptrdiff_t, std::ptrdiff_t, std::uint64_t> best_rank;
    for (std::uint32_t node = 0; node < seats.num_nodes(); ++node) {
      const std::uint64_t room = seats.free_on(node);
      if (room == 0)
        continue;
      const std::ptrdiff_t on_node = std::ranges::count(taken, node, &seat::node);
      // With no copy on the node any of its devices will do: look for one later.
      const seat here = on_node == 0 ? seat{node, 0} : choose_device(seats, taken, node);
      const std::tuple rank(on_node == 0 ? 0 : std::ranges::count(taken, here), on_node, ~room);
      if (!best || rank < best_rank) {
        best = here;
        best_rank = rank;
      }
    }
    const seat chosen = choose_device(seats, taken, best->node);
    seats.take(chosen);
    taken.push_back(chosen);
  }
  return taken;
}

} // namespace

seating seat_actors(std::span<const std::uint32_t> num_devices, std::uint32_t num_replicas,
                    std::uint32_t num_stages, std::uint32_t num_groups, std::uint32_t num_copies) {
  const std::uint64_t num_actors =
    std::uint64_t{num_replicas} * num_stages + std::uint64_t{num_groups} * num_copies;
  free_seats seats(num_devices, num_actors);
  std::vector<std::uint32_t> replicas_on(num_devices.size(), 0);
  seating result;
  // Stages come first: keeping a replica together needs room in one place.
  for (std::uint32_t r = 0; r < num_replicas; ++r)
    result.stages.push_back(seat_replica(seats, replicas_on, num_stages));
  for (std::uint32_t g = 0; g < num_groups; ++g)
    result.experts.push_back(seat_group(seats, num_copies));
  return result;
}

} // namespace troupe::placement
