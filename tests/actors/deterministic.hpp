#pragma once

#include "troupe/messages/actor_config.hpp"

#include <random>

#include <caf/all.hpp>
#include <caf/scheduler/test_coordinator.hpp>

namespace troupe::test {

/// An actor system in one thread with virtual time. Which actor runs next is the test's choice.
struct deterministic_system {
  messages::actor_config config{messages::actor_config::deterministic_tag{}};
  caf::actor_system system{config};
  caf::scheduler::test_coordinator& scheduler{
    dynamic_cast<caf::scheduler::test_coordinator&>(system.scheduler())};
  caf::scoped_actor self{system};

  /// Runs everything that can run.
  void run() { scheduler.run(); }

  /// Lets virtual time pass, so that timers go off, and runs what follows.
  void advance(caf::timespan time) {
    scheduler.clock().advance_time(time);
    scheduler.run();
  }

  /// Runs one job picked by `random`; false if there is none.
  bool run_one(std::mt19937_64& random) {
    auto& jobs = scheduler.jobs;
    if (jobs.empty())
      return false;
    std::uniform_int_distribution<std::size_t> pick(0, jobs.size() - 1);
    std::swap(jobs.front(), jobs[pick(random)]);
    scheduler.run_once();
    return true;
  }
};

} // namespace troupe::test
