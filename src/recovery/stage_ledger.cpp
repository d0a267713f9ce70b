#include "troupe/recovery/stage_ledger.hpp"

#include <algorithm>

namespace troupe::recovery {

void stage_ledger::raise_epoch(std::uint64_t epoch) {
  epoch_ = std::max(epoch_, epoch);
}

bool stage_ledger::run(std::uint64_t epoch, std::uint64_t step, std::uint64_t oldest_step,
                       std::uint32_t attempt) {
  if (epoch < epoch_)
    return false;
  epoch_ = epoch;
  oldest_step_ = std::max(oldest_step_, oldest_step);
  if (step < oldest_step_)
    return false;
  entry& e = entries_[step];
  // A failure may have had its cause in what was just recovered: a new epoch tries again.
  if (e.state == progress::failed && (e.asked_epoch < epoch || e.attempt < attempt)) {
    e.state = progress::waiting;
    e.has_input = e.input_is_newer;
  }
  e.asked_epoch = epoch;
  e.attempt = std::max(e.attempt, attempt);
  // Asked again: what was sent may have been lost on its way.
  e.sent_epoch = 0;
  return true;
}

bool stage_ledger::input(std::uint64_t epoch, std::uint64_t step) {
  if (epoch < epoch_ || step < oldest_step_)
    return false;
  epoch_ = epoch;
  entry& e = entries_[step];
  // The previous stage hears of a new attempt too and may be faster than the scheduler's word.
  bool is_wanted = !e.has_input || (e.state == progress::failed && !e.input_is_newer);
  e.input_is_newer = e.state == progress::failed;
  e.has_input = true;
  return is_wanted;
}

void stage_ledger::computed(std::uint64_t step) {
  computing_ = false;
  if (auto i = entries_.find(step); i != entries_.end())
    i->second.state = progress::done;
}

void stage_ledger::compute_failed(std::uint64_t step) {
  computing_ = false;
  if (auto i = entries_.find(step); i != entries_.end()) {
    i->second.state = progress::failed;
    i->second.input_is_newer = false;
    i->second.sent_epoch = 0;
  }
}

void stage_ledger::input_lost(std::uint64_t step) {
  computing_ = false;
  if (auto i = entries_.find(step); i != entries_.end()) {
    i->second.state = progress::waiting;
    i->second.has_input = false;
  }
}

std::uint32_t stage_ledger::attempt(std::uint64_t step) const {
  auto i = entries_.find(step);
  return i == entries_.end() ? 0 : i->second.attempt;
}

void stage_ledger::successor(std::uint64_t incarnation) {
  successor_ = incarnation;
}

std::optional<stage_ledger::action> stage_ledger::next() {
  // A step that is being computed reads what is kept for it, so it is dropped afterwards.
  for (auto i = entries_.begin(); i != entries_.end() && i->first < oldest_step_; ++i) {
    if (i->second.state == progress::computing)
      continue;
    auto step = i->first;
    entries_.erase(i);
    return action{kind::drop, step};
  }
  for (auto& [step, e] : entries_) {
    if (e.asked_epoch != epoch_ || step < oldest_step_)
      continue;
    bool sent = e.sent_epoch == epoch_;
    if (e.state == progress::failed && !sent) {
      e.sent_epoch = epoch_;
      return action{kind::report_failure, step};
    }
    if (e.state != progress::done)
      continue;
    if (is_last_ && !sent) {
      e.sent_epoch = epoch_;
      return action{kind::report, step};
    }
    if (!is_last_ && successor_ != 0 && (!sent || e.sent_to != successor_)) {
      e.sent_epoch = epoch_;
      e.sent_to = successor_;
      return action{kind::pass_on, step};
    }
  }
  if (computing_)
    return std::nullopt;
  for (auto& [step, e] : entries_) {
    if (step < oldest_step_ || e.state != progress::waiting || e.asked_epoch == 0)
      continue;
    // A sequence is in one micro-batch at a time, so steps need not be computed in order: one whose
    // input was lost or never came does not hold up the others.
    if (!is_first_ && !e.has_input)
      continue;
    computing_ = true;
    e.state = progress::computing;
    return action{kind::compute, step};
  }
  return std::nullopt;
}

} // namespace troupe::recovery
