#include "troupe/actors/stage.hpp"

#include "troupe/actors/convert.hpp"
#include "troupe/actors/injected.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <utility>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

namespace troupe::actors {

namespace {

double ms_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin)
    .count();
}

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
  if (ops_.size() == 1)
    ops_.front()->keep_on_cores(0);
  return {[this](const stage_work& work) {
    auto asker = caf::actor_cast<stage_local>(current_sender());
    traits_.pulse.computing();
    auto begin = std::chrono::steady_clock::now();
    auto result = work.left ? bring_to_host(work) : work_on(work);
    traits_.pulse.idle();
    if (!std::exchange(has_computed_, true))
      spdlog::info("{}: its first step, of {} rows, took {:.1f} ms", traits_.actor,
                   work.batch->tokens_size(), ms_since(begin));
    for (const auto& ops : ops_)
      if (!ops->failure().empty()) {
        // Whatever came of it is worth nothing. The step is computed again by the next process.
        spdlog::critical("{}: the device failed: {}", traits_.actor, ops->failure());
        traits_.pulse.last_words("the device failed: " + ops->failure());
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
