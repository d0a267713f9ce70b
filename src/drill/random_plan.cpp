#include "troupe/drill/random_plan.hpp"

#include "troupe/drill/seeded.hpp"

#include <algorithm>
#include <array>
#include <functional>

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace troupe::drill {

namespace {

/// What a drawer of one kind of fault works with.
struct drawing {
  seeded& random;
  const cast& who;
  milliseconds at;
  std::vector<event>& out;

  const std::string& one_of(const std::vector<std::string>& list) {
    return list[random.below(list.size())];
  }
  milliseconds between(int low, int high) {
    return random.in({milliseconds(low), milliseconds(high)});
  }

  event& add(fault_kind kind, std::string target, milliseconds later = milliseconds(0)) {
    auto& e = out.emplace_back();
    e.at = {at + later, at + later};
    e.fault.kind = kind;
    e.fault.target = std::move(target);
    return e;
  }

  /// A rule for a while.
  event& add_rule(faults::point where, faults::kind what, std::string target, double probability,
                  std::uint32_t count, milliseconds lasting) {
    auto& e = add(fault_kind::rule, std::move(target));
    e.fault.rule.where = where;
    e.fault.rule.what = what;
    e.fault.rule.probability = probability;
    e.fault.rule.count = count;
    e.lasting = time_range{lasting, lasting};
    return e;
  }
};

using faults::kind;
using faults::point;

void kill_worker(drawing& d) {
  d.add(fault_kind::kill, d.one_of(d.who.workers));
}
void kill_same_twice(drawing& d) {
  auto name = d.one_of(d.who.workers);
  d.add(fault_kind::kill, name);
  d.add(fault_kind::kill, name, d.between(20, 250));
}
void kill_two(drawing& d) {
  d.add(fault_kind::kill, d.one_of(d.who.workers));
  d.add(fault_kind::kill, d.one_of(d.who.workers), d.between(0, 60));
}
void segv_worker(drawing& d) {
  d.add(fault_kind::segv, d.one_of(d.who.workers));
}
void stop_worker(drawing& d) {
  d.add(fault_kind::stop, d.one_of(d.who.workers));
}
void stop_for_a_moment(drawing& d) {
  auto lasting = d.between(20, 1200);
  d.add(fault_kind::stop, d.one_of(d.who.workers)).lasting = time_range{lasting, lasting};
}
void kill_node(drawing& d) {
  d.add(fault_kind::kill_node, d.one_of(d.who.nodes));
}
void stop_node(drawing& d) {
  d.add(fault_kind::stop, d.one_of(d.who.nodes));
}
void kill_controller(drawing& d) {
  d.add(fault_kind::kill, "controller");
}
void kill_controller_and_worker(drawing& d) {
  d.add(fault_kind::kill, "controller");
  d.add(fault_kind::kill, d.one_of(d.who.workers), d.between(0, 100));
}
void stop_controller(drawing& d) {
  d.add(fault_kind::stop, "controller");
}
void cut_journal(drawing& d) {
  d.add(fault_kind::cut_journal, "controller");
}
void kill_frontend(drawing& d) {
  d.add(fault_kind::kill, "frontend");
}
void partition(drawing& d) {
  auto lasting = d.between(100, 1500);
  auto& e = d.add(fault_kind::partition, d.one_of(d.who.nodes) + "*");
  e.fault.peer = d.random.below(2) ? "controller" : "frontend";
  e.fault.one_way = d.random.below(3) == 0;
  e.lasting = time_range{lasting, lasting};
}
void disturb_frames(drawing& d) {
  constexpr std::array what{kind::drop,    kind::delay,    kind::duplicate,  kind::reorder,
                            kind::corrupt, kind::truncate, kind::wrong_epoch};
  auto& e = d.add_rule(point::frame_send, what[d.random.below(what.size())], "*",
                       0.01 + 0.2 * d.random.fraction(),
                       1 + static_cast<std::uint32_t>(d.random.below(8)), d.between(200, 1000));
  e.fault.rule.delay_ms = 1 + static_cast<std::uint32_t>(d.random.below(40));
}
void disturb_messages(drawing& d) {
  constexpr std::array what{kind::drop, kind::delay, kind::duplicate, kind::reorder};
  auto& e = d.add_rule(point::message_receive, what[d.random.below(what.size())], "*",
                       0.02 + 0.2 * d.random.fraction(),
                       1 + static_cast<std::uint32_t>(d.random.below(4)), d.between(200, 1000));
  e.fault.rule.delay_ms = 1 + static_cast<std::uint32_t>(d.random.below(40));
}
void lose_reply(drawing& d) {
  d.add_rule(point::message_reply, kind::drop, "*", 0.3,
             1 + static_cast<std::uint32_t>(d.random.below(3)), d.between(200, 1000));
}
void busy_loop(drawing& d) {
  d.add_rule(point::compute, kind::busy_loop, d.one_of(d.who.workers), 1, 1, d.between(500, 1500));
}
void deadlock(drawing& d) {
  d.add_rule(point::compute, kind::deadlock, d.one_of(d.who.workers), 1, 1, d.between(500, 1500));
}
/// The process dies, and its successor does not come up either, once or twice.
void crash_loop(drawing& d) {
  auto name = d.one_of(d.who.workers);
  d.add_rule(point::process_init, d.random.below(2) ? kind::exit : kind::crash, name, 1,
             1 + static_cast<std::uint32_t>(d.random.below(2)), milliseconds(1500));
  d.add(fault_kind::kill, name, milliseconds(5));
}
void refuse_fork(drawing& d) {
  auto name = d.one_of(d.who.workers);
  auto node = name.substr(0, name.find('/'));
  // A node numbers its children's lives: "node-0/worker-1#2".
  d.add_rule(point::process_spawn, kind::fail, node, 1, 1, milliseconds(1000)).fault.rule.peer =
    name + "#*";
  d.add(fault_kind::kill, name, milliseconds(5));
}
/// A second death at a step of the recovery from the first.
void second_fault(drawing& d) {
  constexpr std::array steps{point::worker_loading, point::worker_loaded, point::worker_serving};
  auto name = d.one_of(d.who.workers);
  d.add_rule(steps[d.random.below(steps.size())], kind::crash, name, 1, 1, milliseconds(1500));
  d.add(fault_kind::kill, name, milliseconds(5));
}
void fail_journal(drawing& d) {
  constexpr std::array what{kind::no_space, kind::io_error, kind::short_write};
  d.add_rule(point::journal_write, what[d.random.below(what.size())],
             d.random.below(2) ? "controller" : "frontend", 0.5, 3, d.between(200, 1000));
}
void kill_experts(drawing& d) {
  d.add(fault_kind::kill,
        d.one_of(d.who.expert_groups.empty() ? d.who.workers : d.who.expert_groups));
}

struct entry {
  random_fault fault;
  void (*draw)(drawing&);
};
constexpr std::array catalogue{
  entry{{"kill-worker", 24}, kill_worker},
  entry{{"kill-same-twice", 5}, kill_same_twice},
  entry{{"kill-two", 5}, kill_two},
  entry{{"kill-experts", 6}, kill_experts},
  entry{{"segv-worker", 6}, segv_worker},
  entry{{"stop-worker", 6}, stop_worker},
  entry{{"stop-for-a-moment", 6}, stop_for_a_moment},
  entry{{"kill-node", 4}, kill_node},
  entry{{"stop-node", 2}, stop_node},
  entry{{"kill-controller", 5}, kill_controller},
  entry{{"kill-controller-and-worker", 3}, kill_controller_and_worker},
  entry{{"stop-controller", 2}, stop_controller},
  entry{{"cut-journal", 2}, cut_journal},
  entry{{"kill-frontend", 4}, kill_frontend},
  entry{{"partition", 4}, partition},
  entry{{"disturb-frames", 12}, disturb_frames},
  entry{{"disturb-messages", 5}, disturb_messages},
  entry{{"lose-reply", 3}, lose_reply},
  entry{{"busy-loop", 3}, busy_loop},
  entry{{"deadlock", 3}, deadlock},
  entry{{"crash-loop", 3}, crash_loop},
  entry{{"refuse-fork", 2}, refuse_fork},
  entry{{"second-fault", 5}, second_fault},
  entry{{"fail-journal", 3}, fail_journal},
};

constexpr auto names = [] {
  std::array<random_fault, catalogue.size()> result{};
  for (std::size_t i = 0; i < catalogue.size(); ++i)
    result[i] = catalogue[i].fault;
  return result;
}();

bool is_in(const std::vector<std::string>& list, std::string_view name) {
  return std::ranges::find(list, name) != list.end();
}

} // namespace

std::span<const random_fault> random_faults() {
  return names;
}

expected<std::vector<event>> draw_events(const random_settings& settings, const cast& who) {
  for (const auto* list : {&settings.only, &settings.without})
    for (const auto& name : *list)
      if (std::ranges::find(names, name, &random_fault::name) == names.end()) {
        std::vector<std::string_view> all;
        for (const auto& f : names)
          all.push_back(f.name);
        return fail(error_code::invalid_request, fmt::format("no random fault is called {}", name),
                    fmt::format("they are {}", fmt::join(all, ", ")));
      }
  if (who.workers.empty() || who.nodes.empty())
    return fail(error_code::invalid_request, "the cluster has no workers to hit");
  std::vector<entry> usable;
  unsigned total = 0;
  for (const auto& e : catalogue)
    if ((settings.only.empty() || is_in(settings.only, e.fault.name))
        && !is_in(settings.without, e.fault.name)) {
      usable.push_back(e);
      total += e.fault.weight;
    }
  if (usable.empty())
    return fail(error_code::invalid_request, "no kind of fault is left to draw");
  seeded random(settings.seed);
  std::vector<event> result;
  for (auto at = settings.every; at < settings.length; at += settings.every) {
    auto left = random.below(total);
    auto chosen = usable.begin();
    for (; left >= chosen->fault.weight; ++chosen)
      left -= chosen->fault.weight;
    const auto jitter = random.in({milliseconds(0), settings.every / 2});
    drawing d{random, who, at - settings.every / 4 + jitter, result};
    chosen->draw(d);
  }
  return result;
}

} // namespace troupe::drill
