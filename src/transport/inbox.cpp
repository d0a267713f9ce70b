#include "troupe/transport/inbox.hpp"

#include "troupe/base/fault_point.hpp"
#include "troupe/transport/checksum.hpp"

#include <cstring>

#include <fmt/format.h>

namespace troupe::transport {

expected<void> inbox::listen(ucp_worker_h worker) {
  worker_ = worker;
  ucp_am_handler_param_t params{};
  params.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS
                      | UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
  params.id = frame_message_id;
  params.flags = UCP_AM_FLAG_WHOLE_MSG;
  params.arg = this;
  params.cb = [](void* self, const void* header, std::size_t header_length, void* data,
                 std::size_t length, const ucp_am_recv_param_t* param) noexcept {
    const bool rendezvous = (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0;
    return static_cast<inbox*>(self)->receive({static_cast<const char*>(header), header_length},
                                              data, length, rendezvous);
  };
  if (const auto status = ucp_worker_set_am_recv_handler(worker, &params); status != UCS_OK)
    return fail(error_code::unavailable,
                fmt::format("UCX refuses the frame handler: {}", ucs_status_string(status)));
  return {};
}

std::uint64_t inbox::lowest(const std::string& sender) const {
  const auto found = fences_.find(sender);
  return found == fences_.end() ? 0 : found->second;
}

bool inbox::is_fenced(const proto::FrameHeader& header) const {
  return header.sender_incarnation() < lowest(header.sender());
}

void inbox::drop(const proto::FrameHeader& header, error_code code, std::string cause) {
  const auto dropped = fail(code, std::move(cause));
  options_.on_dropped(header, dropped.value());
}

/// Memory for a frame that is taken. Otherwise why not, which has been reported.
expected<frame> inbox::admit(std::string_view raw_header, std::size_t length) {
  const auto refuse = [this](const proto::FrameHeader& header, error_code code, std::string cause) {
    const auto why = fail(code, std::move(cause));
    options_.on_dropped(header, why.value());
    return why;
  };
  proto::FrameHeader header;
  if (!header.ParseFromArray(raw_header.data(), static_cast<int>(raw_header.size()))
      || header.sender().empty())
    return refuse(proto::FrameHeader{}, error_code::invalid_request,
                  fmt::format("a frame of {} bytes came with a header of {} bytes that is none",
                              length, raw_header.size()));
  if (is_fenced(header))
    return refuse(header, error_code::stale_epoch,
                  fmt::format("a frame of '{}' came from its incarnation {}, fenced off below {}",
                              header.sender(), header.sender_incarnation(),
                              lowest(header.sender())));
  if (length > options_.max_payload)
    return refuse(header, error_code::too_large,
                  fmt::format("a frame of '{}' has {} bytes; the limit is {}", header.sender(),
                              length, options_.max_payload));
  auto target = pool_.take(length);
  if (!target)
    return refuse(header, target.error().code, target.error().cause);
  return frame{std::move(header), std::move(*target)};
}

std::optional<frame> inbox::accept(std::string_view header, std::size_t length) {
  if (closed_)
    return std::nullopt;
  auto admitted = admit(header, length);
  return admitted ? std::optional{std::move(*admitted)} : std::nullopt;
}

/// An eager payload is valid only during the call. The status of a refused rendezvous
/// travels back to its sender; an eager sender has completed long ago.
ucs_status_t inbox::receive(std::string_view raw_header, void* data, std::size_t length,
                            bool rendezvous) {
  if (closed_)
    return rendezvous ? UCS_ERR_CANCELED : UCS_OK;
  auto admitted = admit(raw_header, length);
  if (!admitted)
    return rendezvous ? to_status(admitted.error().code) : UCS_OK;
  if (rendezvous)
    return start_rendezvous(std::move(admitted->header), std::move(admitted->payload), data);
  if (length != 0)
    std::memcpy(admitted->payload.data(), data, length);
  arrive(std::move(*admitted));
  return UCS_OK;
}

void inbox::arrive(frame filled) {
  slot arrived;
  arrived.content = std::move(filled);
  arrived.progress = state::complete;
  if (!lines_.empty()) {
    const auto& sender = arrived.content.header;
    const auto found = lines_.find({sender.sender(), sender.sender_incarnation()});
    if (found != lines_.end()) {
      found->second.slots.push_back(std::make_unique<slot>(std::move(arrived)));
      return;
    }
  }
  hand_out(arrived);
}

ucs_status_t inbox::start_rendezvous(proto::FrameHeader header, buffer target, void* descriptor) {
  line_key key{header.sender(), header.sender_incarnation()};
  line& queue = lines_[key];
  queue.key = std::move(key);
  auto& fresh = *queue.slots.emplace_back(std::make_unique<slot>());
  fresh.owner = this;
  fresh.queue = &queue;
  fresh.content = frame{std::move(header), std::move(target)};

  ucp_request_param_t params{};
  params.op_attr_mask =
    UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMORY_TYPE;
  params.memory_type = UCS_MEMORY_TYPE_HOST;
  params.user_data = &fresh;
  params.cb.recv_am = [](void* request, ucs_status_t status, std::size_t, void* data) noexcept {
    auto& finished = *static_cast<slot*>(data);
    ucp_request_free(request);
    finished.owner->finish_rendezvous(finished, status);
  };
  ++num_receiving_;
  auto& payload = fresh.content.payload;
  const auto request =
    ucp_am_recv_data_nbx(worker_, descriptor, payload.data(), payload.size(), &params);
  // Otherwise the callback ends it, and may have done so already: `fresh` is off limits.
  if (request == nullptr || UCS_PTR_IS_ERR(request))
    finish_rendezvous(fresh, UCS_PTR_STATUS(request));
  return UCS_OK;
}

void inbox::finish_rendezvous(slot& finished, ucs_status_t status) {
  --num_receiving_;
  finished.progress = status == UCS_OK ? state::complete : state::failed;
  finished.failure = status;
  hand_out_front(*finished.queue);
}

void inbox::hand_out_front(line& queue) {
  while (!queue.slots.empty() && queue.slots.front()->progress != state::receiving) {
    const auto front = std::move(queue.slots.front());
    queue.slots.pop_front();
    hand_out(*front);
  }
  if (queue.slots.empty())
    lines_.erase(line_key{queue.key});
}

void inbox::hand_out(slot& finished) {
  auto& [header, payload] = finished.content;
  if (faults::is_cut_off(header.sender()))
    return;
  if (finished.progress == state::failed) {
    drop(header, error_code::peer_lost,
         fmt::format("a frame of '{}' broke off: {}", header.sender(),
                     ucs_status_string(finished.failure)));
  } else if (is_fenced(header)) {
    drop(header, error_code::stale_epoch,
         fmt::format("incarnation {} of '{}' was fenced off while its frame arrived",
                     header.sender_incarnation(), header.sender()));
  } else if (options_.checksums && header.checksum() != 0
             && checksum(payload.bytes()) != header.checksum()) {
    drop(header, error_code::io_failed,
         fmt::format("a frame of '{}' arrived damaged: {} bytes whose XXH3 is not {:016x}",
                     header.sender(), payload.size(), header.checksum()));
  } else {
    options_.on_frame(std::move(finished.content));
  }
}

} // namespace troupe::transport
