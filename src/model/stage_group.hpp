#pragma once

#include "troupe/base/error.hpp"
#include "troupe/model/stage_model.hpp"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

namespace troupe::model {

/// A stage as its ranks compute it: one device, or several that have a part of every weight each
/// (tensor parallelism; see tensor_shard.hpp). The ranks take the same micro-batch at the same
/// time, each on a thread of its own, and meet where the parts of a sum are added up
/// (kernels::ops::all_reduce); so all of them have the same hidden rows. Rank 0, on the caller's
/// thread, answers for all: it has the head, and draws.
///
/// Used by one thread at a time.
class stage_group {
public:
  /// By rank, at least one; each loaded with the rank's config and with operations of its own.
  /// `alert`: how long its threads look out for the next micro-batch before they sleep, on cores
  /// that nobody else needs. To wake one may take 0.1 ms, in which the devices of all others wait.
  explicit stage_group(std::vector<std::unique_ptr<stage_model>> ranks,
                       std::chrono::nanoseconds alert = {});
  ~stage_group();
  stage_group(const stage_group&) = delete;
  stage_group& operator=(const stage_group&) = delete;

  std::size_t num_ranks() const { return ranks_.size(); }

  /// Rank 0, for all that only it does. Not for forward passes.
  stage_model& leader() { return *ranks_.front(); }
  const stage_model& leader() const { return *ranks_.front(); }

  /// Bytes of KV memory of one rank.
  std::size_t kv_bytes(std::int32_t num_pages, std::int32_t page_tokens) const {
    return leader().kv_bytes(num_pages, page_tokens);
  }

  /// Gives each rank its KV memory, as stage_model::attach_kv.
  void attach_kv(std::span<void* const> of_ranks, std::int32_t num_pages, std::int32_t page_tokens);

  /// As stage_model::record_step, on all ranks, one after the other.
  expected<void> record_step(std::int32_t num_rows);

  /// As stage_model::forward, on all ranks: the rows of rank 0, or the error of the first rank that
  /// has one.
  expected<kernels::rows_view> forward(const stage_input& input);

private:
  void follow(std::size_t rank);
  void call_followers(const stage_input& input);
  void await_followers();

  std::vector<std::unique_ptr<stage_model>> ranks_;
  const std::chrono::nanoseconds alert_;
  std::vector<expected<void>> outcomes_; ///< of the ranks from 1 on
  stage_input input_;                    ///< of the followers
  std::mutex mutex_; ///< who changes what follows holds it; who looks out does not
  std::condition_variable changed_;
  std::atomic<std::uint64_t> num_calls_{0};
  std::atomic<std::size_t> num_busy_{0};
  std::atomic<bool> is_ending_{false};
  std::vector<std::thread> followers_;
};

} // namespace troupe::model
