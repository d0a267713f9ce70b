#include "troupe/drill/statistics.hpp"

#include <algorithm>
#include <cmath>

namespace troupe::drill {

namespace {

constexpr double smallest_ms = 0.01;
const double width = std::log(1.02);

} // namespace

double percentile(std::vector<double> samples, double p) {
  if (samples.empty())
    return 0;
  std::ranges::sort(samples);
  const double at = p * static_cast<double>(samples.size() - 1);
  const auto below = static_cast<std::size_t>(at);
  const auto above = std::min(below + 1, samples.size() - 1);
  return samples[below] + (samples[above] - samples[below]) * (at - static_cast<double>(below));
}

summary summarise(const std::vector<double>& samples) {
  return {samples.size(), percentile(samples, 0.5), percentile(samples, 0.95),
          percentile(samples, 1)};
}

void histogram::add(double ms) {
  const auto bucket = static_cast<std::size_t>(
    std::max(0.0, std::log(std::max(ms, smallest_ms) / smallest_ms) / width));
  if (bucket >= buckets_.size())
    buckets_.resize(bucket + 1);
  ++buckets_[bucket];
  ++count_;
  max_ = std::max(max_, ms);
}

void histogram::add(const histogram& other) {
  if (other.buckets_.size() > buckets_.size())
    buckets_.resize(other.buckets_.size());
  for (std::size_t i = 0; i < other.buckets_.size(); ++i)
    buckets_[i] += other.buckets_[i];
  count_ += other.count_;
  max_ = std::max(max_, other.max_);
}

double histogram::percentile(double p) const {
  if (count_ == 0)
    return 0;
  const auto wanted = static_cast<std::uint64_t>(std::ceil(p * static_cast<double>(count_)));
  std::uint64_t seen = 0;
  for (std::size_t i = 0; i < buckets_.size(); ++i) {
    seen += buckets_[i];
    if (seen >= std::max<std::uint64_t>(wanted, 1))
      return std::min(max_, smallest_ms * std::exp(width * (static_cast<double>(i) + 0.5)));
  }
  return max_;
}

std::span<const double> settled(const std::vector<double>& series) {
  constexpr std::size_t warm_up = 60;
  return std::span(series).subspan(std::min(warm_up, series.size()));
}

std::optional<double> growth(std::span<const double> series) {
  if (series.size() < 20)
    return std::nullopt;
  const auto quarter = series.size() / 4;
  const auto median = [&](std::size_t from) {
    auto part = series.subspan(from, quarter);
    return percentile({part.begin(), part.end()}, 0.5);
  };
  return median(series.size() - quarter) - median(quarter);
}

} // namespace troupe::drill
