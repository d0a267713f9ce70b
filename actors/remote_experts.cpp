#include "troupe/actors/remote_experts.hpp"

#include "troupe/model/rows.hpp"

#include <cstring>
#include <utility>

#include <fmt/format.h>

namespace troupe::actors {

remote_experts::remote_experts(std::shared_ptr<data_plane> plane, kernels::ops& ops,
                               model::dispatch_plan plan,
                               std::pair<std::uint32_t, std::uint32_t> stage_key,
                               std::uint64_t incarnation, std::chrono::milliseconds patience)
  : plane_(std::move(plane)),
    ops_(ops),
    plan_(std::move(plan)),
    stage_key_(stage_key),
    patience_(patience),
    box_(std::make_shared<reply_box>()),
    calls_(plan_.num_groups()),
    // A reply to an earlier incarnation of this stage must not match a call of this one.
    call_(incarnation << 40U) {
  plane_->route_replies(stage_key.first, stage_key.second, box_);
}

expected<void> remote_experts::begin(std::int32_t layer, const kernels::rows_view& x,
                                     std::span<const std::int32_t> experts, std::int32_t) {
  if (auto built = plan_.build(experts); !built)
    return built;
  ++call_;
  layer_ = layer;
  num_cols_ = x.num_cols;
  auto row_bytes = kernels::size_of(ops_.activation_type()) * static_cast<std::size_t>(x.num_cols);
  for (std::size_t g = 0; g < calls_.size(); ++g) {
    auto work = plan_.work(g);
    auto& call = calls_[g];
    call = {};
    call.num_tasks = static_cast<std::int32_t>(work.tasks.size());
    call.num_rows = static_cast<std::int32_t>(work.rows.size());
    call.first_output = work.first_output;
    call.done = work.tasks.empty();
    if (call.done)
      continue;
    auto task_bytes = work.tasks.size() * sizeof(kernels::expert_task);
    auto buffer = plane_->buffers().take(task_bytes + work.rows.size() * row_bytes);
    if (!buffer)
      return tl::unexpected(buffer.error());
    call.payload = std::make_shared<transport::buffer>(std::move(*buffer));
    std::memcpy(call.payload->data(), work.tasks.data(), task_bytes);
    model::gather_rows(ops_, x, work.rows, call.payload->data() + task_bytes);
  }
  send_due();
  return {};
}

void remote_experts::send_due() {
  auto epoch = plane_->epoch();
  for (std::size_t g = 0; g < calls_.size(); ++g) {
    auto& call = calls_[g];
    if (call.done)
      continue;
    auto target = plane_->expert_group(static_cast<std::uint32_t>(g));
    bool is_asked = call.sent_epoch == epoch && call.sent_to.worker == target.worker
                    && call.sent_to.incarnation == target.incarnation;
    if (target.incarnation == 0 || is_asked)
      continue;
    proto::FrameHeader header;
    header.set_kind(proto::DISPATCH);
    header.set_replica(stage_key_.first);
    header.set_reply_index(stage_key_.second);
    header.set_actor_index(static_cast<std::uint32_t>(g));
    header.set_epoch(epoch);
    header.set_step(step_);
    header.set_layer(static_cast<std::uint32_t>(layer_));
    header.set_call(call_);
    header.set_num_tasks(static_cast<std::uint32_t>(call.num_tasks));
    header.set_num_rows(static_cast<std::uint32_t>(call.num_rows));
    header.set_num_cols(static_cast<std::uint32_t>(num_cols_));
    call.sent_to = target;
    call.sent_epoch = epoch;
    plane_->send(target, std::move(header), {call.payload->bytes(), call.payload});
  }
}

expected<void> remote_experts::take(const transport::frame& reply,
                                    const kernels::rows_view& expert_out) {
  const auto& header = reply.header;
  auto group = header.reply_index();
  if (header.call() != call_ || group >= calls_.size())
    return {};
  auto& call = calls_[group];
  if (call.done || header.epoch() != call.sent_epoch)
    return {};
  if (header.kind() == proto::REFUSED) {
    if (static_cast<error_code>(header.error_code()) == error_code::stale_epoch)
      return {}; // asked again when the view arrives that the group has seen already
    return fail(
      error_code::internal,
      fmt::format("expert group {} on {} refused layer {}", group, header.sender(), layer_),
      "see the log of that worker");
  }
  auto wanted = static_cast<std::size_t>(call.num_tasks) * static_cast<std::size_t>(num_cols_)
                * kernels::size_of(ops_.activation_type());
  if (reply.payload.size() != wanted)
    return fail(error_code::internal,
                fmt::format("expert group {} on {} sent {} bytes where {} are due", group,
                            header.sender(), reply.payload.size(), wanted));
  ops_.copy_from_host(reply.payload.data(), model::slice_rows(expert_out, ops_.activation_type(),
                                                              call.first_output, call.num_tasks));
  call.done = true;
  call.payload = nullptr;
  return {};
}

expected<void> remote_experts::finish(const kernels::rows_view& expert_out,
                                      std::span<std::int32_t> expert_rows) {
  auto deadline = std::chrono::steady_clock::now() + patience_;
  auto is_done = [this] {
    for (const auto& call : calls_)
      if (!call.done)
        return false;
    return true;
  };
  while (!is_done()) {
    if (!box_->take(replies_, deadline))
      return fail(error_code::deadline_exceeded,
                  fmt::format("no answer from an expert group for layer {} in {} ms", layer_,
                              patience_.count()),
                  "troupe status shows which worker is missing");
    for (const auto& reply : replies_)
      if (auto taken = take(*reply, expert_out); !taken)
        return taken;
    send_due();
  }
  std::copy(plan_.expert_rows().begin(), plan_.expert_rows().end(), expert_rows.begin());
  return {};
}

} // namespace troupe::actors
