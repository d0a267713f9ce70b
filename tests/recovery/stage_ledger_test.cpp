#include "troupe/recovery/stage_ledger.hpp"

#include <catch2/catch.hpp>

#include <deque>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <vector>

using troupe::recovery::stage_ledger;
using kind = stage_ledger::kind;

namespace {

std::vector<std::pair<kind, std::uint64_t>> drain(stage_ledger& ledger) {
  std::vector<std::pair<kind, std::uint64_t>> result;
  while (auto action = ledger.next())
    result.emplace_back(action->what, action->step);
  return result;
}

using actions = std::vector<std::pair<kind, std::uint64_t>>;

} // namespace

TEST_CASE("a first stage computes, passes on and drops") {
  stage_ledger ledger(true, false);
  ledger.successor(1);
  REQUIRE(ledger.run(1, 1, 1));
  CHECK(drain(ledger) == actions{{kind::compute, 1}});
  REQUIRE(ledger.run(1, 2, 1));
  CHECK(drain(ledger).empty()); // one computation at a time
  ledger.computed(1);
  CHECK(drain(ledger) == actions{{kind::pass_on, 1}, {kind::compute, 2}});
  ledger.computed(2);
  CHECK(drain(ledger) == actions{{kind::pass_on, 2}});
  REQUIRE(ledger.run(1, 3, 3));
  CHECK(drain(ledger) == actions{{kind::drop, 1}, {kind::drop, 2}, {kind::compute, 3}});
}

TEST_CASE("a later stage waits for its input, in whichever order request and input come") {
  stage_ledger ledger(false, true);
  REQUIRE(ledger.run(1, 1, 1));
  CHECK(drain(ledger).empty());
  REQUIRE(ledger.input(1, 1));
  CHECK(drain(ledger) == actions{{kind::compute, 1}});
  REQUIRE(ledger.input(1, 2));
  ledger.computed(1);
  CHECK(drain(ledger) == actions{{kind::report, 1}});
  REQUIRE(ledger.run(1, 2, 2));
  CHECK(drain(ledger) == actions{{kind::drop, 1}, {kind::compute, 2}});
}

TEST_CASE("a successor that comes back is given what was kept, and nothing is computed again") {
  stage_ledger ledger(true, false);
  ledger.successor(1);
  REQUIRE(ledger.run(1, 1, 1));
  drain(ledger);
  ledger.computed(1);
  CHECK(drain(ledger) == actions{{kind::pass_on, 1}});
  ledger.raise_epoch(2);
  ledger.successor(0);
  CHECK(drain(ledger).empty());
  ledger.successor(2);
  CHECK(drain(ledger).empty()); // not before the scheduler has asked again
  REQUIRE(ledger.run(2, 1, 1));
  CHECK(drain(ledger) == actions{{kind::pass_on, 1}});
}

TEST_CASE("a last stage reports again in the new epoch") {
  stage_ledger ledger(true, true);
  REQUIRE(ledger.run(1, 1, 1));
  drain(ledger);
  ledger.computed(1);
  CHECK(drain(ledger) == actions{{kind::report, 1}});
  REQUIRE(ledger.run(2, 1, 1));
  CHECK(drain(ledger) == actions{{kind::report, 1}});
  REQUIRE(ledger.run(2, 1, 1)); // the connection broke and the answer with it
  CHECK(drain(ledger) == actions{{kind::report, 1}});
  CHECK(drain(ledger).empty());
}

TEST_CASE("older epochs change nothing") {
  stage_ledger ledger(false, true);
  ledger.raise_epoch(5);
  CHECK_FALSE(ledger.run(4, 1, 1));
  CHECK_FALSE(ledger.input(4, 1));
  CHECK(ledger.size() == 0);
  CHECK(drain(ledger).empty());
  ledger.raise_epoch(3);
  CHECK(ledger.epoch() == 5);
}

TEST_CASE("an input of a newer epoch than any view is kept and raises the epoch") {
  stage_ledger ledger(false, true);
  REQUIRE(ledger.run(1, 1, 1));
  REQUIRE(ledger.input(2, 1));
  CHECK(ledger.epoch() == 2);
  CHECK_FALSE(ledger.input(2, 1)); // once
}

TEST_CASE("a failure is reported once an epoch and tried again in the next") {
  stage_ledger ledger(true, true);
  REQUIRE(ledger.run(1, 1, 1));
  drain(ledger);
  ledger.compute_failed(1);
  CHECK(drain(ledger) == actions{{kind::report_failure, 1}});
  CHECK(drain(ledger).empty());
  REQUIRE(ledger.run(2, 1, 1));
  CHECK(drain(ledger) == actions{{kind::compute, 1}});
}

TEST_CASE("what was sent is sent again when the scheduler asks again, and not computed again") {
  stage_ledger first(true, false);
  first.successor(1);
  REQUIRE(first.run(1, 1, 1));
  drain(first);
  first.computed(1);
  CHECK(drain(first) == actions{{kind::pass_on, 1}});
  REQUIRE(first.run(1, 2, 1));
  CHECK(drain(first) == actions{{kind::compute, 2}}); // only what is asked for again
  REQUIRE(first.run(1, 1, 1));
  CHECK(drain(first) == actions{{kind::pass_on, 1}});
  REQUIRE(first.run(1, 2, 1)); // under way
  CHECK(drain(first).empty());
  first.computed(2);
  CHECK(drain(first) == actions{{kind::pass_on, 2}});
}

TEST_CASE("a failure is reported again when asked again, and computed again in another attempt") {
  stage_ledger ledger(true, true);
  REQUIRE(ledger.run(1, 1, 1, 0));
  drain(ledger);
  ledger.compute_failed(1);
  CHECK(drain(ledger) == actions{{kind::report_failure, 1}});
  REQUIRE(ledger.run(1, 1, 1, 0)); // the report was lost
  CHECK(drain(ledger) == actions{{kind::report_failure, 1}});
  REQUIRE(ledger.run(1, 1, 1, 1));
  CHECK(ledger.attempt(1) == 1);
  CHECK(drain(ledger) == actions{{kind::compute, 1}});
  REQUIRE(ledger.run(1, 1, 1, 0)); // a late duplicate
  CHECK(ledger.attempt(1) == 1);
  ledger.computed(1);
  CHECK(drain(ledger) == actions{{kind::report, 1}});
  REQUIRE(ledger.run(1, 1, 1, 2)); // another stage failed
  CHECK(drain(ledger) == actions{{kind::report, 1}});
}

TEST_CASE("another attempt waits for its input to come again, in whichever order both come") {
  stage_ledger ledger(false, true);
  REQUIRE(ledger.run(1, 1, 1));
  REQUIRE(ledger.input(1, 1));
  drain(ledger);
  CHECK_FALSE(ledger.input(1, 1));
  ledger.compute_failed(1);
  CHECK(drain(ledger) == actions{{kind::report_failure, 1}});
  SECTION("asked first") {
    REQUIRE(ledger.run(1, 1, 1, 1));
    CHECK(drain(ledger).empty());
    CHECK(ledger.input(1, 1));
  }
  SECTION("input first") {
    CHECK(ledger.input(1, 1));
    CHECK_FALSE(ledger.input(1, 1));
    CHECK(drain(ledger).empty());
    REQUIRE(ledger.run(1, 1, 1, 1));
  }
  CHECK(drain(ledger) == actions{{kind::compute, 1}});
  ledger.compute_failed(1);
  CHECK(drain(ledger) == actions{{kind::report_failure, 1}});
  CHECK(ledger.input(1, 1)); // each failure asks for it anew
}

TEST_CASE("a step whose input cannot be had waits for another and holds up no other") {
  stage_ledger ledger(false, true);
  REQUIRE(ledger.run(1, 1, 1));
  REQUIRE(ledger.run(1, 2, 1));
  REQUIRE(ledger.input(1, 1));
  CHECK(drain(ledger) == actions{{kind::compute, 1}});
  REQUIRE(ledger.input(1, 2));
  ledger.input_lost(1);
  CHECK(drain(ledger) == actions{{kind::compute, 2}}); // and nothing is reported
  ledger.computed(2);
  CHECK(drain(ledger) == actions{{kind::report, 2}});
  SECTION("it comes") {
    CHECK(ledger.input(1, 1));
    CHECK_FALSE(ledger.input(1, 1));
    CHECK(drain(ledger) == actions{{kind::compute, 1}});
    ledger.input_lost(1); // neither
    CHECK(drain(ledger).empty());
    CHECK(ledger.input(1, 1));
    CHECK(drain(ledger) == actions{{kind::compute, 1}});
    ledger.computed(1);
    CHECK(drain(ledger) == actions{{kind::report, 1}});
  }
  SECTION("the step is complete elsewhere") {
    REQUIRE(ledger.run(1, 3, 3));
    CHECK(drain(ledger) == actions{{kind::drop, 1}, {kind::drop, 2}});
    ledger.input_lost(1); // of a step that is not known
    CHECK(ledger.size() == 1);
  }
}

TEST_CASE("a step whose input never comes does not hold up the others") {
  stage_ledger ledger(false, true);
  REQUIRE(ledger.run(1, 1, 1));
  REQUIRE(ledger.run(1, 2, 1));
  REQUIRE(ledger.input(1, 2));
  CHECK(drain(ledger) == actions{{kind::compute, 2}});
}

TEST_CASE("a step that completed elsewhere is dropped only when its computation has ended") {
  stage_ledger ledger(true, false);
  REQUIRE(ledger.run(1, 1, 1));
  CHECK(drain(ledger) == actions{{kind::compute, 1}});
  REQUIRE(ledger.run(1, 2, 2));
  CHECK(drain(ledger).empty());
  ledger.computed(1);
  CHECK(drain(ledger) == actions{{kind::drop, 1}, {kind::compute, 2}});
  CHECK_FALSE(ledger.run(1, 1, 1)); // a late duplicate
}

namespace {

/// A pipeline of ledgers under a seeded schedule of deliveries, deaths and recoveries: what the
/// real actors do, without them. Message queues are per pair and in order, as TCP's are.
class pipeline {
public:
  pipeline(std::size_t num_stages, std::uint64_t seed) : random_(seed) {
    for (std::size_t i = 0; i < num_stages; ++i)
      stages_.push_back({stage_ledger(i == 0, i + 1 == num_stages), 1, {}, {}, {}});
    inboxes_.resize(num_stages);
    for (std::size_t i = 0; i + 1 < num_stages; ++i)
      stages_[i].ledger.successor(1);
  }

  /// Runs until `steps` steps are complete; returns how often each was reported and accepted.
  std::map<std::uint64_t, int> run(std::uint64_t steps, int deaths, int losses, int failures) {
    losses_ = losses;
    failures_ = failures;
    std::map<std::uint64_t, int> accepted;
    while (oldest_ <= steps) {
      REQUIRE(++moves_ < 200000);
      if (losses + failures > 0 && pick(200) == 0)
        for (auto step : in_flight_)
          broadcast(step); // no answer for long
      while (next_ <= steps && in_flight_.size() < stages_.size() + 1) {
        in_flight_.insert(next_);
        broadcast(next_++);
      }
      if (deaths > 0 && pick(40) == 0) {
        --deaths;
        kill(pick(stages_.size()));
      }
      auto i = pick(stages_.size());
      if (pick(2) == 0)
        deliver(i);
      else if (stages_[i].computing && pick(2) == 0)
        finish(i);
      carry_out(i, accepted);
    }
    return accepted;
  }

  std::size_t kept(std::size_t stage) const { return stages_[stage].ledger.size(); }
  int recomputed_by_survivors() const { return recomputed_by_survivors_; }

private:
  struct stage {
    stage_ledger ledger;
    std::uint64_t incarnation;
    std::optional<std::uint64_t> computing;
    std::set<std::uint64_t> outputs;
    std::set<std::uint64_t> computed_in_this_life;
  };
  struct message {
    bool is_input;
    std::uint64_t epoch, step, oldest, incarnation;
    std::uint32_t attempt;
  };

  std::size_t pick(std::size_t n) {
    return std::uniform_int_distribution<std::size_t>(0, n - 1)(random_);
  }

  void broadcast(std::uint64_t step) {
    for (std::size_t i = 0; i < stages_.size(); ++i)
      inboxes_[i].push_back(
        {false, epoch_, step, oldest_, stages_[i].incarnation, attempts_[step]});
  }

  bool is_lost() {
    if (losses_ == 0 || pick(20) != 0)
      return false;
    --losses_;
    return true;
  }

  void kill(std::size_t i) {
    ++epoch_;
    auto incarnation = stages_[i].incarnation + 1;
    stages_[i] = {stage_ledger(i == 0, i + 1 == stages_.size()), incarnation, {}, {}, {}};
    inboxes_[i].clear();
    stages_[i].ledger.raise_epoch(epoch_);
    if (i + 1 < stages_.size())
      stages_[i].ledger.successor(stages_[i + 1].incarnation);
    // Survivors hear of it sooner or later; the predecessor now and the others by the replay.
    if (i > 0) {
      stages_[i - 1].ledger.raise_epoch(epoch_);
      stages_[i - 1].ledger.successor(incarnation);
    }
    for (auto step : in_flight_)
      broadcast(step);
  }

  void deliver(std::size_t i) {
    auto& inbox = inboxes_[i];
    if (inbox.empty())
      return;
    // Requests and inputs come over different connections: either may be first.
    auto first = inbox.begin();
    auto chosen = first;
    if (pick(3) == 0)
      for (auto m = first; m != inbox.end(); ++m)
        if (m->is_input != first->is_input) {
          chosen = m;
          break;
        }
    auto m = *chosen;
    inbox.erase(chosen);
    if (m.incarnation != stages_[i].incarnation || is_lost())
      return;
    if (m.is_input)
      stages_[i].ledger.input(m.epoch, m.step);
    else
      stages_[i].ledger.run(m.epoch, m.step, m.oldest, m.attempt);
  }

  void finish(std::size_t i) {
    auto& s = stages_[i];
    auto step = *s.computing;
    s.computing.reset();
    if (failures_ > 0 && pick(10) == 0) {
      --failures_;
      if (i > 0 && pick(2) == 0)
        s.ledger.input_lost(step);
      else
        s.ledger.compute_failed(step);
      return;
    }
    if (!s.computed_in_this_life.insert(step).second)
      ++recomputed_by_survivors_;
    s.outputs.insert(step);
    s.ledger.computed(step);
  }

  void carry_out(std::size_t i, std::map<std::uint64_t, int>& accepted) {
    auto& s = stages_[i];
    while (auto action = s.ledger.next()) {
      switch (action->what) {
      case kind::compute:
        REQUIRE_FALSE(s.computing);
        s.computing = action->step;
        break;
      case kind::pass_on:
        REQUIRE(s.outputs.count(action->step) == 1);
        inboxes_[i + 1].push_back(
          {true, s.ledger.epoch(), action->step, 0, stages_[i + 1].incarnation, 0});
        break;
      case kind::report:
        REQUIRE(s.outputs.count(action->step) == 1);
        if (!is_lost() && s.ledger.epoch() == epoch_ && in_flight_.erase(action->step) == 1) {
          ++accepted[action->step];
          oldest_ = in_flight_.empty() ? next_ : *in_flight_.begin();
        }
        break;
      case kind::report_failure:
        if (s.ledger.epoch() == epoch_ && in_flight_.count(action->step) == 1
            && s.ledger.attempt(action->step) == attempts_[action->step]) {
          ++attempts_[action->step];
          broadcast(action->step);
        }
        break;
      case kind::drop:
        REQUIRE(in_flight_.count(action->step) == 0);
        s.outputs.erase(action->step);
        break;
      }
    }
  }

  std::mt19937_64 random_;
  std::vector<stage> stages_;
  std::vector<std::deque<message>> inboxes_;
  std::set<std::uint64_t> in_flight_;
  std::uint64_t next_ = 1, oldest_ = 1, epoch_ = 1;
  std::map<std::uint64_t, std::uint32_t> attempts_;
  int losses_ = 0;
  int failures_ = 0;
  int moves_ = 0;
  int recomputed_by_survivors_ = 0;
};

} // namespace

TEST_CASE(
  "any schedule of deaths, losses and failures completes every step once and computes nothing "
  "twice in one life") {
  for (std::uint64_t seed = 0; seed < 1500; ++seed) {
    CAPTURE(seed);
    auto num_stages = 1 + seed % 4;
    pipeline p(num_stages, seed);
    auto accepted = p.run(20, static_cast<int>(seed % 7), static_cast<int>(seed % 11),
                          static_cast<int>(seed % 4));
    REQUIRE(accepted.size() == 20);
    for (const auto& [step, count] : accepted)
      REQUIRE(count == 1);
    REQUIRE(p.recomputed_by_survivors() == 0);
    for (std::size_t i = 0; i < num_stages; ++i)
      REQUIRE(p.kept(i) <= num_stages + 2 + 20);
  }
}
