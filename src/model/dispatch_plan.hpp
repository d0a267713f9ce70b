#pragma once

#include "troupe/base/error.hpp"
#include "troupe/kernels/ops.hpp"

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace troupe::model {

/// Experts [first, end), as global indices within a layer.
struct expert_range {
  std::int32_t first = 0;
  std::int32_t end = 0;
};

/// Who computes what of one MoE layer: turns the router's choice into one piece of work a
/// group of experts. No I/O and, after construction, no allocation. Not thread-safe.
///
/// Tasks are numbered across all groups, sorted by expert and then by row. So output i
/// belongs to task i whatever the grouping is, and `expert_rows` is the same for any.
class dispatch_plan {
public:
  /// One group's work. Spans are valid until the next `build`.
  struct group_work {
    std::span<const std::int32_t> rows;          ///< distinct rows of x to send, ascending
    std::span<const kernels::expert_task> tasks; ///< row: index into `rows`; expert: global index
    std::int32_t first_output = 0; ///< the output of tasks[i] goes to expert_out[first_output + i]
  };

  /// `groups` must follow each other and cover [0, num_experts). Errors: invalid_config.
  static expected<dispatch_plan> make(std::span<const expert_range> groups,
                                      std::int32_t num_experts, std::int32_t max_rows,
                                      std::int32_t top_k);

  /// Plans for experts [rows, top_k]. Errors: internal for an expert out of range or more
  /// rows than planned for.
  expected<void> build(std::span<const std::int32_t> experts);

  std::size_t num_groups() const { return groups_.size(); }
  expert_range range(std::size_t group) const { return groups_[group]; }
  group_work work(std::size_t group) const;

  /// [rows, top_k]: the row of expert_out that holds each (row, k).
  std::span<const std::int32_t> expert_rows() const { return {expert_rows_.data(), num_tasks_}; }

private:
  dispatch_plan() = default;

  std::int32_t num_experts_ = 0;
  std::int32_t max_rows_ = 0;
  std::int32_t top_k_ = 0;
  std::vector<expert_range> groups_;
  std::vector<std::int32_t> group_of_; // [num_experts]
  std::size_t num_tasks_ = 0;
  std::vector<std::int32_t> first_task_;    // [num_experts + 1]
  std::vector<std::int32_t> next_task_;     // [num_experts], scratch of build
  std::vector<kernels::expert_task> tasks_; // [max_rows * top_k]
  std::vector<std::int32_t> expert_rows_;   // [max_rows * top_k]
  std::vector<std::int32_t> rows_;          // [groups, max_rows]
  std::vector<std::int32_t> num_rows_;      // [groups]
};

} // namespace troupe::model
