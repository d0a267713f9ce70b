#pragma once

#include "troupe/base/error.hpp"
#include "troupe/transport/endpoint.hpp"
#include "cluster.pb.h"

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

/// Replies for one waiting thread, filled by the progress thread.
class reply_box {
public:
  using time_point = std::chrono::steady_clock::time_point;

  void put(frame_ptr reply);

  /// Wakes the waiting thread without a reply: peers or epoch have changed.
  void nudge();

  /// Takes all replies into `out` (cleared first). Waits for one, for a nudge since the last
  /// call, or for the deadline. False: the deadline passed.
  bool take(std::vector<frame_ptr>& out, time_point deadline);

private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<frame_ptr> replies_;
  bool nudged_ = false;
};

/// Where an actor of a peer can be reached.
struct frame_target {
  std::string worker;
  std::uint64_t incarnation = 0; ///< 0: nowhere at the moment
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

  static expected<std::shared_ptr<data_plane>>
  start(const std::string& worker, std::uint64_t incarnation, const std::string& interface);
  ~data_plane() override;

  /// How peers reach this process; opaque.
  std::string address() const;

  /// Sets where frames go that are addressed to an actor of this process. Handlers run on
  /// the progress thread and must not block.
  void route_boundary(std::uint32_t replica, std::uint32_t stage,
                      std::function<void(frame_ptr)> handler);
  void route_dispatch(std::uint32_t group, std::function<void(frame_ptr)> handler);
  void route_replies(std::uint32_t replica, std::uint32_t stage, std::shared_ptr<reply_box> box);

  /// Connects to the peers of a newer view and forgets those that are gone.
  void take_view(const proto::ClusterView& view);

  /// The epoch of the newest view.
  std::uint64_t epoch() const;

  /// The first copy of an expert group that can be reached.
  target expert_group(std::uint32_t index) const;

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
  };
  struct held_frame {
    proto::FrameHeader header;
    transport::payload_view payload;
    std::uint64_t incarnation = 0;
  };

  data_plane() = default;
  void deliver(frame_ptr arrived);
  void lose(const std::string& worker, std::uint64_t incarnation);
  void nudge_all();
  void post(const std::string& worker, proto::FrameHeader header, transport::payload_view payload);

  std::string name_;
  std::map<std::pair<std::uint32_t, std::uint32_t>, std::function<void(frame_ptr)>> boundaries_;
  std::map<std::uint32_t, std::function<void(frame_ptr)>> dispatches_;
  std::map<std::pair<std::uint32_t, std::uint32_t>, std::shared_ptr<reply_box>> boxes_;

  mutable std::mutex mutex_; // guards what follows; held for look-ups and view changes only
  std::uint64_t epoch_ = 0;
  std::uint64_t version_ = 0;
  std::map<std::string, peer> peers_;
  std::map<std::uint32_t, std::vector<target>> groups_; ///< copies in order
  std::map<std::string, std::vector<held_frame>> held_;

  std::unique_ptr<transport::endpoint> endpoint_;
};

} // namespace troupe::actors
