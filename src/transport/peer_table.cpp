#include "troupe/transport/peer_table.hpp"

#include "troupe/base/fault_point.hpp"
#include "troupe/transport/address.hpp"

#include <algorithm>
#include <chrono>
#include <optional>
#include <utility>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

namespace troupe::transport {

namespace {

using clock = std::chrono::steady_clock;

/// How long frames wait for the hello of a new peer. Longer than two processes that are told
/// of each other are apart; a peer that does not connect back costs this once.
constexpr std::chrono::milliseconds hello_patience{500};

} // namespace

/// A connection to one process. UCX holds its address from open to closed.
struct peer {
  peer_table* table = nullptr;
  std::string name;
  std::uint64_t incarnation = 0;
  ucp_ep_h handle = nullptr;    ///< null only if UCX could not open it
  clock::time_point ready_at{}; ///< hello or not
  bool hello_heard = false;
  bool hello_sent = false;    ///< our TCP connection stands
  bool flush_pending = false; ///< UCX still works on it
  bool ready = false;         ///< frames may go out
  bool retired = false;       ///< off the table; what UCX says about it is no news
  bool closed = false;        ///< UCX has let go of `handle`
  std::optional<error> failure;
  std::string offer; ///< a serialised RingOffer, payload of hello and goodbye
  std::optional<frame_writer> ring;
  std::optional<neighbour> near;                        ///< whom to wake for the ring
  std::vector<std::unique_ptr<send_operation>> waiting; ///< sent before it was ready
  std::vector<std::unique_ptr<send_operation>> in_flight;

  static void on_error(void* self, ucp_ep_h, ucs_status_t status) noexcept {
    auto& lost = *static_cast<peer*>(self);
    lost.fail(to_error(status, lost.name));
  }

  void fail(error why) {
    if (retired || failure)
      return;
    failure = std::move(why);
    table->failed_.push_back(name);
  }

  std::unique_ptr<send_operation> take(send_operation& operation) {
    const std::size_t place = operation.place;
    std::swap(in_flight[place], in_flight.back());
    in_flight[place]->place = place;
    auto result = std::move(in_flight.back());
    in_flight.pop_back();
    return result;
  }

  void finish(send_operation& operation, ucs_status_t status) {
    const auto finished = take(operation);
    if (!finished->done) // failed already when the peer was given up
      return;
    if (status == UCS_OK)
      finished->done({});
    else
      finished->done(tl::unexpected(to_error(status, name)));
  }

  void fail_all(const error& why) {
    for (auto* operations : {&waiting, &in_flight})
      for (auto& each : *operations)
        if (auto done = std::exchange(each->done, nullptr))
          done(tl::unexpected(why));
    waiting.clear();
    if (ring)
      ring->fail_all(why);
  }

  bool push_ring() {
    const bool busy = ring->push();
    if (busy)
      near->ring();
    return busy;
  }

  bool waits_for_ring() const { return ring && !ring->ring().is_attached(); }
};

peer_table::peer_table(ucx_worker& worker, inbox& fences, const proto::FrameHeader& own,
                       const proto::HostPlace* place, lost_callback on_lost)
  : worker_(worker),
    fences_(fences),
    on_lost_(std::move(on_lost)),
    own_header_(own.SerializeAsString()),
    place_(place),
    inlets_(fences) {}

peer_table::~peer_table() = default;

template <peer_table::message_handler Handler>
expected<void> peer_table::listen_for(unsigned message_id) {
  ucp_am_handler_param_t params{};
  params.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS
                      | UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
  params.id = message_id;
  params.flags = UCP_AM_FLAG_WHOLE_MSG;
  params.arg = this;
  params.cb = [](void* self, const void* header, std::size_t length, void* payload,
                 std::size_t payload_length, const ucp_am_recv_param_t* param) noexcept {
    const bool is_here = (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) == 0;
    proto::FrameHeader from;
    if (is_here && from.ParseFromArray(header, static_cast<int>(length))
        && !faults::is_cut_off(from.sender()))
      (static_cast<peer_table*>(self)->*Handler)(
        from, {static_cast<const char*>(payload), payload_length});
    return is_here ? UCS_OK : UCS_ERR_INVALID_PARAM;
  };
  const auto status = ucp_worker_set_am_recv_handler(worker_.get(), &params);
  if (status != UCS_OK)
    return fail(error_code::unavailable, fmt::format("UCX refuses a handler for messages {}: {}",
                                                     message_id, ucs_status_string(status)));
  return {};
}

expected<void> peer_table::listen() {
  if (auto done = listen_for<&peer_table::hear_hello>(hello_message_id); !done)
    return done;
  return listen_for<&peer_table::hear_goodbye>(goodbye_message_id);
}

void peer_table::hear_hello(const proto::FrameHeader& from, std::string_view offer) {
  auto& latest = hellos_[from.sender()];
  latest = std::max(latest, from.sender_incarnation());
  const auto known = connected_.find(from.sender());
  if (known != connected_.end() && known->second->incarnation == from.sender_incarnation())
    known->second->hello_heard = true;
  note_ring(true, from, offer);
}

void peer_table::hear_goodbye(const proto::FrameHeader& from, std::string_view offer) {
  const auto known = connected_.find(from.sender());
  if (known != connected_.end() && known->second->incarnation == from.sender_incarnation())
    known->second->fail(to_error(UCS_ERR_CONNECTION_RESET, from.sender()));
  note_ring(false, from, offer);
}

void peer_table::note_ring(bool is_hello, const proto::FrameHeader& from, std::string_view bytes) {
  proto::RingOffer offer;
  if (!bytes.empty() && place_ != nullptr
      && offer.ParseFromArray(bytes.data(), static_cast<int>(bytes.size())))
    news_.push_back({is_hello, {from.sender(), from.sender_incarnation()}, std::move(offer)});
}

/// UCX opens and closes connections without a word to the process at the other end. False
/// when it cannot go out at once: queueing it would begin the handshake of the first frame.
bool peer_table::say(unsigned message_id, peer& to) {
  ucx_used_ = true;
  ucp_request_param_t params{};
  params.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FLAG_FORCE_IMM_CMPL;
  params.flags = UCP_AM_SEND_FLAG_EAGER;
  return ucp_am_send_nbx(to.handle, message_id, own_header_.data(), own_header_.size(),
                         to.offer.data(), to.offer.size(), &params)
         == nullptr;
}

/// Nothing happens where the peer is not of this host, or there is no memory: then UCX carries the
/// frames.
void peer_table::offer_ring(peer& to, const proto::HostPlace& place) {
  auto near = neighbour::open(place);
  if (!near) {
    spdlog::debug("frames to '{}' go by UCX: {}", to.name, near.error().cause);
    return;
  }
  auto ring = ring_writer::create("troupe-ring-to-" + to.name);
  if (!ring) {
    spdlog::warn("frames to '{}' go by UCX: {}", to.name, ring.error().cause);
    return;
  }
  proto::RingOffer offer;
  *offer.mutable_from() = *place_;
  offer.set_memory(static_cast<std::uint32_t>(ring->fd()));
  to.offer = offer.SerializeAsString();
  to.ring.emplace(std::move(*ring));
  to.near.emplace(std::move(*near));
}

void peer_table::connect(const std::string& name, std::uint64_t incarnation,
                         const std::string& address) {
  settle(); // a connection that failed a moment ago is none
  const auto known = connected_.find(name);
  if (known != connected_.end() && known->second->incarnation == incarnation)
    return;
  // After a loss the fence stands one above what was lost, which may come back.
  const std::uint64_t fence = fences_.lowest(name);
  const std::uint64_t oldest = known == connected_.end() && fence > 0 ? fence - 1 : fence;
  if (incarnation < oldest) {
    const auto cause = fmt::format("incarnation {} of peer '{}' is older than {}, which is known",
                                   incarnation, name, oldest);
    on_lost_(name, incarnation, fail(error_code::stale_epoch, cause).value());
    return;
  }
  if (known != connected_.end()) {
    auto older = remove(name);
    const auto cause = fmt::format("incarnation {} of peer '{}' is replaced by {}",
                                   older->incarnation, name, incarnation);
    close(std::move(older), fail(error_code::peer_lost, cause).value());
  }
  auto& fresh = *(connected_[name] = std::make_unique<peer>());
  fresh.table = this;
  fresh.name = name;
  fresh.incarnation = incarnation;
  fresh.ready_at = clock::now() + hello_patience;
  const auto hello = hellos_.find(name);
  fresh.hello_heard = hello != hellos_.end() && hello->second == incarnation;
  fences_.fence(name, incarnation);
  ++num_waiting_;
  const auto way = read_address(address);
  if (!way)
    return fresh.fail(way.error());
  ucx_used_ = true;
  auto handle = worker_.open_endpoint(way->ucx(), &peer::on_error, &fresh);
  if (!handle)
    return fresh.fail(std::move(handle).error());
  fresh.handle = *handle;
  if (place_ != nullptr && way->has_place())
    offer_ring(fresh, way->place());
  fresh.hello_sent = say(hello_message_id, fresh);
}

/// Takes a peer off the table. Its hello counts no more: it will have to connect again.
std::unique_ptr<peer> peer_table::remove(const std::string& name) {
  auto result = std::move(connected_.at(name));
  connected_.erase(name);
  if (!result->ready)
    --num_waiting_;
  if (const auto hello = hellos_.find(name);
      hello != hellos_.end() && hello->second <= result->incarnation)
    hellos_.erase(hello);
  return result;
}

void peer_table::disconnect(const std::string& name) {
  if (connected_.find(name) == connected_.end())
    return;
  auto given_up = remove(name);
  fences_.fence(name, given_up->incarnation + 1);
  const auto cause = fmt::format("peer '{}' was disconnected", name);
  close(std::move(given_up), fail(error_code::peer_lost, cause).value());
}

void peer_table::send(std::unique_ptr<send_operation> operation) {
  const auto known = connected_.find(operation->to);
  if (known == connected_.end()) {
    operation->done(fail(error_code::peer_lost,
                         fmt::format("no connection to peer '{}'", operation->to),
                         "connect to it first, or to its new incarnation if it was lost"));
    return;
  }
  if (!known->second->ready)
    known->second->waiting.push_back(std::move(operation));
  else
    start(*known->second, std::move(operation));
}

void peer_table::start(peer& carrier, std::unique_ptr<send_operation> operation) {
  if (carrier.ring) {
    carrier.ring->take(std::move(operation));
    carrier.push_ring();
    return;
  }
  ucx_used_ = true;
  auto& started = *operation;
  started.carrier = &carrier;
  started.place = carrier.in_flight.size();
  carrier.in_flight.push_back(std::move(operation));

  ucp_request_param_t params{};
  params.op_attr_mask =
    UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMORY_TYPE;
  params.memory_type = UCS_MEMORY_TYPE_HOST;
  params.user_data = &started;
  params.cb.send = [](void* request, ucs_status_t status, void* data) noexcept {
    ucp_request_free(request);
    auto& finished = *static_cast<send_operation*>(data);
    finished.carrier->finish(finished, status);
  };
  const auto request =
    ucp_am_send_nbx(carrier.handle, frame_message_id, started.header.data(), started.header.size(),
                    started.payload.bytes.data(), started.payload.bytes.size(), &params);
  // Done on the spot, well or badly: then the callback is not called.
  if (request == nullptr || UCS_PTR_IS_ERR(request))
    carrier.finish(started, UCS_PTR_STATUS(request));
}

bool peer_table::start_those_ready() {
  if (num_waiting_ == 0)
    return false;
  bool any = false;
  const auto now = clock::now();
  for (auto& [name, each] : connected_) {
    if (each->ready || each->failure)
      continue;
    if (!each->hello_sent)
      each->hello_sent = say(hello_message_id, *each);
    const bool is_met = each->hello_heard && each->hello_sent && !each->waits_for_ring();
    if (!is_met && now < each->ready_at)
      continue;
    if (each->waits_for_ring())
      each->ring.reset();
    each->ready = true;
    --num_waiting_;
    for (auto& operation : std::exchange(each->waiting, {}))
      start(*each, std::move(operation));
    any = true;
  }
  return any;
}

bool peer_table::settle() {
  for (const auto& [is_hello, from, offer] : std::exchange(news_, {}))
    if (is_hello)
      inlets_.open(from, offer);
    else
      inlets_.close(from.name, offer);
  bool busy = start_those_ready();
  for (const auto& name : std::exchange(failed_, {})) {
    const auto known = connected_.find(name);
    if (known == connected_.end() || !known->second->failure)
      continue; // disconnected or replaced meanwhile
    // What it sent before counts.
    inlets_.drain(name);
    auto lost = remove(name);
    const auto incarnation = lost->incarnation;
    const auto why = *lost->failure;
    fences_.fence(name, incarnation + 1);
    close(std::move(lost), why);
    on_lost_(name, incarnation, why);
    busy = true;
  }
  std::erase_if(closing_, [](const auto& each) {
    return each->closed && each->in_flight.empty() && !each->flush_pending;
  });
  return busy;
}

bool peer_table::move_rings() {
  bool busy = inlets_.poll();
  for (const auto& sender : inlets_.take_damaged()) {
    const auto known = connected_.find(sender.name);
    if (known != connected_.end() && known->second->incarnation == sender.incarnation)
      known->second->fail(
        fail(error_code::io_failed, fmt::format("'{}' sent what is no frame", sender.name))
          .value());
  }
  for (auto& [name, each] : connected_)
    if (each->ring && !each->ring->is_idle())
      busy |= each->push_ring();
  return busy;
}

bool peer_table::has_ring_work() const {
  return inlets_.is_ready()
         || std::any_of(connected_.begin(), connected_.end(), [](const auto& each) {
              return each.second->ring && each.second->ring->can_push();
            });
}

bool peer_table::needs_network() const {
  return std::any_of(connected_.begin(), connected_.end(),
                     [](const auto& each) { return !each.second->ready || !each.second->ring; });
}

void peer_table::close(std::unique_ptr<peer> finished, const error& why) {
  ucx_used_ = true;
  finished->fail_all(why);
  if (finished->handle == nullptr)
    return;
  if (!finished->failure)
    say(goodbye_message_id, *finished);
  finished->retired = true;
  auto& closing = *closing_.emplace_back(std::move(finished));
  ucp_request_param_t params{};
  params.op_attr_mask =
    UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  params.flags = UCP_EP_CLOSE_FLAG_FORCE;
  params.user_data = &closing;
  params.cb.send = [](void* request, ucs_status_t, void* data) noexcept {
    ucp_request_free(request);
    static_cast<peer*>(data)->closed = true;
  };
  const auto request = ucp_ep_close_nbx(closing.handle, &params);
  if (UCS_PTR_IS_ERR(request)) // the peer went first; the handle is released all the same
    spdlog::debug("closing the connection to '{}': {}", closing.name,
                  ucs_status_string(UCS_PTR_STATUS(request)));
  if (request == nullptr || UCS_PTR_IS_ERR(request))
    closing.closed = true;
}

bool peer_table::has_sends_in_flight() const {
  return std::any_of(connected_.begin(), connected_.end(), [](const auto& each) {
    const auto& to = *each.second;
    return !to.in_flight.empty() || !to.waiting.empty() || (to.ring && !to.ring->is_idle());
  });
}

void peer_table::flush_all() {
  ucx_used_ = true;
  for (auto& [name, each] : connected_) {
    if (!each->in_flight.empty() || each->failure || each->flush_pending)
      continue;
    ucp_request_param_t params{};
    params.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
    params.user_data = each.get();
    params.cb.send = [](void* request, ucs_status_t, void* data) noexcept {
      ucp_request_free(request);
      static_cast<peer*>(data)->flush_pending = false;
    };
    each->flush_pending = UCS_PTR_IS_PTR(ucp_ep_flush_nbx(each->handle, &params));
  }
}

bool peer_table::all_flushed() const {
  return std::none_of(connected_.begin(), connected_.end(),
                      [](const auto& each) { return each.second->flush_pending; });
}

void peer_table::say_goodbyes() {
  for (auto& [name, each] : connected_)
    if (!each->failure)
      say(goodbye_message_id, *each);
}

void peer_table::close_all() {
  const auto why = fail(error_code::unavailable, "this process's transport stops").value();
  num_waiting_ = 0;
  for (auto& [name, each] : std::exchange(connected_, {}))
    close(std::move(each), why);
}

} // namespace troupe::transport
