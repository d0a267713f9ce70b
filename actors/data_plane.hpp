#pragma once

#include "troupe/base/error.hpp"
#include "troupe/recovery/call_policy.hpp"
#include "troupe/transport/endpoint.hpp"
#include "cluster.pb.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace troupe::actors {

using frame_ptr = std::shared_ptr<transport::frame>;

/// Frames for one waiting thread, filled by whoever hears them.
class frame_box {
public:
  using time_point = std::chrono::steady_clock::time_point;

  void put(frame_ptr arrived);

  /// Wakes the waiting thread without a frame: peers or epoch have changed.
  void nudge();

  /// There is a frame, or was a nudge since the last `take`.
  bool is_ready() const;

  /// Takes all frames into `out` (cleared first). Waits for one, for a nudge since the last
  /// call, or for the deadline. False: the deadline passed.
  bool take(std::vector<frame_ptr>& out, time_point deadline);

private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<frame_ptr> frames_;
  bool nudged_ = false;
};

/// Where an actor of a peer can be reached.
struct frame_target {
  std::string worker;
  std::uint64_t incarnation = 0; ///< 0: nowhere at the moment
  bool operator==(const frame_target&) const = default;
};

/// Takes frames for other actors.
class frame_sink {
public:
  virtual ~frame_sink() = default;

  /// Sends a frame to that incarnation of a worker, now or once it is connected. Dropped
  /// if a newer incarnation takes its place: whoever still needs the frame asks for it again.
  virtual void send(const frame_target& to, proto::FrameHeader header,
                    transport::payload_view payload) = 0;
};

/// One process's side of the tensor traffic: knows which worker runs which peer, holds
/// frames until their receiver is connected and hands arrivals to whoever they are for.
///
/// Shared by the actors of a worker. `take_view` is called by the worker actor only, everything
/// else on any thread. Routes are set before the address is given to anybody.
class data_plane final : public frame_sink {
public:
  using target = frame_target;
  using time_point = std::chrono::steady_clock::time_point;

  /// A copy of an expert group.
  struct copy {
    target where;
    bool is_reachable = false;
    bool is_near = false;       ///< on this process's node
    time_point suspect_until{}; ///< avoided until then
  };

  /// How long a copy that did not answer in time is avoided, unless it answers.
  static constexpr std::chrono::seconds suspicion{2};

  /// Opens the transport for a process that does not know yet who it is to be: a standby. Nothing
  /// else may be called before `identify`. `checksums` false: for measuring only.
  static expected<std::shared_ptr<data_plane>> prepare(const std::string& interface,
                                                       bool checksums = true);
  void identify(const std::string& worker, std::uint64_t incarnation);

  /// Both at once.
  static expected<std::shared_ptr<data_plane>> start(const std::string& worker,
                                                     std::uint64_t incarnation,
                                                     const std::string& interface,
                                                     bool checksums = true);
  ~data_plane() override;

  /// How peers reach this process; opaque.
  std::string address() const;

  /// Sets where frames go that are addressed to an actor of this process. Handlers run on
  /// the thread that drives the transport and must not block.
  void route_boundary(std::uint32_t replica, std::uint32_t stage,
                      std::function<void(frame_ptr)> handler);
  void route_dispatch(std::uint32_t group, std::function<void(frame_ptr)> handler);
  void route_replies(std::uint32_t replica, std::uint32_t stage, std::shared_ptr<frame_box> box);

  /// As `box.take`. Where nobody else waits so, the calling thread drives the transport meanwhile
  /// and hears the frames itself; they are handed to routes of other actors too, on this thread.
  bool wait(frame_box& box, std::vector<frame_ptr>& out, time_point deadline);

  /// Connects to the peers of a newer view and forgets those that are gone.
  void take_view(const proto::ClusterView& view);

  /// The epoch of the newest view.
  std::uint64_t epoch() const;

  /// The copies of an expert group, in order. Fills `out`, whose memory is used again.
  void copies(std::uint32_t group, std::vector<copy>& out) const;

  /// Counts up whenever `copies` has something new to say. Any thread; takes no lock.
  std::uint64_t num_changes() const { return num_changes_.load(std::memory_order_acquire); }

  /// A process did not answer in time. It is avoided for a while, until it sends something or
  /// another incarnation takes its place.
  void suspect(const target& silent);

  void send(const frame_target& to, proto::FrameHeader header,
            transport::payload_view payload) override;

  /// Memory for payloads.
  transport::buffer_pool& buffers() { return endpoint_->pool(); }

  /// Ends all traffic; nothing is handed to the routes afterwards.
  void stop();

private:
  struct peer {
    std::uint64_t incarnation = 0;
    bool lost = false;
    time_point suspect_until{};
  };
  struct held_frame {
    proto::FrameHeader header;
    transport::payload_view payload;
    std::uint64_t incarnation = 0;
  };

  data_plane() = default;
  void deliver(frame_ptr arrived);
  void trust(const std::string& worker);
  void lose(const std::string& worker, std::uint64_t incarnation);
  void nudge_all();
  void post(const std::string& worker, proto::FrameHeader header, transport::payload_view payload);

  std::string name_;
  std::map<std::pair<std::uint32_t, std::uint32_t>, std::function<void(frame_ptr)>> boundaries_;
  std::map<std::uint32_t, std::function<void(frame_ptr)>> dispatches_;
  std::map<std::pair<std::uint32_t, std::uint32_t>, std::shared_ptr<frame_box>> boxes_;

  mutable std::mutex mutex_; // guards what follows; held for look-ups and view changes only
  std::uint64_t epoch_ = 0;
  std::uint64_t version_ = 0;
  std::map<std::string, peer> peers_;
  std::map<std::uint32_t, std::vector<copy>> groups_; ///< copies in order, as of the view
  std::map<std::string, std::vector<held_frame>> held_;

  std::atomic<std::uint64_t> num_changes_{1};
  std::atomic<std::uint32_t> num_suspects_{0}; ///< an upper bound: marks that were not lifted

  std::unique_ptr<transport::endpoint> endpoint_;
};

} // namespace troupe::actors
