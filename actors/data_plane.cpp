#include "troupe/actors/data_plane.hpp"

#include "troupe/base/identity.hpp"

#include <map>
#include <utility>

#include <spdlog/spdlog.h>

namespace troupe::actors {

namespace {

/// Frames that wait for one peer to be connected. The micro-batches in flight bound what can be
/// useful; more than this is a peer that never comes.
constexpr std::size_t max_held_frames = 1024;

/// What stop() gives sends that are under way.
constexpr auto drain_time = std::chrono::milliseconds(200);

/// Logs frames that were dropped: the first at once, more of them once a second. Nothing is lost by
/// one: who needs it asks again.
class drop_log {
public:
  void add(const error& why) {
    ++num_;
    auto now = std::chrono::steady_clock::now();
    if (now - last_ < std::chrono::seconds(1))
      return;
    spdlog::warn("{} frame(s) dropped; {}", num_, why.text());
    last_ = now;
    num_ = 0;
  }

private:
  std::uint64_t num_ = 0;
  std::chrono::steady_clock::time_point last_{};
};

} // namespace

void frame_box::put(frame_ptr arrived) {
  {
    std::lock_guard lock(mutex_);
    frames_.push_back(std::move(arrived));
  }
  changed_.notify_one();
}

void frame_box::nudge() {
  {
    std::lock_guard lock(mutex_);
    nudged_ = true;
  }
  changed_.notify_one();
}

bool frame_box::is_ready() const {
  std::lock_guard lock(mutex_);
  return nudged_ || !frames_.empty();
}

bool frame_box::take(std::vector<frame_ptr>& out, time_point deadline) {
  out.clear();
  std::unique_lock lock(mutex_);
  if (!changed_.wait_until(lock, deadline, [this] { return nudged_ || !frames_.empty(); }))
    return false;
  nudged_ = false;
  out.swap(frames_);
  return true;
}

expected<std::shared_ptr<data_plane>> data_plane::prepare(const std::string& interface,
                                                          bool checksums) {
  std::shared_ptr<data_plane> plane(new data_plane);
  transport::endpoint_options options;
  options.interface = interface;
  options.checksums = checksums;
  transport::endpoint_callbacks callbacks;
  auto* raw = plane.get();
  callbacks.on_frame = [raw](transport::frame arrived) {
    raw->deliver(std::make_shared<transport::frame>(std::move(arrived)));
  };
  callbacks.on_peer_lost = [raw](const std::string& peer, std::uint64_t lost, const error& why) {
    spdlog::info("lost {} (incarnation {}): {}", peer, lost, why.cause);
    raw->lose(peer, lost);
  };
  callbacks.on_dropped = [log = std::make_shared<drop_log>()](const proto::FrameHeader&,
                                                              const error& why) { log->add(why); };
  auto endpoint = transport::endpoint::start(options, std::move(callbacks));
  if (!endpoint)
    return tl::unexpected(endpoint.error());
  plane->endpoint_ = std::move(*endpoint);
  return plane;
}

void data_plane::identify(const std::string& worker, std::uint64_t incarnation) {
  name_ = worker;
  endpoint_->identify(worker, incarnation);
}

expected<std::shared_ptr<data_plane>> data_plane::start(const std::string& worker,
                                                        std::uint64_t incarnation,
                                                        const std::string& interface,
                                                        bool checksums) {
  auto plane = prepare(interface, checksums);
  if (plane)
    (*plane)->identify(worker, incarnation);
  return plane;
}

data_plane::~data_plane() {
  stop();
}

void data_plane::stop() {
  if (endpoint_)
    endpoint_->stop(drain_time);
}

std::string data_plane::address() const {
  return endpoint_->address();
}

void data_plane::route_boundary(std::uint32_t replica, std::uint32_t stage,
                                std::function<void(frame_ptr)> handler) {
  boundaries_[{replica, stage}] = std::move(handler);
}

void data_plane::route_dispatch(std::uint32_t group, std::function<void(frame_ptr)> handler) {
  dispatches_[group] = std::move(handler);
}

void data_plane::route_replies(std::uint32_t replica, std::uint32_t stage,
                               std::shared_ptr<frame_box> box) {
  boxes_[{replica, stage}] = std::move(box);
}

bool data_plane::wait(frame_box& box, std::vector<frame_ptr>& out, time_point deadline) {
  if (!box.is_ready())
    endpoint_->drive([&box] { return box.is_ready(); }, deadline);
  return box.take(out, deadline);
}

void data_plane::deliver(frame_ptr arrived) {
  const auto& header = arrived->header;
  if (num_suspects_.load(std::memory_order_relaxed) != 0)
    trust(header.sender());
  std::pair<std::uint32_t, std::uint32_t> key{header.replica(), header.actor_index()};
  switch (header.kind()) {
  case proto::BOUNDARY:
  case proto::BOUNDARY_WANTED:
    if (auto route = boundaries_.find(key); route != boundaries_.end())
      return route->second(std::move(arrived));
    break;
  case proto::DISPATCH:
    if (auto route = dispatches_.find(header.actor_index()); route != dispatches_.end())
      return route->second(std::move(arrived));
    break;
  case proto::COMBINE:
  case proto::REFUSED:
    if (auto route = boxes_.find(key); route != boxes_.end())
      return route->second->put(std::move(arrived));
    break;
  default: break;
  }
  spdlog::warn("dropped a frame from {} that is for nobody here: {}", header.sender(),
               header.ShortDebugString());
}

void data_plane::nudge_all() {
  for (auto& [key, box] : boxes_)
    box->nudge();
  endpoint_->interrupt();
}

void data_plane::lose(const std::string& worker, std::uint64_t incarnation) {
  {
    std::lock_guard lock(mutex_);
    auto found = peers_.find(worker);
    if (found == peers_.end() || found->second.incarnation != incarnation)
      return;
    found->second.lost = true;
  }
  num_changes_.fetch_add(1, std::memory_order_release);
  nudge_all();
}

void data_plane::suspect(const target& silent) {
  std::lock_guard lock(mutex_);
  auto found = peers_.find(silent.worker);
  if (found == peers_.end() || found->second.incarnation != silent.incarnation)
    return;
  if (found->second.suspect_until == time_point{})
    num_suspects_.fetch_add(1, std::memory_order_relaxed);
  found->second.suspect_until = std::chrono::steady_clock::now() + suspicion;
  num_changes_.fetch_add(1, std::memory_order_release);
}

void data_plane::trust(const std::string& worker) {
  std::lock_guard lock(mutex_);
  auto found = peers_.find(worker);
  if (found == peers_.end() || found->second.suspect_until == time_point{})
    return;
  found->second.suspect_until = {};
  num_suspects_.fetch_sub(1, std::memory_order_relaxed);
  num_changes_.fetch_add(1, std::memory_order_release);
}

void data_plane::take_view(const proto::ClusterView& view) {
  std::vector<std::pair<std::string, std::vector<held_frame>>> released;
  auto renew = [this](peer& p, std::uint64_t incarnation) {
    if (p.suspect_until != time_point{})
      num_suspects_.fetch_sub(1, std::memory_order_relaxed);
    p = {incarnation, false, {}};
  };
  {
    std::lock_guard lock(mutex_);
    if (view.version() <= version_)
      return;
    version_ = view.version();
    epoch_ = view.epoch();
    groups_.clear();
    std::string own_node;
    for (const auto& worker : view.workers())
      if (worker.plan().name() == name_)
        own_node = worker.plan().node();
    for (const auto& worker : view.workers()) {
      const auto& name = worker.plan().name();
      bool runs = worker.state() == proto::RUNNING;
      peer& p = peers_[name];
      if (runs && p.incarnation != worker.incarnation()) {
        endpoint_->connect(name, worker.incarnation(), worker.transport_address());
        renew(p, worker.incarnation());
      } else if (!runs && p.incarnation != 0) {
        endpoint_->disconnect(name);
        renew(p, 0);
      }
      bool is_near = worker.plan().node() == own_node;
      for (const auto& actor : worker.plan().actors())
        if (actor.kind() == proto::EXPERT_GROUP)
          groups_[actor.index()].push_back(
            {{name, runs ? worker.incarnation() : 0}, false, is_near, {}});
      auto held = held_.find(name);
      if (runs && held != held_.end()) {
        released.emplace_back(name, std::move(held->second));
        held_.erase(held);
      }
    }
  }
  num_changes_.fetch_add(1, std::memory_order_release);
  for (auto& [name, frames] : released)
    for (auto& f : frames)
      send({name, f.incarnation}, std::move(f.header), std::move(f.payload));
  nudge_all();
}

std::uint64_t data_plane::epoch() const {
  std::lock_guard lock(mutex_);
  return epoch_;
}

void data_plane::copies(std::uint32_t group, std::vector<copy>& out) const {
  out.clear();
  std::lock_guard lock(mutex_);
  auto found = groups_.find(group);
  if (found == groups_.end())
    return;
  out = found->second;
  for (auto& each : out) {
    auto p = peers_.find(each.where.worker);
    each.is_reachable = each.where.incarnation != 0 && p != peers_.end() && !p->second.lost;
    each.suspect_until = p == peers_.end() ? time_point{} : p->second.suspect_until;
  }
}

void data_plane::send(const target& to, proto::FrameHeader header,
                      transport::payload_view payload) {
  {
    std::lock_guard lock(mutex_);
    const peer& p = peers_[to.worker];
    if (to.incarnation < p.incarnation)
      return;
    if (to.incarnation > p.incarnation) {
      auto& waiting = held_[to.worker];
      if (waiting.size() >= max_held_frames)
        waiting.erase(waiting.begin());
      waiting.push_back({std::move(header), std::move(payload), to.incarnation});
      return;
    }
  }
  post(to.worker, std::move(header), std::move(payload));
}

void data_plane::post(const std::string& worker, proto::FrameHeader header,
                      transport::payload_view payload) {
  endpoint_->send(worker, std::move(header), std::move(payload), [worker](expected<void> sent) {
    // Nothing is lost by this: the frame is sent again when the peer's successor is in the view.
    if (!sent)
      spdlog::debug("a frame to {} was not sent: {}", worker, sent.error().cause);
  });
}

} // namespace troupe::actors
