#pragma once

#include "troupe/base/error.hpp"
#include "troupe/base/life_line.hpp"

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace troupe::memory {

enum class activity_state : std::uint32_t {
  none,      ///< no such activity
  idle,      ///< nothing to do
  computing, ///< has to tick
  waiting,   ///< for a peer, which has a pulse of its own
};

/// What a parent reads off a child's page.
struct pulse_sample {
  struct activity {
    std::string name; ///< "replica-0/stage-1"
    activity_state state = activity_state::none;
    std::uint64_t progress = 0;
  };
  std::uint64_t beat = 0;    ///< counts up while the process is scheduled; 0: not begun
  int beat_thread = 0;       ///< the kernel's id of the thread that beats
  std::uint64_t control = 0; ///< counts up while its actors answer; 0: nobody asks them
  std::vector<activity> activities;
};

/// A page of memory that a child process writes its signs of life to and its parent reads. The
/// parent creates it and lets the child inherit the descriptor (`--pulse-fd`).
class pulse_page {
public:
  /// Fails with resource_exhausted.
  static expected<pulse_page> create();
  /// Maps an inherited descriptor and takes it over. Fails with io_failed, also where it is not a
  /// pulse page of this version.
  static expected<pulse_page> attach(int fd);

  pulse_page(pulse_page&& other) noexcept;
  pulse_page& operator=(pulse_page&& other) noexcept;
  ~pulse_page();

  int fd() const;

  /// Held by the thread that beats; keeps the page mapped.
  std::shared_ptr<life_line> life() const;

  /// The parent's side. Allocation-free once `into` has its size. Believes nothing that a process
  /// gone mad may have written.
  void sample(pulse_sample& into) const;
  /// What the child said that it ends of; empty: nothing.
  std::string last_words() const;
  /// Wipes the page for the next process that inherits it; the one before must be gone.
  void reset();

private:
  friend class activity;
  friend class pulse;
  struct mapping;
  explicit pulse_page(std::shared_ptr<mapping> mapped);
  std::shared_ptr<mapping> mapped_;
};

/// One thing that computes. Its state is written by the thread that does; cheap: relaxed stores to
/// a cache line of its own. Copies are the same activity, and keep the page mapped.
class activity {
public:
  activity() = default; ///< of a process without a page: does nothing

  void idle() { set(activity_state::idle); }
  /// Begins to compute, which counts as getting on.
  void computing();
  void waiting() { set(activity_state::waiting); }
  /// Gets on. Any thread of the computation.
  void tick() { counter()->fetch_add(1, std::memory_order_relaxed); }
  /// The counter itself, for kernels to count chunks in; never null. Valid as long as a copy of
  /// this activity is.
  std::atomic<std::uint64_t>* counter() const;
  /// What the process is about to end of, for its parent to report: `pulse::last_words` with the
  /// name of this activity in front.
  void last_words(std::string_view words) const;

private:
  friend class pulse;
  friend class pulse_page;
  struct line;
  activity(std::shared_ptr<pulse_page::mapping> mapped, line& line);
  void set(activity_state s);
  std::shared_ptr<pulse_page::mapping> mapped_;
  line* line_ = nullptr;
};

/// The child's side: beats on a thread of its own from construction to destruction, so it is the
/// last thing that a process gives up. One a process.
class pulse {
public:
  static constexpr std::size_t max_activities = 32;
  static constexpr std::size_t max_name_bytes = 47;  ///< longer names are cut
  static constexpr std::size_t max_word_bytes = 503; ///< longer last words are cut

  /// `fd` < 0: no page; everything here then does nothing. `interval`: between two beats. Each beat
  /// calls `knock` (once it is set), which makes an actor call `answered` if actors still run.
  /// Fails with io_failed where the descriptor is not a pulse page, or with resource_exhausted.
  static expected<std::unique_ptr<pulse>> start(int fd, std::chrono::milliseconds interval);
  ~pulse();

  /// From now on the parent expects answers. `knock` runs on the beating thread and must not block;
  /// when this returns, the one before does not run any more. An empty one ends the asking.
  void on_beat(std::function<void()> knock);
  /// Any thread.
  void answered();

  /// The process is about to end in good order: its parent will hear of it when it is gone, and not
  /// by its life line. Any thread.
  void leave();

  /// What the process is about to end of, for its parent to report. Of several, the first counts:
  /// the others may be its consequences. Any thread; takes effect at once.
  void last_words(std::string_view words);

  /// Any thread. Fails with resource_exhausted after max_activities.
  expected<activity> add(std::string_view name);

private:
  struct state;
  explicit pulse(std::unique_ptr<state> s);
  std::unique_ptr<state> state_;
};

} // namespace troupe::memory
