#include "troupe/actors/child_watch.hpp"

#include <algorithm>
#include <utility>

namespace troupe::actors {

using namespace std::chrono_literals;

namespace {

/// What a new process gets until its first beat.
constexpr auto birth_time = 10s;

} // namespace

std::chrono::milliseconds child_watch::interval(std::chrono::milliseconds patience) {
  return std::max<std::chrono::milliseconds>(10ms, patience / 8);
}

child_watch::child_watch(memory::pulse_page page, std::chrono::milliseconds patience)
  : page_(std::move(page)), monitor_(patience, birth_time, interval(patience)) {
  monitor_.born(std::chrono::steady_clock::now());
}

expected<child_watch> child_watch::begin(child_spec& spec, std::chrono::milliseconds patience) {
  auto page = memory::pulse_page::create();
  if (!page)
    return tl::unexpected(page.error());
  spec.inherited_fds.push_back(page->fd());
  spec.arguments.insert(spec.arguments.end(), {"--pulse-fd", std::to_string(page->fd())});
  return child_watch(std::move(*page), patience);
}

bool child_watch::look(pid_t process, time_point now) {
  if (!verdict_.empty())
    return false;
  page_.sample(sample_);
  auto state = [&] { return task_state(process, sample_.beat_thread); };
  auto why = monitor_.look(sample_, now, [&] { return state() == 'R' || state() == 'D'; });
  if (!why)
    return false;
  verdict_ = *why;
  if (state() == 'T')
    verdict_ += ", it was stopped by a signal";
  judged_ = now;
  return true;
}

std::string child_watch::cause_of(const child_exit& exit) const {
  const auto words = page_.last_words();
  return words.empty() ? exit.text() : exit.text() + ": " + words;
}

} // namespace troupe::actors
