#include "troupe/drill/timetable.hpp"

#include "troupe/drill/seeded.hpp"

#include <algorithm>
#include <cmath>

namespace troupe::drill {

std::vector<planned_event> timetable(const scenario& drill, std::uint64_t run_seed) {
  seeded random(run_seed);
  std::vector<planned_event> timed, result;
  std::vector<std::pair<std::size_t, planned_event>> conditional; // behind so many timed ones
  for (std::size_t i = 0; i < drill.events.size(); ++i) {
    const auto& e = drill.events[i];
    const auto first = random.in(e.at);
    for (unsigned t = 0; t < e.times; ++t) {
      planned_event made;
      made.event = i;
      made.at = first + e.every * t;
      made.lasting = e.lasting ? random.in(*e.lasting) : milliseconds(0);
      made.seed = random.next();
      if (e.when)
        conditional.emplace_back(i, made);
      else
        timed.push_back(made);
    }
  }
  std::ranges::stable_sort(timed, {}, &planned_event::at);
  result = std::move(timed);
  // Behind the last event that stands before it in the file.
  for (auto& [index, made] : conditional) {
    auto place = std::find_if(result.rbegin(), result.rend(),
                              [&, i = index](const planned_event& p) { return p.event < i; });
    result.insert(place.base(), made);
  }
  return result;
}

arrivals::arrivals(double rate_per_s, std::uint64_t seed) : rate_per_s_(rate_per_s), state_(seed) {}

std::chrono::nanoseconds arrivals::next() {
  seeded random(state_);
  const double share = random.fraction();
  state_ = random.next();
  const double seconds = -std::log1p(-share) / rate_per_s_;
  return std::chrono::nanoseconds(static_cast<std::int64_t>(seconds * 1e9));
}

} // namespace troupe::drill
