#pragma once

#include "troupe/base/child_processes.hpp"
#include "troupe/memory/pulse_page.hpp"
#include "troupe/recovery/pulse_monitor.hpp"

#include <chrono>
#include <memory>
#include <string>

namespace troupe::actors {

/// A parent's eye on one of its child processes: the pulse page that they share and the judgement
/// of it. Belongs to the parent's thread; ends with the child.
class child_watch {
public:
  using time_point = std::chrono::steady_clock::time_point;

  /// How often a child is looked at whose silence is death after `patience`.
  static std::chrono::milliseconds interval(std::chrono::milliseconds patience);

  /// Makes a page, lets the child that `spec` describes inherit it, and expects its birth from
  /// now on. Fails with resource_exhausted.
  static expected<child_watch> begin(child_spec& spec, std::chrono::milliseconds patience);

  /// Looks at the page. True, and this once only, when the process counts as dead: it must be
  /// killed, and `verdict` says why.
  bool look(pid_t process, time_point now);

  /// Of the child.
  std::shared_ptr<life_line> life() const { return page_.life(); }

  /// How the child ended, with its last words if it had any.
  std::string cause_of(const child_exit& exit) const;

  const std::string& verdict() const { return verdict_; } ///< empty: none
  time_point judged() const { return judged_; }

private:
  child_watch(memory::pulse_page page, std::chrono::milliseconds patience);

  memory::pulse_page page_;
  recovery::pulse_monitor monitor_;
  memory::pulse_sample sample_;
  std::string verdict_;
  time_point judged_{};
};

} // namespace troupe::actors
