#include "troupe/actors/stage.hpp"

#include "troupe/actors/convert.hpp"
#include "troupe/actors/injected.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <tuple>
#include <utility>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

namespace troupe::actors {

using namespace messages;

namespace {

/// The process that schedulers live in.
constexpr const char* frontend_name = "frontend";

/// What a device has to do for a step.
recovery::step_size size_of(const proto::RunMicroBatch& batch) {
  recovery::step_size size;
  for (int s = 0; s < std::min(batch.first_positions_size(), batch.row_counts_size()); ++s) {
    std::uint64_t rows = batch.row_counts(s);
    size.num_rows += batch.row_counts(s);
    size.num_positions += rows * (batch.first_positions(s) + rows);
  }
  return size;
}

/// Spoils one value of `rows` as a drill asks.
void spoil(kernels::ops& ops, const kernels::rows_view& rows, const faults::fault& what) {
  auto element = kernels::size_of(ops.activation_type());
  std::vector<std::byte> copy(static_cast<std::size_t>(rows.num_rows) * rows.num_cols * element);
  ops.copy_to_host(rows, copy.data());
  auto at = what.random % (copy.size() / element) * element;
  if (what.what == faults::kind::poison) {
    // All bits of exponent and fraction set: a NaN in every format.
    std::memset(copy.data() + at, 0xff, element);
  } else {
    copy[at] ^= std::byte{1};
  }
  ops.copy_from_host(copy.data(), rows);
}

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

stage_compute::stage_compute(caf::actor_config& config,
                             std::vector<std::shared_ptr<kernels::ops>> ops,
                             std::shared_ptr<model::stage_group> model,
                             std::shared_ptr<remote_experts> experts,
                             transport::buffer_pool buffers, stage_traits traits)
  : stage_compute_actor::base(config),
    ops_(std::move(ops)),
    model_(std::move(model)),
    experts_(std::move(experts)),
    buffers_(std::move(buffers)),
    traits_(std::move(traits)) {}

stage_compute::behavior_type stage_compute::make_behavior() {
  return {[this](const stage_work& work) {
    auto asker = caf::actor_cast<stage_local>(current_sender());
    traits_.pulse.computing();
    auto result = work.left ? bring_to_host(work) : work_on(work);
    traits_.pulse.idle();
    for (const auto& ops : ops_)
      if (!ops->failure().empty()) {
        // Whatever came of it is worth nothing. The step is computed again by the next process.
        spdlog::critical("{}: the device failed: {}", traits_.actor, ops->failure());
        return quit(caf::sec::runtime_error);
      }
    send(asker, std::move(result));
  }};
}

stage_result stage_compute::work_on(const stage_work& work) {
  if (traits_.watch)
    traits_.watch->begin(size_of(*work.batch));
  suffer_computing(*ops_.front(), traits_.actor);
  auto step = work.batch->step();
  auto result = compute(work);
  if (traits_.watch)
    traits_.watch->end();
  if (result)
    return std::move(*result);
  const auto& options = model_->leader().options();
  auto why = std::make_shared<error>(std::move(result.error()));
  why->cause = fmt::format("{} (layers {} to {}) could not compute step {}: {}", traits_.actor,
                           options.first_layer, options.end_layer - 1, step, why->cause);
  if (input_is_lost_)
    spdlog::info("{}", why->text());
  else
    spdlog::error("{}", why->text());
  return {step, nullptr, nullptr, std::move(why), kv_is_damaged_, input_is_lost_};
}

/// Rows that stay on the device for a successor that cannot take them from there.
stage_result stage_compute::bring_to_host(const stage_work& work) {
  stage_result result;
  result.step = work.batch->step();
  result.is_copy = true;
  const auto& left = *work.left;
  auto buffer =
    buffers_.take(static_cast<std::size_t>(left.num_rows) * static_cast<std::size_t>(left.num_cols)
                  * kernels::size_of(ops_.front()->activation_type()));
  if (!buffer) {
    spdlog::error("{}: {}", traits_.actor, buffer.error().text());
    return result;
  }
  result.output = std::make_shared<transport::buffer>(std::move(*buffer));
  traits_.outbox->read_back(left, result.output->data());
  return result;
}

expected<void> stage_compute::fetch(const proto::FrameHeader& from, const kernels::rows_view& to) {
  if (from.num_rows() != static_cast<std::uint32_t>(to.num_rows)
      || from.num_cols() != static_cast<std::uint32_t>(to.num_cols))
    return fail(error_code::internal,
                fmt::format("{} left {} rows of {} where {} of {} are needed", from.sender(),
                            from.num_rows(), from.num_cols(), to.num_rows, to.num_cols));
  auto fetched = traits_.boundary
                   ? traits_.boundary->fetch(from.place(), to)
                   : fail(error_code::unavailable, "this stage takes rows from the host alone");
  // Damaged rows are there: the step has failed, if that matters.
  bool are_there = fetched || fetched.error().code == error_code::internal;
  input_is_lost_ = !are_there;
  if (are_there && traits_.unprotected)
    return {};
  return fetched;
}

/// Leaves the output on the device or brings it to the host.
expected<void> stage_compute::hand_over(const kernels::rows_view& hidden, bool stays,
                                        stage_result& result) {
  if (stays && traits_.outbox)
    result.left = traits_.outbox->leave(hidden);
  if (result.left)
    return {};
  auto buffer = buffers_.take(static_cast<std::size_t>(hidden.num_rows)
                              * static_cast<std::size_t>(hidden.num_cols)
                              * kernels::size_of(ops_.front()->activation_type()));
  if (!buffer)
    return tl::unexpected(buffer.error());
  result.output = std::make_shared<transport::buffer>(std::move(*buffer));
  ops_.front()->copy_to_host(hidden, result.output->data());
  return {};
}

/// Verifies the pages that the step reads and breaks the seals of those that it writes.
expected<void> stage_compute::open_pages(const proto::RunMicroBatch& batch) {
  auto& seals = *traits_.seals;
  auto num_pages = seals.shape().num_pages;
  auto page_tokens = static_cast<std::uint32_t>(seals.shape().page_tokens);
  for (auto page : pages_)
    if (page < 0 || static_cast<std::size_t>(page) >= num_pages)
      return fail(error_code::invalid_request,
                  fmt::format("a block table names page {} of {}", page, num_pages));
  read_pages_.clear();
  for (int s = 0; s < batch.first_positions_size(); ++s) {
    // The page that the first row goes to is read too, unless the row is its first.
    auto count = (batch.first_positions(s) + page_tokens - 1) / page_tokens;
    auto first = pages_.begin() + page_offsets_[static_cast<std::size_t>(s)];
    read_pages_.insert(read_pages_.end(), first, first + std::min(count, batch.page_counts(s)));
  }
  auto fault = faults::hit(faults::point::kv_pages);
  bool spoilt =
    fault && fault->what == faults::kind::flip_bit && seals.flip_bit(read_pages_, fault->random);
  if (auto damaged = seals.find_damage(read_pages_, spoilt)) {
    kv_is_damaged_ = true;
    return fail(error_code::internal, fmt::format("KV page {} is damaged", *damaged),
                "its sequences are computed again; check the machine's memory if this recurs");
  }
  for (int s = 0; s < batch.first_positions_size(); ++s)
    for (auto page = batch.first_positions(s) / page_tokens; page < batch.page_counts(s); ++page)
      seals.open(
        pages_[static_cast<std::size_t>(page_offsets_[static_cast<std::size_t>(s)]) + page]);
  return {};
}

/// Seals the pages whose last position the step has written.
void stage_compute::seal_pages(const proto::RunMicroBatch& batch) {
  auto& seals = *traits_.seals;
  auto page_tokens = static_cast<std::uint32_t>(seals.shape().page_tokens);
  for (int s = 0; s < batch.first_positions_size(); ++s) {
    auto end = (batch.first_positions(s) + batch.row_counts(s)) / page_tokens;
    for (auto page = batch.first_positions(s) / page_tokens; page < end; ++page)
      seals.seal(
        pages_[static_cast<std::size_t>(page_offsets_[static_cast<std::size_t>(s)]) + page]);
  }
}

expected<stage_result> stage_compute::compute(const stage_work& work) {
  const auto& batch = *work.batch;
  kv_is_damaged_ = false;
  input_is_lost_ = false;
  auto num_sequences = batch.first_positions_size();
  if (batch.row_counts_size() != num_sequences || batch.page_counts_size() != num_sequences)
    return fail(error_code::invalid_request,
                "a micro-batch whose sequence arrays differ in length");
  tokens_.assign(batch.tokens().begin(), batch.tokens().end());
  pages_.assign(batch.pages().begin(), batch.pages().end());
  positions_.clear();
  sequences_.clear();
  page_offsets_.clear();
  std::int32_t first_page = 0;
  for (int s = 0; s < num_sequences; ++s) {
    page_offsets_.push_back(first_page);
    first_page += static_cast<std::int32_t>(batch.page_counts(s));
    for (std::uint32_t r = 0; r < batch.row_counts(s); ++r) {
      positions_.push_back(static_cast<std::int32_t>(batch.first_positions(s) + r));
      sequences_.push_back(s);
    }
  }
  if (positions_.size() != tokens_.size() || static_cast<std::size_t>(first_page) != pages_.size())
    return fail(error_code::invalid_request,
                fmt::format("a micro-batch of {} rows with {} tokens, {} pages of {}",
                            positions_.size(), tokens_.size(), first_page, pages_.size()));
  model::stage_input input;
  input.tokens = tokens_;
  input.batch = {positions_, sequences_, pages_, page_offsets_};
  auto row_bytes = kernels::size_of(ops_.front()->activation_type())
                   * static_cast<std::size_t>(model_->leader().config().hidden_size);
  const bool is_first = model_->leader().is_first();
  std::function<expected<void>(const kernels::rows_view&)> fetching;
  if (!is_first && work.input->header.has_place()) {
    fetching = [&](const kernels::rows_view& to) { return fetch(work.input->header, to); };
    input.fetch = &fetching;
  } else if (!is_first) {
    if (work.input->payload.size() != tokens_.size() * row_bytes)
      return fail(error_code::internal,
                  fmt::format("{} sent {} bytes of hidden states for {} rows of {}",
                              work.input->header.sender(), work.input->payload.size(),
                              tokens_.size(), row_bytes));
    input.hidden = work.input->payload.data();
  }
  if (experts_) {
    experts_->set_step(batch.step());
    input.experts = experts_.get();
  }
  if (traits_.seals)
    if (auto opened = open_pages(batch); !opened)
      return tl::unexpected(opened.error());
  auto fault = faults::hit(faults::point::activation);
  std::function<void(const kernels::rows_view&)> inject;
  if (fault) {
    inject = [&](const kernels::rows_view& computed) { spoil(*ops_.front(), computed, *fault); };
    input.spoil = &inject;
  }
  auto hidden = model_->forward(input);
  if (!hidden)
    return tl::unexpected(hidden.error());
  stage_result result;
  result.step = batch.step();
  if (model_->leader().is_last()) {
    auto done = draw(batch);
    if (!done)
      return tl::unexpected(done.error());
    if (batch.drafts_wanted_size() > 0)
      if (auto drafted = draft(batch, **done); !drafted)
        return tl::unexpected(drafted.error());
    result.done = std::move(*done);
  }
  // Drafting writes to the pages as well.
  if (traits_.seals)
    seal_pages(batch);
  if (!model_->leader().is_last())
    if (auto handed = hand_over(*hidden, work.stays_on_device, result); !handed)
      return tl::unexpected(handed.error());
  return result;
}

expected<std::shared_ptr<proto::MicroBatchDone>>
stage_compute::draw(const proto::RunMicroBatch& batch) {
  auto count = static_cast<std::size_t>(batch.outputs_size());
  rows_.resize(count);
  params_.resize(count);
  sampled_.resize(count);
  for (std::size_t i = 0; i < count; ++i) {
    const auto& o = batch.outputs(static_cast<int>(i));
    rows_[i] = static_cast<std::int32_t>(o.row());
    auto& p = params_[i];
    p.temperature = o.temperature();
    p.top_k = o.top_k();
    p.top_p = o.top_p();
    p.min_p = o.min_p();
    p.seed = o.seed();
    p.position = o.position();
    p.num_logprobs = o.num_logprobs();
    p.target = o.target();
    p.banned = {o.banned().data(), static_cast<std::size_t>(o.banned_size())};
  }
  if (auto drawn = model_->leader().sample(rows_, params_, sampled_); !drawn)
    return tl::unexpected(drawn.error());
  if (!traits_.unprotected)
    for (std::size_t i = 0; i < count; ++i)
      if (!std::isfinite(sampled_[i].logprob))
        return fail(error_code::internal,
                    fmt::format("the log-probability drawn from row {} is not finite", rows_[i]),
                    "weights are damaged");
  auto done = std::make_shared<proto::MicroBatchDone>();
  done->set_replica(batch.replica());
  done->set_step(batch.step());
  for (const auto& s : sampled_) {
    done->add_tokens(s.token);
    done->add_logprobs(s.logprob);
    done->add_top_counts(static_cast<std::uint32_t>(s.num_top));
    done->mutable_top_tokens()->Add(s.top_tokens, s.top_tokens + s.num_top);
    done->mutable_top_logprobs()->Add(s.top_logprobs, s.top_logprobs + s.num_top);
  }
  return done;
}

/// Computes the MTP layer for the rows that stand and drafts the tokens behind them.
expected<void> stage_compute::draft(const proto::RunMicroBatch& batch,
                                    proto::MicroBatchDone& done) {
  auto num_slices = batch.row_counts_size();
  if (batch.drafts_wanted_size() != num_slices || batch.draft_counts_size() != num_slices
      || batch.next_tokens_size() != num_slices)
    return fail(error_code::invalid_request, "a micro-batch whose draft arrays differ in length");
  auto most = static_cast<std::uint32_t>(model_->leader().options().max_drafts);
  draft_slices_.clear();
  for (int s = 0; s < num_slices; ++s)
    draft_slices_.push_back({static_cast<std::int32_t>(batch.row_counts(s)),
                             static_cast<std::int32_t>(batch.draft_counts(s)), batch.next_tokens(s),
                             static_cast<std::int32_t>(std::min(batch.drafts_wanted(s), most))});
  drawn_.clear();
  for (const auto& token : sampled_)
    drawn_.push_back(token.token);
  if (auto built = draft_plan_.build(draft_slices_, tokens_, rows_, drawn_); !built)
    return built;
  draft_positions_.clear();
  draft_sequences_.clear();
  for (auto row : draft_plan_.rows()) {
    draft_positions_.push_back(positions_[static_cast<std::size_t>(row)]);
    draft_sequences_.push_back(sequences_[static_cast<std::size_t>(row)]);
  }
  chains_.clear();
  for (const auto& chain : draft_plan_.chains()) {
    chains_.push_back({chain.row, chain.num_drafts, params_[chain.output]});
    ++chains_.back().draw.position;
  }
  model::draft_input input{draft_plan_.rows(),
                           draft_plan_.next_tokens(),
                           {draft_positions_, draft_sequences_, pages_, page_offsets_},
                           chains_,
                           experts_.get()};
  drafts_.resize(chains_.size() * most);
  if (auto drafted = model_->leader().draft(input, drafts_); !drafted)
    return drafted;
  done.mutable_draft_counts()->Resize(num_slices, 0);
  for (std::size_t c = 0; c < chains_.size(); ++c) {
    std::uint32_t count = 0;
    for (auto* token = drafts_.data() + c * most; count < most && token[count] >= 0; ++count)
      done.add_drafts(token[count]);
    done.set_draft_counts(draft_plan_.chains()[c].slice, count);
  }
  return {};
}

} // namespace troupe::actors
