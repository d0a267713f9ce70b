#include "troupe/model/dispatch_plan.hpp"

#include <algorithm>

#include <fmt/format.h>

namespace troupe::model {

expected<dispatch_plan> dispatch_plan::make(std::span<const expert_range> groups,
                                            std::int32_t num_experts, std::int32_t max_rows,
                                            std::int32_t top_k) {
  dispatch_plan plan;
  plan.num_experts_ = num_experts;
  plan.max_rows_ = max_rows;
  plan.top_k_ = top_k;
  plan.groups_.assign(groups.begin(), groups.end());
  plan.group_of_.resize(num_experts);
  std::int32_t next = 0;
  for (std::size_t i = 0; i < groups.size(); ++i) {
    const auto [first, end] = groups[i];
    if (first != next || end <= first || end > num_experts)
      return fail(error_code::invalid_config,
                  fmt::format("expert group {} has experts [{}, {}), but {} of {} come next", i,
                              first, end, next, num_experts),
                  "groups must cover all experts in order, without gaps");
    std::fill(plan.group_of_.begin() + first, plan.group_of_.begin() + end,
              static_cast<std::int32_t>(i));
    next = end;
  }
  if (next != num_experts)
    return fail(error_code::invalid_config,
                fmt::format("the expert groups end at expert {} of {}", next, num_experts),
                "groups must cover all experts");
  const auto max_tasks = static_cast<std::size_t>(max_rows) * top_k;
  plan.first_task_.resize(num_experts + 1);
  plan.next_task_.resize(num_experts);
  plan.tasks_.resize(max_tasks);
  plan.expert_rows_.resize(max_tasks);
  plan.rows_.resize(groups.size() * max_rows);
  plan.num_rows_.resize(groups.size());
  return plan;
}

expected<void> dispatch_plan::build(std::span<const std::int32_t> experts) {
  num_tasks_ = 0;
  if (experts.size() > tasks_.size() || experts.size() % top_k_ != 0)
    return fail(error_code::internal, fmt::format("{} routed experts do not fit {} rows of {}",
                                                  experts.size(), max_rows_, top_k_));
  // A counting sort by expert; within an expert, rows stay in order.
  std::fill(first_task_.begin(), first_task_.end(), 0);
  for (const auto expert : experts) {
    if (expert < 0 || expert >= num_experts_)
      return fail(error_code::internal,
                  fmt::format("the router chose expert {} of {}", expert, num_experts_));
    ++first_task_[expert + 1];
  }
  for (std::int32_t i = 0; i < num_experts_; ++i)
    first_task_[i + 1] += first_task_[i];
  std::copy(first_task_.begin(), first_task_.end() - 1, next_task_.begin());
  std::fill(num_rows_.begin(), num_rows_.end(), 0);
  for (std::size_t i = 0; i < experts.size(); ++i) {
    const auto row = static_cast<std::int32_t>(i / top_k_);
    const auto group = group_of_[experts[i]];
    auto* rows = rows_.data() + static_cast<std::size_t>(group) * max_rows_;
    auto& num_rows = num_rows_[group];
    if (num_rows == 0 || rows[num_rows - 1] != row)
      rows[num_rows++] = row;
    const auto task = next_task_[experts[i]]++;
    tasks_[task] = {num_rows - 1, experts[i]};
    expert_rows_[i] = task;
  }
  num_tasks_ = experts.size();
  return {};
}

dispatch_plan::group_work dispatch_plan::work(std::size_t group) const {
  if (num_tasks_ == 0)
    return {};
  const auto first = first_task_[groups_[group].first];
  const auto end = first_task_[groups_[group].end];
  return {{rows_.data() + group * max_rows_, static_cast<std::size_t>(num_rows_[group])},
          {tasks_.data() + first, static_cast<std::size_t>(end - first)},
          first};
}

} // namespace troupe::model
