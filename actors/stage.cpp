#include "troupe/actors/stage.hpp"

#include "troupe/actors/convert.hpp"
#include "troupe/actors/injected.hpp"

#include <tuple>
#include <utility>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

namespace troupe::actors {

using namespace messages;

namespace {

/// The process that schedulers live in.
constexpr const char* frontend_name = "frontend";

} // namespace

stage::stage(caf::actor_config& config, std::uint32_t replica, std::uint32_t index,
             std::uint32_t num_stages, std::uint32_t hidden_size,
             std::shared_ptr<frame_sink> frames, stage_compute_actor compute, bool unprotected)
  : stage_local::base(config),
    replica_(replica),
    index_(index),
    hidden_size_(hidden_size),
    frames_(std::move(frames)),
    compute_(std::move(compute)),
    ledger_(index == 0, index + 1 == num_stages),
    num_stages_(num_stages),
    unprotected_(unprotected) {
  // Without its computing thread the stage is of no use: the process ends and is restarted.
  link_to(compute_);
}

stage::behavior_type stage::make_behavior() {
  return {
    [this](const run_micro_batch& asked) {
      if (faults_.take(*this, faults::point::message_receive, frontend_name, asked))
        return;
      run(asked.body);
    },
    [this](const cluster_view& view) {
      take_view(view.body);
      carry_out();
    },
    [this](const frame_ptr& arrived) {
      const auto& header = arrived->header;
      if (header.kind() == proto::BOUNDARY_WANTED)
        return take_wish(header);
      if (ledger_.input(header.epoch(), header.step()))
        kept_[header.step()].input = arrived;
      carry_out();
    },
    [this](const stage_result& result) {
      take_result(result);
      carry_out();
    },
  };
}

void stage::take_view(const proto::ClusterView& view) {
  ledger_.raise_epoch(view.epoch());
  auto target_of = [](const proto::WorkerView* worker) {
    return worker != nullptr && worker->state() == proto::RUNNING
             ? frame_target{worker->plan().name(), worker->incarnation()}
             : frame_target{};
  };
  const auto* next = index_ + 1 < num_stages_ ? find_stage(view, replica_, index_ + 1) : nullptr;
  const auto* own = find_stage(view, replica_, index_);
  successor_ = target_of(next);
  predecessor_ = index_ > 0 ? target_of(find_stage(view, replica_, index_ - 1)) : frame_target{};
  meets_successor_ =
    next != nullptr && own != nullptr && meet_on_devices(own->plan(), next->plan());
  ledger_.successor(successor_.incarnation);
}

bool stage::stays_on_device() const {
  return meets_successor_ && (cannot_map_.incarnation == 0 || cannot_map_ != successor_);
}

void stage::take_result(const stage_result& result) {
  if (result.is_copy) {
    auto kept = kept_.find(result.step);
    if (kept == kept_.end())
      return; // complete meanwhile
    kept->second.is_copied = false;
    kept->second.result.output = result.output;
    if (result.output && successor_.incarnation != 0)
      pass_on(result.step);
    return;
  }
  if (result.input_is_lost) {
    ledger_.input_lost(result.step);
    return ask_for_input(result.step, result.failure->code);
  }
  kept_[result.step].result = result;
  if (result.failure)
    ledger_.compute_failed(result.step);
  else
    ledger_.computed(result.step);
}

/// The successor cannot take rows from the device: these, or any.
void stage::take_wish(const proto::FrameHeader& wanted) {
  if (wanted.error_code() != static_cast<std::uint32_t>(error_code::stale_epoch))
    cannot_map_ = {wanted.sender(), wanted.sender_incarnation()};
  auto kept = kept_.find(wanted.step());
  if (kept == kept_.end() || !kept->second.result.left || successor_.incarnation == 0)
    return; // passed on when it is computed
  kept->second.goes_by_host = true;
  pass_on(wanted.step());
}

/// Should this get lost, the scheduler's asking again makes the predecessor pass on again.
void stage::ask_for_input(std::uint64_t step, error_code why) {
  if (predecessor_.incarnation == 0)
    return;
  proto::FrameHeader header;
  header.set_kind(proto::BOUNDARY_WANTED);
  header.set_replica(replica_);
  header.set_actor_index(index_ - 1);
  header.set_epoch(ledger_.epoch());
  header.set_step(step);
  header.set_error_code(static_cast<std::uint32_t>(why));
  frames_->send(predecessor_, std::move(header), {});
}

void stage::run(const proto::RunMicroBatch& asked) {
  scheduler_ = caf::actor_cast<scheduler_actor>(current_sender());
  if (asked.epoch() > served_epoch_) {
    served_epoch_ = asked.epoch();
    faults::suffer(faults::point::worker_serving);
  }
  if (ledger_.run(asked.epoch(), asked.step(), asked.oldest_step(), asked.attempt())) {
    auto& kept = kept_[asked.step()];
    if (!kept.batch)
      kept.batch = std::make_shared<proto::RunMicroBatch>(asked);
  }
  carry_out();
}

void stage::carry_out() {
  using kind = recovery::stage_ledger::kind;
  while (auto action = ledger_.next()) {
    switch (action->what) {
    case kind::compute: {
      const auto& kept = kept_.at(action->step);
      send(compute_, stage_work{kept.batch, kept.input, stays_on_device()});
      break;
    }
    case kind::pass_on: pass_on(action->step); break;
    case kind::report: report(action->step); break;
    case kind::report_failure: report_failure(action->step); break;
    case kind::drop: kept_.erase(action->step); break;
    }
  }
}

void stage::pass_on(std::uint64_t step) {
  auto& kept = kept_.at(step);
  const auto& [left, output] = std::tie(kept.result.left, kept.result.output);
  bool by_device = left && stays_on_device() && !kept.goes_by_host;
  if (!by_device && !output) {
    // Without rows it was passed on already and, unprotected, not kept.
    if (left && !std::exchange(kept.is_copied, true))
      send(compute_, stage_work{kept.batch, nullptr, false, left});
    return;
  }
  proto::FrameHeader header;
  header.set_kind(proto::BOUNDARY);
  header.set_replica(replica_);
  header.set_actor_index(index_ + 1);
  header.set_epoch(ledger_.epoch());
  header.set_step(step);
  header.set_num_rows(static_cast<std::uint32_t>(kept.batch->tokens_size()));
  header.set_num_cols(hidden_size_);
  if (by_device) {
    *header.mutable_place() = left->place;
    return frames_->send(successor_, std::move(header), {});
  }
  frames_->send(successor_, std::move(header), {output->bytes(), output});
  if (unprotected_)
    kept.result.output = nullptr;
}

void stage::report(std::uint64_t step) {
  auto done = *kept_.at(step).result.done;
  done.set_epoch(ledger_.epoch());
  auto fault = faults::hit(faults::point::message_reply, frontend_name);
  if (fault && fault->what == faults::kind::drop)
    return;
  send(scheduler_, micro_batch_done{std::move(done)});
}

void stage::report_failure(std::uint64_t step) {
  proto::MicroBatchFailed failed;
  failed.set_replica(replica_);
  failed.set_epoch(ledger_.epoch());
  failed.set_step(step);
  failed.set_stage(index_);
  failed.set_attempt(ledger_.attempt(step));
  failed.set_kv_is_damaged(kept_.at(step).result.kv_is_damaged);
  *failed.mutable_error() = to_proto(*kept_.at(step).result.failure);
  send(scheduler_, micro_batch_failed{std::move(failed)});
}

} // namespace troupe::actors
