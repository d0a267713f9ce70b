#include "troupe/recovery/pulse_monitor.hpp"

#include <algorithm>

#include <fmt/format.h>

namespace troupe::recovery {

namespace {

using memory::activity_state;

/// A process that is ready to run and gets no time is not dead, but neither is it of use for ever.
constexpr int starvation_limit = 5;

long in_ms(pulse_monitor::duration d) {
  return std::chrono::duration_cast<std::chrono::milliseconds>(d).count();
}

} // namespace

pulse_monitor::duration pulse_monitor::counter::update(std::uint64_t seen, duration clock) {
  if (seen != value) {
    value = seen;
    changed = clock;
  }
  return clock - changed;
}

pulse_monitor::pulse_monitor(duration patience, duration birth, duration poll_interval)
  : patience_(patience), birth_(birth), poll_interval_(poll_interval) {}

void pulse_monitor::born(time_point now) {
  last_look_ = now;
  has_looked_ = true;
  watched_ = lived_ = {};
  beat_ = control_ = {};
  activities_.clear();
}

std::optional<std::string> pulse_monitor::look(const memory::pulse_sample& sample, time_point now,
                                               const std::function<bool()>& is_starved) {
  if (!has_looked_)
    born(now);
  const duration longest = 2 * poll_interval_;
  watched_ += std::clamp<duration>(now - last_look_, {}, longest);
  last_look_ = now;

  // Beats and looks are about as frequent, so one look in between may see none.
  if (sample.beat != beat_.value)
    lived_ += std::min(watched_ - beat_.changed, longest);
  const auto silence = beat_.update(sample.beat, watched_);
  if (sample.beat == 0) {
    if (silence >= birth_)
      return fmt::format("no beat yet {} ms after its start", in_ms(silence));
    return std::nullopt;
  }
  if (silence >= patience_
      && !(is_starved && silence < starvation_limit * patience_ && is_starved()))
    return fmt::format("no beat for {} ms", in_ms(silence));

  const auto unanswered = control_.update(sample.control, lived_);
  if (sample.control != 0 && unanswered >= patience_)
    return fmt::format("its actors have not answered for {} ms", in_ms(unanswered));

  std::optional<std::string> stuck;
  activities_.resize(sample.activities.size());
  for (std::size_t i = 0; i < activities_.size(); ++i) {
    const auto& seen = sample.activities[i];
    auto& known = activities_[i];
    if (known.name != seen.name) {
      known.name = seen.name;
      known.progress = {seen.progress, lived_};
    }
    const auto still = known.progress.update(seen.progress, lived_);
    if (seen.state != activity_state::computing)
      known.progress.changed = lived_; // its clock begins when it computes
    else if (still >= patience_ && !stuck)
      stuck = fmt::format("{} computes without progress for {} ms", seen.name, in_ms(still));
  }
  return stuck;
}

} // namespace troupe::recovery
