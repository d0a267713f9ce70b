#pragma once

#include "troupe/recovery/journal.hpp"
#include "troupe/schedule/request_log.hpp"

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

namespace troupe::recovery {

/// A request_log whose changes are in a file before anybody acts on them, so that the next life of
/// the frontend finds its calls and their tokens. Changes gather until `flush`, which is
/// one write for all of them.
///
/// A file that cannot be written fails no call: the log goes on in memory, and once the file can
/// be written again it is written anew as a whole. What a death in between loses of a call that is
/// in the file is drawn again, and is the same. For one thread.
class request_journal {
public:
  struct options {
    std::filesystem::path file; ///< empty: in memory only
    bool fresh = false;         ///< forget what an earlier cluster has left
    schedule::request_log::limits limits;
    std::size_t compact_bytes = std::size_t{8} << 20; ///< smaller files are left alone
    std::int64_t retry_ms = 1000;                     ///< between attempts to write a file anew
  };

  /// Reads the file. Times are milliseconds of Unix time here and below.
  request_journal(options o, std::int64_t now_ms);

  const schedule::request_log& log() const { return log_; }

  // The changes of the log, see there.
  void accept(schedule::accepted_call call) { log_.accept(std::move(call), pending_); }
  bool append(const schedule::token_event& event, std::int64_t now_ms) {
    return log_.append(event, now_ms, pending_);
  }
  void end_choice(schedule::request_id request, std::int64_t now_ms) {
    log_.end_choice(request, now_ms, pending_);
  }
  void fail(std::uint64_t call, const error& why, std::int64_t now_ms) {
    log_.fail(call, why, now_ms, pending_);
  }
  void forget(std::uint64_t call) { log_.forget(call, pending_); }

  /// Writes what has gathered.
  void flush(std::int64_t now_ms);

  /// To be called now and then: forgets old answers, tries again to write, and rewrites a file that
  /// is mostly about what is over.
  void tick(std::int64_t now_ms);

  /// Writes that have failed.
  std::uint64_t num_errors() const { return num_errors_; }

  /// False while the file lacks something.
  bool is_durable() const { return file_ && !behind_; }

private:
  void write_anew(std::int64_t now_ms);
  void take_failure(const error& why, std::int64_t now_ms);

  options options_;
  schedule::request_log log_;
  std::optional<journal> file_;
  std::string pending_;
  bool behind_ = false;       ///< the file lacks changes: nothing can be appended to it
  std::int64_t retry_at_ = 0; ///< no attempt to write it anew before
  std::uint64_t num_errors_ = 0;
};

} // namespace troupe::recovery
