#pragma once

#include "drill_cluster.hpp"

#include "troupe/drill/oracle.hpp"
#include "troupe/drill/outcome.hpp"
#include "troupe/drill/timetable.hpp"

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace troupe::tools::drills {

/// The load of a drill: conversations with known answers, a thread each. Every request has an
/// idempotency key; when its connection breaks it is made again with the same key, and what comes
/// is put together by the tokens' indices.
class clients {
public:
  clients(std::string endpoint, const std::vector<drill::conversation>& known,
          drill::load_settings load, std::uint64_t seed);
  ~clients();
  clients(const clients&) = delete;
  clients& operator=(const clients&) = delete;

  /// Lets every conversation come to its end and joins.
  void finish();

  /// Pauses between tokens since the last call, all of them.
  std::vector<drill::gap> take_gaps();
  /// What went wrong since the last call, a line each.
  std::vector<std::string> take_problems();

  /// True when every stream that waits for a token has got one since then.
  bool all_went_on_since(std::int64_t ns) const;
  /// Conversations that have ended, for a warm start.
  std::uint64_t num_conversations() const { return conversations_; }
  drill::tally counts() const;

private:
  struct stream {
    std::uint32_t number = 0;
    std::atomic<std::int64_t> moved_ns{0}; ///< the last token, or the request; 0: idle
    std::mutex mutex;                      ///< guards gaps
    std::vector<drill::gap> gaps;
    std::thread thread;
  };
  enum class end : std::uint8_t { done, broke, refused, failed };

  /// An answer as it is put together over attempts.
  struct answer {
    std::vector<std::int32_t> tokens;
    std::int64_t last_ns = 0;
    std::string problem;
    bool repeated_otherwise = false; ///< a token came again as another one
  };

  void add_stream();
  void run_closed(stream& s);
  void run_open(stream& s);
  void arrive(std::uint64_t seed);
  void converse(stream& s, std::size_t number);
  end attempt(stream& s, const drill::conversation& talk, const std::string& key, answer& got);
  bool take_event(stream& s, const std::string& data, std::size_t& index, answer& got, bool& done);
  void judge(const drill::conversation& talk, const answer& got);
  void report(std::string problem);

  std::string endpoint_;
  const std::vector<drill::conversation>& known_;
  drill::load_settings load_;
  std::string key_prefix_;
  std::atomic<bool> stopping_{false};
  std::atomic<std::uint64_t> conversations_{0}, tokens_{0}, lost_{0}, duplicated_{0}, wrong_{0},
    errors_{0}, reconnects_{0}, refused_{0};

  mutable std::mutex mutex_; // guards what follows
  std::condition_variable work_;
  std::deque<std::size_t> waiting_; ///< open loop: conversations that have arrived
  std::size_t num_idle_ = 0;
  std::vector<std::string> problems_;
  std::vector<std::unique_ptr<stream>> streams_;
  std::thread generator_;
};

} // namespace troupe::tools::drills
