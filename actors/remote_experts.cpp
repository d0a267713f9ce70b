#include "troupe/actors/remote_experts.hpp"

#include "troupe/model/rows.hpp"

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include <fmt/format.h>

namespace troupe::actors {

remote_experts::remote_experts(std::shared_ptr<data_plane> plane, kernels::ops& ops,
                               model::dispatch_plan plan,
                               std::pair<std::uint32_t, std::uint32_t> stage_key,
                               std::uint64_t incarnation, call_limits limits,
                               memory::activity pulse)
  : plane_(std::move(plane)),
    ops_(ops),
    plan_(std::move(plan)),
    stage_key_(stage_key),
    limits_(limits),
    call_patience_(limits.timeout),
    pulse_(std::move(pulse)),
    box_(std::make_shared<frame_box>()),
    calls_(plan_.num_groups()),
    copies_(plan_.num_groups()),
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
  auto row_bytes = kernels::size_of(ops_.exchange_type()) * static_cast<std::size_t>(x.num_cols);
  for (std::size_t g = 0; g < calls_.size(); ++g) {
    auto work = plan_.work(g);
    auto& call = calls_[g];
    call.payload = nullptr;
    call.is_due = true;
    call.asked.clear();
    call.num_sent = 0;
    call.num_refusals = 0;
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
  send_due(std::chrono::steady_clock::now());
  return {};
}

/// True when a call has to be sent: for the first time, in a new epoch, because whoever has it is
/// gone, or because it has waited long enough.
bool remote_experts::wants_sending(std::size_t group, time_point now) {
  auto& call = calls_[group];
  if (call.done)
    return false;
  if (call.asked.empty() || call.is_due || call.sent_epoch != plane_->epoch())
    return true;
  const auto& last = call.asked[call.last].where;
  for (const auto& copy : copies_[group])
    if (copy.is_reachable && copy.where == last) {
      if (now < call.overdue_at)
        return false;
      plane_->suspect(last);
      return true;
    }
  return true;
}

void remote_experts::send_due(time_point now) {
  for (std::size_t g = 0; g < calls_.size(); ++g) {
    if (auto changes = plane_->num_changes(); changes != seen_changes_) {
      seen_changes_ = changes;
      for (std::size_t i = 0; i < copies_.size(); ++i)
        plane_->copies(static_cast<std::uint32_t>(i), copies_[i]);
    }
    if (!wants_sending(g, now))
      continue;
    auto& call = calls_[g];
    bool is_overdue = now >= call.overdue_at;
    bool avoids_last = is_overdue || call.num_refusals > 0;
    std::optional<std::size_t> asked_last;
    callees_.clear();
    for (const auto& copy : copies_[g]) {
      bool is_last = !call.asked.empty() && copy.where == call.asked[call.last].where;
      if (is_last && avoids_last)
        asked_last = callees_.size();
      bool is_suspect = copy.suspect_until > now || (is_last && is_overdue);
      callees_.push_back({copy.is_reachable, is_suspect, copy.is_near});
    }
    auto chosen =
      recovery::choose_callee(callees_, stage_key_.first + stage_key_.second, asked_last);
    call.is_due = !chosen;
    call.overdue_at = time_point::max();
    if (chosen)
      send_to(g, copies_[g][*chosen].where, now);
  }
}

void remote_experts::send_to(std::size_t group, const data_plane::target& target, time_point now) {
  auto& call = calls_[group];
  auto epoch = plane_->epoch();
  proto::FrameHeader header;
  header.set_kind(proto::DISPATCH);
  header.set_replica(stage_key_.first);
  header.set_reply_index(stage_key_.second);
  header.set_actor_index(static_cast<std::uint32_t>(group));
  header.set_epoch(epoch);
  header.set_step(step_);
  header.set_layer(static_cast<std::uint32_t>(layer_));
  header.set_call(call_);
  header.set_num_tasks(static_cast<std::uint32_t>(call.num_tasks));
  header.set_num_rows(static_cast<std::uint32_t>(call.num_rows));
  header.set_num_cols(static_cast<std::uint32_t>(num_cols_));
  call.sent_epoch = epoch;
  call.last = 0;
  while (call.last < call.asked.size() && !(call.asked[call.last].where == target))
    ++call.last;
  if (call.last == call.asked.size())
    call.asked.push_back({target, now, 0});
  ++call.asked[call.last].num_times;
  ++call.num_sent;
  if (call_patience_.is_limited()) {
    const auto& copies = copies_[group];
    bool has_other = std::any_of(copies.begin(), copies.end(), [&](const auto& copy) {
      return copy.is_reachable && !(copy.where == target);
    });
    call.overdue_at =
      now
      + call_patience_.after(call.num_sent, static_cast<std::size_t>(call.num_tasks), has_other);
  }
  plane_->send(target, std::move(header), {call.payload->bytes(), call.payload});
}

expected<void> remote_experts::take(const transport::frame& reply,
                                    const kernels::rows_view& expert_out, time_point now) {
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
    if (call.num_refusals++ == 0) {
      call.is_due = true; // what was in its way may have passed
      return {};
    }
    return fail(
      error_code::internal,
      fmt::format("expert group {} on {} refused layer {}", group, header.sender(), layer_),
      "see the log of that worker");
  }
  auto wanted = static_cast<std::size_t>(call.num_tasks) * static_cast<std::size_t>(num_cols_)
                * kernels::size_of(ops_.exchange_type());
  if (reply.payload.size() != wanted)
    return fail(error_code::internal,
                fmt::format("expert group {} on {} sent {} bytes where {} are due", group,
                            header.sender(), reply.payload.size(), wanted));
  ops_.import_rows(reply.payload.data(), model::slice_rows(expert_out, ops_.activation_type(),
                                                           call.first_output, call.num_tasks));
  for (const auto& asked : call.asked)
    if (asked.where.worker == header.sender() && asked.num_times == 1)
      call_patience_.answered(static_cast<std::size_t>(call.num_tasks), now - asked.at);
  call.done = true;
  call.payload = nullptr;
  return {};
}

/// When the first call that waits has waited long enough.
remote_experts::time_point remote_experts::next_wake() const {
  auto result = time_point::max();
  for (const auto& call : calls_)
    if (!call.done)
      result = std::min(result, call.overdue_at);
  return result;
}

expected<void> remote_experts::finish(const kernels::rows_view& expert_out,
                                      std::span<std::int32_t> expert_rows) {
  auto now = std::chrono::steady_clock::now();
  auto deadline = now + limits_.patience;
  auto is_done = [this] {
    for (const auto& call : calls_)
      if (!call.done)
        return false;
    return true;
  };
  pulse_.waiting();
  while (!is_done()) {
    bool heard = plane_->wait(*box_, replies_, std::min(deadline, next_wake()));
    now = std::chrono::steady_clock::now();
    if (!heard && now >= deadline)
      return fail(error_code::deadline_exceeded,
                  fmt::format("no answer from an expert group for layer {} in {} ms", layer_,
                              limits_.patience.count()),
                  "troupe status shows which worker is missing");
    for (const auto& reply : replies_)
      if (auto taken = take(*reply, expert_out, now); !taken)
        return taken;
    send_due(now);
  }
  pulse_.computing();
  std::copy(plan_.expert_rows().begin(), plan_.expert_rows().end(), expert_rows.begin());
  return {};
}

} // namespace troupe::actors
