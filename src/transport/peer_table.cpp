#include "troupe/transport/peer_table.hpp"

#include "troupe/base/fault_point.hpp"

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
  }
};

peer_table::peer_table(ucx_worker& worker, inbox& fences, const proto::FrameHeader& own,
                       lost_callback on_lost)
  : worker_(worker),
    fences_(fences),
    on_lost_(std::move(on_lost)),
    own_header_(own.SerializeAsString()) {}

peer_table::~peer_table() = default;

template <peer_table::message_handler Handler>
expected<void> peer_table::listen_for(unsigned message_id) {
  ucp_am_handler_param_t params{};
  params.field_mask =
    UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
  params.id = message_id;
  params.arg = this;
  params.cb = [](void* self, const void* header, std::size_t length, void*, std::size_t,
                 const ucp_am_recv_param_t*) noexcept {
    proto::FrameHeader from;
    if (from.ParseFromArray(header, static_cast<int>(length)) && !faults::is_cut_off(from.sender()))
      (static_cast<peer_table*>(self)->*Handler)(from);
    return UCS_OK;
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

void peer_table::hear_hello(const proto::FrameHeader& from) {
  auto& latest = hellos_[from.sender()];
  latest = std::max(latest, from.sender_incarnation());
  const auto known = connected_.find(from.sender());
  if (known != connected_.end() && known->second->incarnation == from.sender_incarnation())
    known->second->hello_heard = true;
}

void peer_table::hear_goodbye(const proto::FrameHeader& from) {
  const auto known = connected_.find(from.sender());
  if (known != connected_.end() && known->second->incarnation == from.sender_incarnation())
    known->second->fail(to_error(UCS_ERR_CONNECTION_RESET, from.sender()));
}

/// UCX opens and closes connections without a word to the process at the other end. False
/// when it cannot go out at once: queueing it would begin the handshake of the first frame.
bool peer_table::say(unsigned message_id, peer& to) {
  ucp_request_param_t params{};
  params.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FLAG_FORCE_IMM_CMPL;
  params.flags = UCP_AM_SEND_FLAG_EAGER;
  return ucp_am_send_nbx(to.handle, message_id, own_header_.data(), own_header_.size(), nullptr, 0,
                         &params)
         == nullptr;
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
  auto handle = worker_.open_endpoint(address, &peer::on_error, &fresh);
  if (handle) {
    fresh.handle = *handle;
    fresh.hello_sent = say(hello_message_id, fresh);
  } else {
    fresh.fail(std::move(handle).error());
  }
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
    if (!(each->hello_heard && each->hello_sent) && now < each->ready_at)
      continue;
    each->ready = true;
    --num_waiting_;
    for (auto& operation : std::exchange(each->waiting, {}))
      start(*each, std::move(operation));
    any = true;
  }
  return any;
}

bool peer_table::settle() {
  bool busy = start_those_ready();
  for (const auto& name : std::exchange(failed_, {})) {
    const auto known = connected_.find(name);
    if (known == connected_.end() || !known->second->failure)
      continue; // disconnected or replaced meanwhile
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

void peer_table::close(std::unique_ptr<peer> finished, const error& why) {
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
    return !each.second->in_flight.empty() || !each.second->waiting.empty();
  });
}

void peer_table::flush_all() {
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
