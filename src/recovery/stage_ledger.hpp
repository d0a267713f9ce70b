#pragma once

#include <cstdint>
#include <map>
#include <optional>

namespace troupe::recovery {

/// What a stage owes: which micro-batches it has been asked for, what has arrived and what has been
/// passed on. Decides what to do next, in any order of events, before, during and after
/// a recovery. Pure; the stage actor carries out its answers.
///
/// A step lives here from the first time that it is heard of until the scheduler says that every
/// step up to it is complete. Its output is kept as long, so that a successor that
/// comes back can be given it again and nothing before it is computed twice.
///
///     run ────────┐
///                 ├─> ready ──compute──> computing ──computed──> done ──pass_on / report──> ...
///     input ──────┘                          └──compute_failed──> failed ──report_failure──> ...
///
/// Stage 0 needs no input. `pass_on` (all stages but the last), `report` (the last) and
/// `report_failure` are due again whenever the epoch rises, the successor is replaced or the
/// scheduler asks again (what was sent may have been lost), until the step is dropped. Nothing is
/// computed twice for that. A step that failed is computed again in a newer epoch or attempt, with
/// its input asked for again, as that may be what was wrong.
class stage_ledger {
public:
  enum class kind {
    compute,        ///< start computing the step; one at a time
    pass_on,        ///< send its output to the next stage
    report,         ///< send its result to the scheduler
    report_failure, ///< tell the scheduler that it could not be computed
    drop,           ///< release everything kept for it
  };

  struct action {
    kind what;
    std::uint64_t step;
  };

  stage_ledger(bool is_first, bool is_last) : is_first_(is_first), is_last_(is_last) {}

  /// Hears of an epoch. Older ones change nothing.
  void raise_epoch(std::uint64_t epoch);

  /// The scheduler asks for a step (again). `attempt` counts up when it wants a failed step
  /// computed once more. False: the message is of an older epoch, or the step is complete.
  bool run(std::uint64_t epoch, std::uint64_t step, std::uint64_t oldest_step,
           std::uint32_t attempt = 0);

  /// The previous stage's output for a step arrived. False: drop it (older epoch, complete or
  /// already here and not found wanting).
  bool input(std::uint64_t epoch, std::uint64_t step);

  void computed(std::uint64_t step);
  void compute_failed(std::uint64_t step);

  /// What came as the input of the step that was to be computed cannot be had: the step waits for
  /// another.
  void input_lost(std::uint64_t step);

  /// The next stage runs as this incarnation and can be sent to; 0: it is gone.
  void successor(std::uint64_t incarnation);

  /// The next thing to do, marked as done by being returned. Call until empty.
  std::optional<action> next();

  std::uint64_t epoch() const { return epoch_; }

  /// The newest attempt at a step that was asked for.
  std::uint32_t attempt(std::uint64_t step) const;
  std::size_t size() const { return entries_.size(); }

private:
  enum class progress { waiting, computing, done, failed };

  struct entry {
    std::uint64_t asked_epoch = 0; ///< 0: not asked for yet
    std::uint32_t attempt = 0;
    bool has_input = false;
    bool input_is_newer = false; ///< than the failure of the step
    progress state = progress::waiting;
    std::uint64_t sent_epoch = 0;
    std::uint64_t sent_to = 0;
  };

  bool is_first_;
  bool is_last_;
  std::uint64_t epoch_ = 0;
  std::uint64_t oldest_step_ = 0;
  std::uint64_t successor_ = 0;
  bool computing_ = false;
  std::map<std::uint64_t, entry> entries_; // a handful: stages + 1
};

} // namespace troupe::recovery
