#include "troupe/kernels/cpu/rank_group.hpp"

#include <algorithm>
#include <cstddef>

namespace troupe::kernels {

namespace {

/// Far beyond what a rank may lag behind, far below what clients wait.
constexpr std::chrono::seconds kPatience{10};

} // namespace

std::shared_ptr<cpu_rank_group> make_cpu_rank_group(std::int32_t size) {
  return std::make_shared<cpu_rank_group>(size, kPatience);
}

cpu_rank_group::cpu_rank_group(std::int32_t size, std::chrono::milliseconds patience)
  : size_(size), patience_(patience), given_(static_cast<std::size_t>(size)) {}

bool cpu_rank_group::meet() {
  std::unique_lock lock(mutex_);
  const auto meeting = num_meetings_;
  if (++num_here_ == size_) {
    num_here_ = 0;
    ++num_meetings_;
    all_are_here_.notify_all();
  }
  const bool met =
    all_are_here_.wait_for(lock, patience_, [&] { return num_meetings_ != meeting || is_broken_; });
  is_broken_ = is_broken_ || !met;
  if (is_broken_) {
    all_are_here_.notify_all();
  }
  return !is_broken_;
}

std::string cpu_rank_group::add_up(std::int32_t rank, const rows_view& x) {
  const std::string lost = "rank " + std::to_string(rank) + " of " + std::to_string(size_)
                           + " waited in vain for the others";
  given_[static_cast<std::size_t>(rank)] = x;
  if (rank == 0) {
    sums_.resize(static_cast<std::size_t>(x.num_rows) * x.num_cols);
  }
  if (!meet()) {
    return lost;
  }
  for (const auto& other : given_) {
    if (other.num_rows != x.num_rows || other.num_cols != x.num_cols) {
      return "the ranks of a group add up rows of different shapes";
    }
  }
  const auto first = x.num_rows * rank / size_;
  const auto last = x.num_rows * (rank + 1) / size_;
  for (auto row = first; row < last; ++row) {
    auto* sum = sums_.data() + std::ptrdiff_t{row} * x.num_cols;
    std::fill_n(sum, x.num_cols, 0.0F);
    for (const auto& one : given_) {
      const auto* from = static_cast<const float*>(one.data) + std::ptrdiff_t{row} * one.stride;
      for (std::int32_t col = 0; col < x.num_cols; ++col) {
        sum[col] += from[col];
      }
    }
  }
  if (!meet()) {
    return lost;
  }
  for (std::int32_t row = 0; row < x.num_rows; ++row) {
    std::copy_n(sums_.data() + std::ptrdiff_t{row} * x.num_cols, x.num_cols,
                static_cast<float*>(x.data) + std::ptrdiff_t{row} * x.stride);
  }
  // The next sum may begin only when everybody has read this one.
  return meet() ? std::string() : lost;
}

} // namespace troupe::kernels
