#pragma once

#include <atomic>
#include <cstdint>

namespace troupe {

/// A word of memory that two processes share: one hears by it, within a fraction of a millisecond,
/// that a thread of the other is dead.
///
/// The thread registers the word as a robust futex (Documentation/locking/robust-futexes and
/// robust-futex-ABI of the Linux kernel). When it ends, however it does, the kernel first marks the
/// word and wakes who waits there; memory and files of the process go after that, which takes long
/// where there is much of them (80 ms a GiB of small pages), or where a driver has to clear a
/// device. Only then is the process a zombie, which is what a pidfd tells of. Since a signal that
/// kills, kills all threads at once, the death of one is the death of the process.
///
///     unborn ──hold──> held ──the thread ends──> lost
///        │               │
///        └───────────────┴────let_go, close────> over
class life_line {
public:
  /// The thread's side: from its construction to its destruction, both on that thread. No other
  /// robust futex of that thread works meanwhile.
  class holder {
  public:
    explicit holder(life_line& line);
    ~holder();
    holder(const holder&) = delete;
    holder& operator=(const holder&) = delete;

  private:
    /// What the kernel walks when the thread ends: struct robust_list of its ABI.
    struct entry {
      entry* next;
    };
    struct list {
      entry first;
      long word_offset; ///< from an entry to its word
      entry* pending;
    };
    life_line& line_;
    entry entry_;
    list list_;
  };

  /// The process ends in good order: its end from here on is not told of. Any thread of it.
  void let_go() { end(); }

  /// The other side. Returns when the thread is lost (true), or never will be (false).
  bool wait();
  /// Ends the waiting; the process that held the line is gone.
  void close() { end(); }
  bool is_lost() const;
  /// For the next process. Nobody may hold it or wait at it.
  void reset() { word_.store(0, std::memory_order_release); }

private:
  void end();

  std::atomic<std::uint32_t> word_{0};
};

} // namespace troupe
