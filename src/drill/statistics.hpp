#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace troupe::drill {

/// The value that the share `p` (0 to 1) of the samples does not exceed, interpolated between the
/// two nearest. 0 if there are none.
double percentile(std::vector<double> samples, double p);

struct summary {
  std::size_t count = 0;
  double median = 0;
  double p95 = 0;
  double max = 0;
};

summary summarise(const std::vector<double>& samples);

/// Counts of durations in buckets that are 2 % wide, for millions of them.
class histogram {
public:
  void add(double ms);
  void add(const histogram& other);
  std::uint64_t count() const { return count_; }
  double max() const { return max_; }
  double percentile(double p) const;

private:
  std::vector<std::uint64_t> buckets_;
  std::uint64_t count_ = 0;
  double max_ = 0;
};

/// Figures of one process over time, each as long as it lived. Memory is what the process holds for
/// itself (RssAnon in /proc/PID/status): pages of the KV cache and of weights are shared, of a size
/// fixed at launch, and come into the resident set as they are touched.
struct process_series {
  std::string name;
  int pid = 0; ///< 0: all processes of the cluster together
  std::vector<double> private_kib;
  std::vector<double> fds;
};

/// How much a series has grown between its second quarter and its last, by medians; nothing for
/// fewer than 20 samples.
std::optional<double> growth(std::span<const double> series);

/// The part of a series that growth is judged by. A process warms up: it keeps buffers of every
/// size that it has come to need, up to a bound, so its first samples are left out, and those of
/// the cluster as a whole. A process that is replaced before shows in the sum over all.
std::span<const double> settled(const std::vector<double>& series);

} // namespace troupe::drill
