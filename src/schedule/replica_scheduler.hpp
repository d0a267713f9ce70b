#pragma once

#include "troupe/base/error.hpp"
#include "troupe/schedule/types.hpp"

#include <deque>
#include <memory>
#include <span>
#include <vector>

namespace troupe::schedule {

/// Counters for metrics and the status page.
struct counters {
  std::uint32_t num_queued = 0;
  std::uint32_t num_running = 0;
  std::uint32_t num_free_pages = 0; ///< those that rest included
  std::uint32_t num_in_flight = 0;
  std::uint64_t num_preemptions = 0;
  std::uint64_t num_prompt_tokens = 0;
  std::uint64_t num_generated_tokens = 0;
  std::uint64_t num_drafted_tokens = 0;  ///< drafts that were verified
  std::uint64_t num_accepted_tokens = 0; ///< of them, those that were right
};

/// Continuous batching for one replica, as a pure state machine: no clock, no threads, no
/// I/O. Owns the requests, their token logs and their block tables. A token becomes real when
/// `complete` appends it to its log, here and nowhere else. Not thread-safe: one owner calls it.
///
/// - Requests are admitted in the order of their arrival, as pages become free.
/// - A sequence is in one micro-batch at a time. Sequences that can go are spread evenly over
///   the free slots of max_in_flight, decodes over max_decoding of them; within a micro-batch
///   single rows (decodes) go first, then prefill chunks. Who has waited longest for a step goes
///   first.
/// - With drafts, a decode has the rows of the drafts behind its own and may bring several tokens:
///   those that would have been drawn without. They are left out where the micro-batch has no room
///   for those of every sequence.
/// - Where no page is free, the sequence admitted last gives up its pages and returns to the
///   head of the queue. Later its log is computed again, without events, and goes on.
/// - Behind a fence, pages that a step in flight writes to rest until it ends when they are given
///   back, since who was fenced may still write to them.
class replica_scheduler {
public:
  explicit replica_scheduler(limits l);
  ~replica_scheduler();

  /// Queues a request. Refuses with overloaded when the queue is full, with
  /// invalid_request when the request can never fit (prompt, context, pages) or its id is in use.
  /// One that would outgrow the context or the pages ends with `length` there. With max_tokens 0
  /// and nothing to score, or with max_tokens generated already, its `length` event is there at
  /// once.
  expected<void> submit(request r);

  /// Ends a request. Its pages are free at once, or, while a micro-batch that writes to them is
  /// in flight, as soon as that one completes. Unknown ids are ignored.
  /// Emits one `cancelled` event at once; no event of the request comes after it.
  void cancel(request_id id);

  /// The next micro-batch to send, or nothing (all in flight, or nothing to
  /// do). Call until it returns null. The pointer stays valid until the step completes.
  const micro_batch* next();

  /// Takes the results of a step. Steps that are not in flight are ignored (a duplicate after a
  /// replay). `outputs` matches the outputs of the micro-batch one to one; otherwise returns
  /// internal and nothing has changed. Outputs behind a draft that was wrong are left aside, and
  /// `drafts` go into the next steps of their sequences.
  expected<void> complete(std::uint64_t step, std::span<const output_token> outputs,
                          const draft_list& drafts = {});

  /// The step could not be computed: ends its requests with `failed`. Steps that are not in
  /// flight are ignored.
  void fail_step(std::uint64_t step);

  /// Ends every request past its deadline with `failed`.
  void expire(time_point now);

  /// A process that computed for this replica is no more, and what it gave its device to do may
  /// write to pages of the steps in flight until `end`. Raises the end of a fence that stands.
  /// Called before what gives such pages back: results of a new epoch, forget_kv, fail_all.
  void fence(time_point end);
  /// The same, where it is not known which steps are in flight: no page is handed out before.
  void fence_all(time_point end);
  /// Time passes: ends the fence that is over.
  void end_fence(time_point now);

  /// The KV memory is gone: every running sequence goes back to the head of the queue and is
  /// computed again from its token log, without events. Those with the fewest positions to
  /// compute go first, among equals in the order of their admission, so that most requests go on
  /// soonest. Steps in flight are forgotten and their results ignored if they come.
  void forget_kv();

  /// Ends every request with `failed`: the replica is given up. Steps in flight are forgotten,
  /// their results ignored if they come, and all pages are free: the epoch must be
  /// raised before the next step is sent, so that no stage still computes an earlier one.
  void fail_all();

  /// Micro-batches sent and not completed, oldest first: what a replay sends again.
  std::vector<const micro_batch*> in_flight() const;

  /// Every step below this one is complete.
  std::uint64_t oldest_step() const;

  /// Moves the events since the last call into `out` (cleared first), in order.
  void take_events(std::vector<token_event>& out);

  counters count() const;

private:
  struct state;
  std::unique_ptr<state> state_;
};

} // namespace troupe::schedule
