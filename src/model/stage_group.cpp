#include "troupe/model/stage_group.hpp"

#include "troupe/kernels/cpu/spin.hpp"

#include <utility>

namespace troupe::model {

stage_group::stage_group(std::vector<std::unique_ptr<stage_model>> ranks,
                         std::chrono::nanoseconds alert)
  : ranks_(std::move(ranks)), alert_(alert), outcomes_(ranks_.size()) {
  for (std::size_t rank = 1; rank < ranks_.size(); ++rank)
    followers_.emplace_back([this, rank] { follow(rank); });
}

stage_group::~stage_group() {
  {
    const std::lock_guard lock(mutex_);
    is_ending_ = true;
  }
  changed_.notify_all();
  for (auto& follower : followers_)
    follower.join();
}

void stage_group::attach_kv(std::span<void* const> of_ranks, std::int32_t num_pages,
                            std::int32_t page_tokens) {
  for (std::size_t rank = 0; rank < ranks_.size(); ++rank)
    ranks_[rank]->attach_kv(of_ranks[rank], num_pages, page_tokens);
}

expected<void> stage_group::record_step(std::int32_t num_rows) {
  for (auto& rank : ranks_)
    if (auto recorded = rank->record_step(num_rows); !recorded)
      return recorded;
  return {};
}

expected<kernels::rows_view> stage_group::forward(const stage_input& input) {
  if (followers_.empty())
    return leader().forward(input);
  call_followers(input);
  auto rows = leader().forward(input);
  await_followers();
  if (!rows)
    return rows;
  for (auto& outcome : outcomes_)
    if (!outcome)
      return tl::unexpected(outcome.error());
  return rows;
}

void stage_group::call_followers(const stage_input& input) {
  {
    const std::lock_guard lock(mutex_);
    input_ = input;
    input_.spoil = nullptr; // a drill spoils what is passed on, which is rank 0's
    num_busy_ = followers_.size();
    ++num_calls_;
  }
  changed_.notify_all();
}

/// Followers wait for nothing but their device, and for other ranks, whose patience ends.
void stage_group::await_followers() {
  const auto are_done = [this] { return num_busy_ == 0; };
  kernels::cpu::spin(are_done, alert_);
  std::unique_lock lock(mutex_);
  changed_.wait(lock, are_done);
}

void stage_group::follow(std::size_t rank) {
  std::uint64_t num_done = 0;
  const auto is_called = [&] { return is_ending_ || num_calls_ != num_done; };
  for (;;) {
    kernels::cpu::spin(is_called, alert_);
    std::unique_lock lock(mutex_);
    changed_.wait(lock, is_called);
    if (is_ending_)
      return;
    ++num_done;
    const auto input = input_;
    lock.unlock();
    auto rows = ranks_[rank]->forward(input);
    lock.lock();
    outcomes_[rank] = rows ? expected<void>() : tl::unexpected(std::move(rows.error()));
    if (--num_busy_ == 0)
      changed_.notify_all();
  }
}

} // namespace troupe::model
