#include "troupe/actors/scheduler.hpp"

#include "troupe/actors/convert.hpp"
#include "troupe/actors/dial.hpp"

#include <algorithm>
#include <chrono>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

namespace troupe::actors {

using namespace messages;
using namespace std::chrono_literals;

namespace {

constexpr auto tick_interval = 50ms;
constexpr auto dial_timeout = 2000ms;

/// Steps of one incarnation of the frontend are below those of the next.
constexpr unsigned bits_of_step = 40;
constexpr std::uint64_t first_step_base = std::uint64_t{1} << bits_of_step;

schedule::time_point current_time() {
  return std::chrono::steady_clock::now();
}

bool has_gpus(const proto::ClusterPlan& plan) {
  const auto& workers = plan.workers();
  return std::any_of(workers.begin(), workers.end(),
                     [](const auto& w) { return w.device().starts_with("cuda:"); });
}

schedule::limits limits_of(const proto::ClusterPlan& plan) {
  schedule::limits result;
  result.num_pages = plan.kv_pages();
  result.page_tokens = plan.page_tokens();
  result.max_batch_tokens = plan.max_batch_tokens();
  result.max_batch_sequences = plan.max_batch_sequences();
  result.prefill_chunk_tokens = plan.prefill_chunk_tokens();
  result.max_in_flight = plan.num_stages() + 1;
  result.max_decoding = std::clamp(plan.decode_micro_batches(), 1U, result.max_in_flight);
  result.max_queued = plan.max_queue();
  result.max_context = plan.max_context();
  result.draft_tokens = plan.draft_tokens();
  return result;
}

proto::RunMicroBatch to_message(const schedule::micro_batch& batch, bool with_drafts) {
  proto::RunMicroBatch result;
  result.mutable_tokens()->Add(batch.tokens.begin(), batch.tokens.end());
  for (const auto& slice : batch.sequences) {
    result.add_first_positions(slice.first_position);
    result.add_row_counts(slice.num_rows);
    result.add_page_counts(static_cast<std::uint32_t>(slice.pages.size()));
    result.mutable_pages()->Add(slice.pages.begin(), slice.pages.end());
    if (!with_drafts)
      continue;
    result.add_next_tokens(slice.next_token);
    result.add_draft_counts(slice.num_drafts);
    result.add_drafts_wanted(slice.num_wanted);
  }
  for (const auto& output : batch.outputs) {
    const auto& slice = batch.sequences[static_cast<std::size_t>(output.sequence)];
    auto* o = result.add_outputs();
    o->set_row(static_cast<std::uint32_t>(output.row));
    o->set_target(output.target);
    o->set_num_logprobs(output.num_logprobs);
    o->set_temperature(slice.draw.temperature);
    o->set_top_k(slice.draw.top_k);
    o->set_top_p(slice.draw.top_p);
    o->set_min_p(slice.draw.min_p);
    o->set_seed(slice.draw.seed);
    o->set_position(static_cast<std::uint32_t>(output.position));
    if (output.ban_stop_tokens)
      o->mutable_banned()->Add(slice.stop_tokens.begin(), slice.stop_tokens.end());
  }
  return result;
}

class network_connector final : public stage_connector {
public:
  void connect(scheduler_local::base* self, const proto::WorkerView& worker, std::uint32_t replica,
               std::uint32_t index, std::function<void(const stage_actor&)> on_connected,
               std::function<void(const error&)> on_error) override {
    dial<worker_actor>(
      self, worker.host(), static_cast<std::uint16_t>(worker.port()), dial_timeout,
      [=](const worker_actor& connected) {
        self->request(connected, dial_timeout, stage_atom::value, replica, index)
          .then([=](const stage_actor& stage) { on_connected(stage); },
                [=](caf::error&) {
                  on_error(
                    error{error_code::peer_lost, "the worker did not hand out its stage", "", ""});
                });
      },
      on_error);
  }
};

/// What took too long or was never valid will be so again; memory may be free again soon.
recovery::step_failure kind_of(const error& why) {
  switch (why.code) {
  case error_code::deadline_exceeded:
  case error_code::invalid_request: return recovery::step_failure::hopeless;
  case error_code::resource_exhausted: return recovery::step_failure::shortage;
  default: return recovery::step_failure::mishap;
  }
}

} // namespace

std::shared_ptr<stage_connector> make_stage_connector() {
  return std::make_shared<network_connector>();
}

scheduler::scheduler(caf::actor_config& config, std::uint32_t replica, std::uint64_t incarnation,
                     cluster_plan plan, scheduler_client client,
                     std::shared_ptr<stage_connector> connector)
  : scheduler_local::base(config),
    replica_(replica),
    step_base_(incarnation << bits_of_step),
    plan_(std::move(plan.body)),
    client_(std::move(client)),
    connector_(std::move(connector)),
    policy_(limits_of(plan_)),
    stages_(plan_.num_stages()),
    kv_(plan_.num_stages()),
    watch_(std::chrono::milliseconds(plan_.resend_ms())),
    last_progress_(current_time()) {
  set_down_handler([this](caf::down_msg& down) {
    for (auto& link : stages_)
      if (link.stage && link.stage.address() == down.source)
        link = {}; // its node reports the loss; the view that follows says where its successor is
    serving_ = serving_ && can_serve();
  });
}

void scheduler::connect(std::uint32_t index, const proto::WorkerView& worker) {
  const auto& name = worker.plan().name();
  auto incarnation = worker.incarnation();
  stages_[index] = {name, incarnation, {}};
  connector_->connect(
    this, worker, replica_, index,
    [this, index, name, incarnation](const stage_actor& stage) {
      if (!stages_[index].is(name, incarnation))
        return; // overtaken by a newer view
      monitor(stage);
      stages_[index].stage = stage;
      start_serving_if_possible();
    },
    [this, index, name, incarnation](const error& e) {
      spdlog::debug("replica-{}/stage-{}: {}", replica_, index, e.text());
      if (stages_[index].is(name, incarnation))
        stages_[index] = {}; // tried again with the next tick
    });
}

void scheduler::take_view(const proto::ClusterView& view) {
  if (view.version() <= view_.version())
    return;
  if (view.epoch() != view_.epoch()) {
    serving_ = false;
    const bool on_gpus = has_gpus(plan_);
    auto end = clock().now() + (on_gpus ? schedule::gpu_fence_time : schedule::fence_time);
    if (view_.epoch() == 0 && step_base_ > first_step_base && on_gpus)
      policy_.fence_all(end); // what its predecessor sent may be in work
    else
      policy_.fence(end);
  }
  view_ = view;
  take_losses();
  for (std::uint32_t i = 0; i < stages_.size(); ++i) {
    const auto* worker = find_stage(view_, replica_, i);
    if (worker == nullptr || worker->state() != proto::RUNNING)
      stages_[i] = {};
    else if (!stages_[i].is(worker->plan().name(), worker->incarnation()))
      connect(i, *worker);
  }
  serving_ = serving_ && can_serve();
  start_serving_if_possible();
  report_state();
}

void scheduler::lose_kv(std::uint32_t stage, const std::string& why) {
  spdlog::warn("the KV memory of replica-{}/stage-{} {}; its sequences are computed again",
               replica_, stage, why);
  policy_.forget_kv();
  watch_.forget_all();
}

void scheduler::take_losses() {
  for (std::uint32_t i = 0; i < stages_.size(); ++i) {
    const auto* worker = find_stage(view_, replica_, i);
    if (worker == nullptr || worker->state() != proto::RUNNING)
      continue;
    auto generation = kv_generation(*worker, find_stage(*worker, replica_, i)->id());
    if (generation == 0)
      continue;
    kv_memory now{worker->plan().node(), generation};
    if (kv_[i].generation != 0 && kv_[i] != now) {
      lose_kv(i, "is gone");
      serving_ = false;
    }
    kv_[i] = std::move(now);
  }
  const auto* hopeless = gave_up_ ? nullptr : find_hopeless();
  if (hopeless == nullptr)
    return;
  gave_up_ = from_proto(hopeless->error());
  gave_up_->code = error_code::unavailable;
  spdlog::error("replica-{} is given up: {}", replica_, gave_up_->text());
  serving_ = false;
  policy_.fail_all();
  watch_.forget_all();
  flush_events(&*gave_up_);
}

/// A worker that was given up with a stage of this replica, or with the last copy of some experts.
const proto::WorkerView* scheduler::find_hopeless() const {
  auto is_failed = [](const proto::WorkerView* w) {
    return w != nullptr && w->state() == proto::FAILED;
  };
  for (std::uint32_t i = 0; i < stages_.size(); ++i)
    if (const auto* worker = find_stage(view_, replica_, i); is_failed(worker))
      return worker;
  for (std::uint32_t group = 0; group < plan_.num_expert_groups(); ++group) {
    const proto::WorkerView* last = nullptr;
    std::uint32_t num_failed = 0;
    for (std::uint32_t copy = 0; copy < plan_.num_expert_copies(); ++copy)
      if (const auto* worker = find_expert_group(view_, group, copy); is_failed(worker)) {
        last = worker;
        ++num_failed;
      }
    if (num_failed > 0 && num_failed == plan_.num_expert_copies())
      return last;
  }
  return nullptr;
}

bool scheduler::can_serve() const {
  if (gave_up_)
    return false;
  for (const auto& link : stages_)
    if (!link.stage)
      return false;
  for (std::uint32_t group = 0; group < plan_.num_expert_groups(); ++group) {
    bool runs = false;
    for (std::uint32_t copy = 0; copy < plan_.num_expert_copies(); ++copy) {
      const auto* worker = find_expert_group(view_, group, copy);
      runs = runs || (worker != nullptr && worker->state() == proto::RUNNING);
    }
    if (!runs)
      return false;
  }
  return true;
}

void scheduler::start_serving_if_possible() {
  if (serving_ || !can_serve())
    return;
  serving_ = true;
  last_progress_ = current_time();
  std::uint32_t requests = 0;
  std::uint32_t tokens = 0;
  auto in_flight = policy_.in_flight();
  if (!in_flight.empty())
    faults::suffer(faults::point::frontend_replaying);
  for (const auto* batch : in_flight) {
    requests += static_cast<std::uint32_t>(batch->sequences.size());
    tokens += static_cast<std::uint32_t>(batch->tokens.size());
    watch_.sent_in_new_epoch(batch->step, clock().now());
    send_to_stages(*batch);
  }
  replaying_ = tokens > 0;
  report_replay(replaying_ ? proto::REPLAYING : proto::SERVING, requests, tokens);
  spdlog::info("replica-{} serves in epoch {}; {} tokens replayed", replica_, view_.epoch(),
               tokens);
  report_state();
  pump();
}

void scheduler::report_state() {
  send(client_, replica_report{replica_, serving_, policy_.count(), last_progress_});
}

void scheduler::report_replay(proto::RecoveryPhase phase, std::uint32_t requests,
                              std::uint32_t tokens) {
  proto::ReplayReport report;
  report.set_replica(replica_);
  report.set_epoch(view_.epoch());
  report.set_phase(phase);
  report.set_requests(requests);
  report.set_tokens_replayed(tokens);
  send(client_, replay_report{std::move(report)});
}

void scheduler::send_to_stages(const schedule::micro_batch& batch) {
  auto body = to_message(batch, plan_.draft_tokens() > 0);
  body.set_replica(replica_);
  body.set_epoch(view_.epoch());
  body.set_step(step_base_ + batch.step);
  body.set_oldest_step(step_base_ + policy_.oldest_step());
  body.set_attempt(watch_.attempt(batch.step));
  run_micro_batch message{std::move(body)};
  for (const auto& link : stages_)
    send(link.stage, message);
}

void scheduler::pump() {
  if (!serving_)
    return;
  while (const auto* batch = policy_.next()) {
    watch_.sent(batch->step, clock().now());
    send_to_stages(*batch);
  }
}

void scheduler::resend_overdue() {
  if (!serving_)
    return;
  auto now = clock().now();
  for (auto step : watch_.overdue(now)) {
    for (const auto* batch : policy_.in_flight()) {
      if (batch->step != step)
        continue;
      spdlog::info("step {} of replica-{} is sent again", step_base_ + step, replica_);
      watch_.sent(step, now);
      send_to_stages(*batch);
    }
  }
}

std::string_view scheduler::name_of_sender() {
  const auto& sender = current_sender();
  for (const auto& link : stages_)
    if (sender && link.stage && link.stage.address() == sender->address())
      return link.worker;
  return {};
}

void scheduler::take_failure(const proto::MicroBatchFailed& failure) {
  auto why = from_proto(failure.error());
  auto step = failure.step() - step_base_;
  auto now = clock().now();
  auto verdict = watch_.failed(step, failure.attempt(), kind_of(why), now);
  if (verdict == recovery::resend_watch::verdict::old_news)
    return;
  if (failure.kv_is_damaged()) {
    lose_kv(failure.stage(), "is damaged: " + why.cause);
    return;
  }
  if (verdict != recovery::resend_watch::verdict::give_up) {
    spdlog::warn("step {} of replica-{} failed and is tried again: {}", failure.step(), replica_,
                 why.text());
    for (const auto* batch : policy_.in_flight())
      if (batch->step == step && verdict == recovery::resend_watch::verdict::retry) {
        watch_.sent(step, now);
        send_to_stages(*batch);
      }
    return;
  }
  spdlog::error("step {} of replica-{} failed: {}", failure.step(), replica_, why.text());
  watch_.forget(step);
  policy_.fail_step(step);
  flush_events(&why);
}

void scheduler::flush_events(const error* why_failed) {
  policy_.take_events(events_);
  if (events_.empty())
    return;
  auto result = std::make_shared<progress>();
  result->replica = replica_;
  for (auto& event : events_) {
    if (event.finish != schedule::finish_reason::failed)
      result->events.push_back(std::move(event));
    else if (why_failed != nullptr)
      result->errors.emplace_back(event.request, *why_failed);
    else
      result->errors.emplace_back(
        event.request,
        fail(error_code::deadline_exceeded,
             fmt::format("the request was not finished in {} s", plan_.request_timeout_s()),
             "serving.request_timeout_s sets the limit")
          .value());
  }
  send(client_, progress_ptr(std::move(result)));
}

void scheduler::complete(const proto::MicroBatchDone& done) {
  auto count = static_cast<std::size_t>(done.tokens_size());
  std::uint64_t num_top_tokens = 0;
  for (auto n : done.top_counts())
    num_top_tokens += n;
  auto top_size = static_cast<std::uint64_t>(done.top_tokens_size());
  if (done.logprobs_size() != done.tokens_size() || done.top_counts_size() != done.tokens_size()
      || num_top_tokens != top_size || done.top_logprobs_size() != done.top_tokens_size()) {
    spdlog::error("step {} of replica-{}: an answer whose arrays do not match", done.step(),
                  replica_);
    return;
  }
  outputs_.resize(count);
  int top = 0;
  for (std::size_t i = 0; i < count; ++i) {
    auto& output = outputs_[i];
    auto at = static_cast<int>(i);
    output.token = done.tokens(at);
    output.logprob = done.logprobs(at);
    auto num_top = static_cast<int>(done.top_counts(at));
    output.top_tokens.assign(done.top_tokens().begin() + top,
                             done.top_tokens().begin() + top + num_top);
    output.top_logprobs.assign(done.top_logprobs().begin() + top,
                               done.top_logprobs().begin() + top + num_top);
    top += num_top;
  }
  watch_.completed(done.step() - step_base_, clock().now());
  const schedule::draft_list drafts{
    {done.draft_counts().data(), static_cast<std::size_t>(done.draft_counts_size())},
    {done.drafts().data(), static_cast<std::size_t>(done.drafts_size())}};
  if (auto taken = policy_.complete(done.step() - step_base_, outputs_, drafts); !taken)
    spdlog::error("step {} of replica-{}: {}", done.step(), replica_, taken.error().text());
  last_progress_ = current_time();
  if (replaying_) {
    replaying_ = false;
    report_replay(proto::SERVING, 0, 0);
  }
}

scheduler::behavior_type scheduler::make_behavior() {
  delayed_send(this, tick_interval, tick_atom::value);
  return {
    [this](const micro_batch_done& done) {
      if (faults_.take(*this, faults::point::message_receive, name_of_sender(), done))
        return;
      if (done->epoch() != view_.epoch() || !serving_)
        return; // of a stage that has not heard of the recovery; it will answer again
      complete(done.body);
      pump();
      flush_events();
      report_state();
    },
    [this](const micro_batch_failed& failure) {
      if (faults_.take(*this, faults::point::message_receive, name_of_sender(), failure))
        return;
      if (failure->epoch() != view_.epoch() || !serving_)
        return;
      take_failure(failure.body);
      pump();
    },
    [this](const cluster_view& view) { take_view(view.body); },
    [this](const submission& submitted) {
      auto id = submitted->id;
      auto taken = gave_up_ ? expected<void>(tl::unexpected(*gave_up_))
                            : policy_.submit(std::move(*submitted));
      if (!taken) {
        auto result = std::make_shared<progress>();
        result->replica = replica_;
        result->errors.emplace_back(id, taken.error());
        send(client_, progress_ptr(std::move(result)));
        return;
      }
      if (policy_.in_flight().empty())
        last_progress_ = current_time();
      pump();
      flush_events();
    },
    [this](cancel_atom, schedule::request_id id) {
      policy_.cancel(id);
      pump();
      flush_events();
      report_state();
    },
    [this](tick_atom) {
      delayed_send(this, tick_interval, tick_atom::value);
      // A stage that could not be reached is dialled again.
      for (std::uint32_t i = 0; i < stages_.size(); ++i) {
        const auto* worker = find_stage(view_, replica_, i);
        if (worker != nullptr && worker->state() == proto::RUNNING && stages_[i].incarnation == 0)
          connect(i, *worker);
      }
      policy_.end_fence(clock().now());
      policy_.expire(current_time());
      resend_overdue();
      pump();
      flush_events();
      auto counters = policy_.count();
      if (counters.num_in_flight == 0 && counters.num_queued == 0 && counters.num_running == 0)
        last_progress_ = current_time();
      report_state();
    },
  };
}

} // namespace troupe::actors
