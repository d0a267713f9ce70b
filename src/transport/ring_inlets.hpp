#pragma once

#include "troupe/transport/doorbell.hpp"
#include "troupe/transport/frame_stream.hpp"
#include "troupe/transport/inbox.hpp"

#include <cstdint>
#include <string>
#include <vector>

#include <transport.pb.h>

namespace troupe::transport {

/// The rings by which neighbours send to this process. Used by the thread that drives the endpoint.
class ring_inlets {
public:
  /// A neighbour and one of its incarnations.
  struct sender {
    std::string name;
    std::uint64_t incarnation = 0;
    bool operator==(const sender&) const = default;
  };

  explicit ring_inlets(inbox& into) : inbox_(into) {}

  /// From now on reads what `from` offers, instead of what an earlier process or connection of that
  /// name did, which is read to its end. An offer that cannot be opened is logged: the sender,
  /// whose ring nobody attaches, goes by UCX after a while.
  void open(const sender& from, const proto::RingOffer& offer);

  /// Reads what came by this offer and forgets it: its sender will write no more.
  void close(const std::string& name, const proto::RingOffer& offer);

  /// Reads what a sender has left that seems to be gone. If it is not, it goes on being heard, as
  /// far as it is not fenced off.
  void drain(const std::string& name);

  /// Reads what is there. True when there was something.
  bool poll();

  bool is_ready() const;

  /// Senders whose rings were given up since the last call, since what was in them made no sense.
  std::vector<sender> take_damaged();

private:
  struct inlet {
    sender from;
    proto::RingOffer offer;
    neighbour waker;
    frame_reader reader;
  };

  std::vector<inlet>::iterator find(const std::string& name);
  void read_to_end(std::vector<inlet>::iterator which);

  inbox& inbox_;
  std::vector<inlet> inlets_;
  std::vector<sender> damaged_;
};

} // namespace troupe::transport
