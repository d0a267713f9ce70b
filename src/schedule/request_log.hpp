#pragma once

#include "troupe/base/error.hpp"
#include "troupe/schedule/types.hpp"

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace troupe::schedule {

class record_reader;

/// A client's call as it was accepted: what it takes to make the same requests of it again. Times
/// are milliseconds of Unix time, since they have to outlive the process.
struct accepted_call {
  std::uint64_t id = 0; ///< never used again, not even by a later frontend of the cluster
  std::string key;      ///< the client's name for it (Idempotency-Key); empty: none
  bool chat = false;
  std::string body;
  std::uint64_t seed = 0; ///< that its body was read with
  std::int64_t created_ms = 0;
  std::int64_t deadline_ms = 0;
  request_id first_request = 0;
  std::uint32_t num_choices = 1;
  bool keeps_scores = false; ///< its answer shows log-probabilities
};

enum class call_state : std::uint8_t { in_progress, completed, failed };

/// What one of a call's requests has brought.
struct logged_choice {
  std::vector<std::int32_t> tokens;
  std::vector<output_token> scores; ///< one a token, where the call keeps them
  /// By position, in the order in which they came; some twice where a request began again.
  std::vector<std::pair<std::uint32_t, output_token>> prompt_scores;
  finish_reason finish = finish_reason::none;
  bool finished_bare = false; ///< the end came without a token
};

struct logged_call {
  accepted_call what;
  std::vector<logged_choice> choices;
  call_state state = call_state::in_progress;
  std::int64_t ended_ms = 0;
  error why;             ///< of a failed one
  std::size_t bytes = 0; ///< of its records
};

/// Every call that is being answered, and for a while the answers that are complete: the
/// frontend's memory of what it owes to whom. A pure state machine: each change appends its
/// record to a text, and a log that applies the same records is in the same state, so the
/// records survive the process (in a recovery::journal) and the calls with them. A record is a
/// few changes in a row. Not thread-safe.
///
/// A call is completed when all of its choices have ended. A key names the call that
/// was accepted with it last; the key of a failed call is free again, so that trying again is of
/// use.
class request_log {
public:
  struct limits {
    std::int64_t retain_ms = 300'000;
    std::size_t max_retained = 10'000; ///< answers; the oldest is forgotten first
    std::size_t max_retained_bytes = std::size_t{32} << 20;
  };

  explicit request_log(limits l);

  void accept(accepted_call call, std::string& record);

  /// Takes an event of one of the requests. False, and nothing changes, if it is of no call in
  /// progress, or not the next of its choice.
  bool append(const token_event& event, std::int64_t now_ms, std::string& record);

  /// A choice is complete though its request did not end by itself (a stop string was found).
  void end_choice(request_id request, std::int64_t now_ms, std::string& record);

  /// A call is given up. What it has brought stays readable as long as a complete answer.
  void fail(std::uint64_t call, const error& why, std::int64_t now_ms, std::string& record);

  /// Nobody will ask for this call.
  void forget(std::uint64_t call, std::string& record);

  /// Forgets answers that have been kept for long enough. Leaves no record: who rebuilds a log
  /// calls this too.
  void expire(std::int64_t now_ms);

  /// Does what the record says. False if it is no record of a request_log; what comes before the
  /// fault has been done then.
  bool apply(std::string_view record);

  const logged_call* find(std::uint64_t call) const;
  const logged_call* find_key(std::string_view key) const;

  /// All calls, in the order in which they were accepted.
  const std::map<std::uint64_t, logged_call>& calls() const { return calls_; }

  /// The size of the records that the present state needs, about.
  std::size_t bytes() const { return bytes_; }

  /// The fewest records that lead to the present state, at most about a MiB each.
  void write_snapshot(std::vector<std::string>& records) const;

private:
  struct place {
    logged_call* call = nullptr;
    std::uint32_t choice = 0;
  };

  void do_accept(accepted_call&& call, std::size_t bytes);
  void do_append(place at, const token_event& event, std::int64_t now_ms, std::size_t bytes);
  void do_end_choice(place at, std::int64_t now_ms);
  void do_fail(logged_call& call, const error& why, std::int64_t now_ms);
  void do_forget(std::uint64_t id);
  void free_key(logged_call& call);
  void settle(logged_call& call, call_state state, std::int64_t now_ms);
  void enforce_limits();
  void drop_oldest();
  place find_request(request_id request);
  bool apply_change(record_reader& in);

  limits limits_;
  std::map<std::uint64_t, logged_call> calls_;
  std::unordered_map<request_id, place> requests_; ///< of calls in progress
  std::map<std::string, std::uint64_t, std::less<>> keys_;
  std::set<std::pair<std::int64_t, std::uint64_t>> ended_; ///< (when, which)
  std::size_t bytes_ = 0;
  std::size_t ended_bytes_ = 0;
};

} // namespace troupe::schedule
