#include "troupe/actors/expert_group.hpp"

#include "troupe/actors/injected.hpp"

#include <chrono>
#include <cstring>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

namespace troupe::actors {

namespace {

/// How long the thread waits on the transport; its mailbox waits so long at most.
constexpr auto listening_time = std::chrono::milliseconds(20);

/// Device memory of at least `bytes`, grown when a larger dispatch than any before comes. Null if
/// there is not that much.
void* grow(kernels::ops& ops, std::shared_ptr<void>& memory, std::size_t& size, std::size_t bytes) {
  if (size < bytes) {
    memory = ops.allocate(bytes);
    size = memory ? bytes : 0;
  }
  return memory.get();
}

} // namespace

bool dispatch_box::offer(const frame_ptr& dispatch) {
  std::lock_guard lock(mutex_);
  if (is_open_)
    frames_.put(dispatch);
  return is_open_;
}

void dispatch_box::open() {
  std::lock_guard lock(mutex_);
  is_open_ = true;
}

void dispatch_box::close() {
  std::lock_guard lock(mutex_);
  is_open_ = false;
}

expert_group::expert_group(caf::actor_config& config, std::shared_ptr<data_plane> plane,
                           std::shared_ptr<kernels::ops> ops,
                           std::shared_ptr<model::expert_group_model> experts,
                           std::shared_ptr<dispatch_box> arrivals, expert_group_traits traits)
  : expert_group_actor::base(config),
    plane_(std::move(plane)),
    ops_(std::move(ops)),
    experts_(std::move(experts)),
    arrivals_(std::move(arrivals)),
    traits_(std::move(traits)) {}

expected<std::shared_ptr<transport::buffer>>
expert_group::compute(const transport::frame& dispatch) {
  const auto& header = dispatch.header;
  auto element = kernels::size_of(ops_->activation_type());
  auto element_on_way = kernels::size_of(ops_->exchange_type());
  std::size_t num_tasks = header.num_tasks();
  std::size_t num_rows = header.num_rows();
  std::size_t num_cols = header.num_cols();
  auto task_bytes = num_tasks * sizeof(kernels::expert_task);
  if (num_cols != static_cast<std::size_t>(experts_->hidden_size())
      || dispatch.payload.size() != task_bytes + num_rows * num_cols * element_on_way)
    return fail(
      error_code::invalid_request,
      fmt::format("a dispatch of {} rows, {} columns, {} tasks with {} bytes does not add up",
                  num_rows, num_cols, num_tasks, dispatch.payload.size()));
  tasks_.resize(num_tasks);
  std::memcpy(tasks_.data(), dispatch.payload.data(), task_bytes);
  for (auto& task : tasks_)
    task.expert -= experts_->experts().first;

  auto cols = static_cast<std::int32_t>(num_cols);
  kernels::rows_view x{grow(*ops_, device_rows_, device_rows_bytes_, num_rows * num_cols * element),
                       static_cast<std::int32_t>(num_rows), cols, cols};
  kernels::rows_view out{
    grow(*ops_, device_out_, device_out_bytes_, num_tasks * num_cols * element),
    static_cast<std::int32_t>(num_tasks), cols, cols};
  if (num_tasks * num_rows != 0 && (x.data == nullptr || out.data == nullptr))
    return fail(
      error_code::resource_exhausted,
      fmt::format("no memory for a dispatch of {} rows and {} tasks", num_rows, num_tasks),
      "give the process more memory or send smaller micro-batches");
  ops_->import_rows(dispatch.payload.data() + task_bytes, x);
  if (auto ran = experts_->run(static_cast<std::int32_t>(header.layer()), x, tasks_, out); !ran)
    return tl::unexpected(ran.error());
  auto reply = plane_->buffers().take(num_tasks * num_cols * element_on_way);
  if (!reply)
    return tl::unexpected(reply.error());
  auto result = std::make_shared<transport::buffer>(std::move(*reply));
  ops_->export_rows(out, result->data());
  return result;
}

void expert_group::answer(const transport::frame& dispatch) {
  const auto& asked = dispatch.header;
  proto::FrameHeader header;
  header.set_replica(asked.replica());
  header.set_actor_index(asked.reply_index());
  header.set_reply_index(traits_.index);
  header.set_epoch(asked.epoch());
  header.set_step(asked.step());
  header.set_layer(asked.layer());
  header.set_call(asked.call());
  data_plane::target back{asked.sender(), asked.sender_incarnation()};
  auto refuse = [&](error_code code) {
    header.set_kind(proto::REFUSED);
    header.set_error_code(static_cast<std::uint32_t>(code));
    plane_->send(back, std::move(header), {});
  };
  if (asked.epoch() < plane_->epoch())
    return refuse(error_code::stale_epoch);
  if (traits_.watch)
    traits_.watch->begin({asked.num_tasks(), 0});
  suffer_computing(*ops_, traits_.actor);
  auto output = compute(dispatch);
  if (traits_.watch)
    traits_.watch->end();
  if (!ops_->failure().empty()) {
    spdlog::critical("{}: the device failed: {}", traits_.actor, ops_->failure());
    traits_.pulse.last_words("the device failed: " + ops_->failure());
    return quit(caf::sec::runtime_error);
  }
  if (!output) {
    spdlog::error("{}: {}", traits_.actor, output.error().text());
    return refuse(output.error().code);
  }
  auto fault = faults::hit(faults::point::message_reply, asked.sender());
  if (fault && fault->what == faults::kind::drop)
    return;
  header.set_kind(proto::COMBINE);
  header.set_num_tasks(asked.num_tasks());
  header.set_num_cols(asked.num_cols());
  plane_->send(back, std::move(header), {(*output)->bytes(), *output});
}

expert_group::behavior_type expert_group::make_behavior() {
  // Groups compute at the same time, so what each does on one thread is on another core.
  ops_->keep_on_cores(static_cast<std::int32_t>(traits_.index));
  return {[this](const frame_ptr& dispatch) {
    serve(*dispatch);
    if (ops_->failure().empty())
      listen();
  }};
}

void expert_group::serve(const transport::frame& dispatch) {
  traits_.pulse.computing();
  answer(dispatch);
  traits_.pulse.idle();
}

/// Leaves as soon as something is in the mailbox: a dispatch that came before the box was open is
/// older than those that come to it.
void expert_group::listen() {
  arrivals_->open();
  bool stays = true;
  while (stays) {
    auto now = std::chrono::steady_clock::now();
    stays = mailbox().empty() && plane_->wait(arrivals_->frames(), arrived_, now + listening_time);
    if (!stays) {
      arrivals_->close();
      arrivals_->frames().take(arrived_, now);
    }
    for (const auto& dispatch : arrived_) {
      serve(*dispatch);
      if (!ops_->failure().empty())
        return; // this actor has quit
    }
    arrived_.clear();
  }
}

} // namespace troupe::actors
