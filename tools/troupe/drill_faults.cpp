#include "drill_faults.hpp"

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>

#include <fmt/format.h>

namespace troupe::tools::drills {

namespace fs = std::filesystem;
using drill::fault_kind;

namespace {

constexpr auto rule_lasts = 2s;    ///< unless the event says how long
constexpr auto counted_lasts = 5s; ///< at most, of rules with a count

std::int64_t ns(std::chrono::milliseconds d) {
  return std::chrono::nanoseconds(d).count();
}

/// The globs of a side of a partition: a node stands for everything on it.
std::vector<std::string> side_of(const std::string& name) {
  if (name.find('*') != std::string::npos || name.find('/') != std::string::npos)
    return {name};
  return name.starts_with("node") ? std::vector<std::string>{name, name + "/*"}
                                  : std::vector<std::string>{name};
}

bool matches_side(const std::vector<std::string>& side, const std::string& name) {
  return std::ranges::any_of(side, [&](const std::string& glob) {
    return glob == name
           || (glob.ends_with('*') && name.starts_with(glob.substr(0, glob.size() - 1)));
  });
}

bool breaks_device(faults::kind what) {
  using faults::kind;
  return what == kind::device_error || what == kind::device_misaligned || what == kind::device_trap
         || what == kind::device_assert;
}

} // namespace

std::string fault_injector::send(const drill::resolved_target& to, int signal_number) {
  std::string problem = "no such process runs now";
  for (int pid : to.pids) {
    // A number of the status may be old: nobody else's process may be hit.
    if (pid <= 0 || !cluster_.owns(pid))
      continue;
    if (::kill(pid, signal_number) == 0)
      problem.clear();
    else
      problem = std::strerror(errno);
  }
  return problem;
}

std::string fault_injector::add_rule(faults::rule rule, open_fault& open) {
  open.count = rule.count;
  auto number = board_.add(rule);
  if (!number)
    return number.error().text();
  open.rules.push_back(*number);
  return {};
}

std::string fault_injector::partition(const drill::fault_spec& fault,
                                      const drill::resolved_target& to, open_fault& open) {
  const auto here = side_of(to.name);
  std::vector<std::string> there;
  if (fault.peer != "*") {
    there = side_of(fault.peer);
  } else {
    const auto shown = cluster_.newest().shown;
    for (const auto* name : {"controller", "frontend"})
      if (!matches_side(here, name))
        there.push_back(name);
    for (const auto& n : shown.nodes)
      if (!matches_side(here, n.name))
        for (auto& glob : side_of(n.name))
          there.push_back(std::move(glob));
  }
  for (const auto& a : here)
    for (const auto& b : there)
      for (bool back : {false, true}) {
        if (back && fault.one_way)
          continue;
        auto number = board_.cut(back ? b : a, back ? a : b);
        if (!number)
          return number.error().text();
        open.rules.push_back(*number);
      }
  return {};
}

/// The process is stopped first, so that it cannot go on writing behind the cut.
std::string fault_injector::cut_journal(const drill::resolved_target& to, std::uint64_t seed) {
  if (auto problem = send(to, SIGSTOP); !problem.empty())
    return problem;
  std::string problem = "there is no journal of " + to.name;
  std::error_code failed;
  for (const auto& entry : fs::directory_iterator(cluster_.state_directory(), failed)) {
    if (entry.path().extension() != ".journal"
        || entry.path().filename().string().find(to.name) == std::string::npos)
      continue;
    const auto size = entry.file_size(failed);
    fs::resize_file(entry.path(), size == 0 ? 0 : seed % size, failed);
    problem = failed ? failed.message() : "";
  }
  auto killed = send(to, SIGKILL);
  return killed.empty() ? problem : killed;
}

drill::injection fault_injector::inject(const drill::event& what,
                                        const drill::planned_event& when) {
  drill::injection made;
  made.event = when.event;
  made.label = what.label();
  open_fault open;
  open.injection = num_injected_++;
  drill::seeded random(when.seed);
  auto to = drill::resolve(what.fault.target, cluster_.newest().shown, random, previous_);
  made.t0_ns = now_ns();
  if (!to) {
    made.target = what.fault.target;
    made.note = to.error().cause;
    return made;
  }
  made.target = to->name;
  bool ends = false, lasts = when.lasting.count() > 0;
  switch (what.fault.kind) {
  case fault_kind::kill:
    to->pids = {to->pid};
    made.note = send(*to, SIGKILL);
    ends = true;
    break;
  case fault_kind::segv:
    to->pids = {to->pid};
    made.note = send(*to, SIGSEGV);
    ends = true;
    break;
  case fault_kind::stop:
    to->pids = {to->pid};
    made.note = send(*to, SIGSTOP);
    ends = !lasts;
    if (lasts)
      open.stopped = to->pids;
    break;
  case fault_kind::resume: made.note = send(*to, SIGCONT); break;
  case fault_kind::kill_node:
    if (lasts)
      made.note = add_rule({.process = "launcher",
                            .peer = to->name,
                            .where = faults::point::process_spawn,
                            .what = faults::kind::fail},
                           open);
    if (made.note.empty())
      made.note = send(*to, SIGKILL);
    ends = true;
    break;
  case fault_kind::partition: made.note = partition(what.fault, *to, open); break;
  case fault_kind::cut_journal:
    made.note = cut_journal(*to, random.next());
    ends = true;
    break;
  case fault_kind::rule: {
    auto rule = what.fault.rule;
    rule.process = to->name;
    rule.peer = cluster_.newest().shown.find(rule.peer).name;
    rule.seed = random.next();
    made.note = add_rule(rule, open);
    made.expects_hits = true;
    // It may compute on for a while, and its successor be there soon after: until then all looks
    // well.
    if (breaks_device(rule.what))
      open.ends = ended_process{to->name, to->pid};
    if (!lasts)
      open.due_ns = made.t0_ns + ns(rule.count > 0 ? counted_lasts : rule_lasts);
    break;
  }
  }
  // The signal counts from when it was sent, not from when its target was looked up.
  if (made.note.empty()) {
    previous_ = to->name;
    if (ends) {
      made.ended_pid = to->pid;
      ended_.push_back({to->name, to->pid});
    }
    made.leads_to_recovery = ends && to->name.starts_with("node");
    if (lasts)
      open.due_ns = made.t0_ns + ns(when.lasting);
  }
  if (!open.rules.empty() || !open.stopped.empty())
    open_.push_back(std::move(open));
  return made;
}

void fault_injector::undo_due(std::vector<drill::injection>& injections, bool all) {
  const auto now = now_ns();
  std::erase_if(open_, [&](const open_fault& open) {
    std::uint64_t hits = 0;
    for (auto rule : open.rules)
      hits += board_.num_hits(rule);
    bool used_up = open.count > 0 && hits >= open.count;
    if (!all && !used_up && (open.due_ns == 0 || now < open.due_ns))
      return false;
    for (auto rule : open.rules)
      board_.remove(rule);
    if (open.ends && hits > 0)
      ended_.push_back(*open.ends);
    for (int pid : open.stopped)
      if (cluster_.owns(pid))
        ::kill(pid, SIGCONT);
    if (open.injection < injections.size()) {
      injections[open.injection].until_ns = now;
      injections[open.injection].hits = hits;
    }
    return true;
  });
}

bool fault_injector::all_replaced(const drill::topology& now) const {
  return std::ranges::all_of(ended_,
                             [&](const ended_process& e) { return now.find(e.name).pid != e.pid; });
}

void fault_injector::begin_run() {
  ended_.clear();
  open_.clear();
  num_injected_ = 0;
}

int fault_injector::ended_pid(const std::string& name) const {
  auto newest = std::ranges::find(ended_.rbegin(), ended_.rend(), name, &ended_process::name);
  return newest == ended_.rend() ? 0 : newest->pid;
}

} // namespace troupe::tools::drills
