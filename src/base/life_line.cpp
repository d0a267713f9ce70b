#include "troupe/base/life_line.hpp"

#include <climits>

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace troupe {

namespace {

constexpr std::uint32_t unborn = 0;

/// No thread has this id.
constexpr std::uint32_t over = FUTEX_TID_MASK;

void wait_while(std::atomic<std::uint32_t>& word, std::uint32_t value) {
  ::syscall(SYS_futex, &word, FUTEX_WAIT, value, nullptr, nullptr, 0);
}

void wake_all(std::atomic<std::uint32_t>& word) {
  ::syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

} // namespace

life_line::holder::holder(life_line& line) : line_(line), entry_{}, list_{} {
  static_assert(sizeof(list) == sizeof(robust_list_head) && sizeof(entry) == sizeof(robust_list));
  static_assert(std::atomic<std::uint32_t>::is_always_lock_free);
  entry_.next = &list_.first;
  list_.first.next = &entry_;
  list_.word_offset = static_cast<long>(reinterpret_cast<std::intptr_t>(&line_.word_)
                                        - reinterpret_cast<std::intptr_t>(&entry_));
  auto none = unborn;
  if (::syscall(SYS_set_robust_list, &list_, sizeof(list_)) == 0
      && line_.word_.compare_exchange_strong(none, static_cast<std::uint32_t>(::gettid())))
    wake_all(line_.word_);
}

life_line::holder::~holder() {
  line_.end();
  ::syscall(SYS_set_robust_list, nullptr, sizeof(list_));
}

bool life_line::is_lost() const {
  return (word_.load() & FUTEX_OWNER_DIED) != 0;
}

bool life_line::wait() {
  for (auto seen = word_.load();; seen = word_.load()) {
    if ((seen & FUTEX_OWNER_DIED) != 0)
      return true;
    if ((seen & FUTEX_TID_MASK) == over)
      return false;
    // The kernel wakes somebody only where the word says that somebody waits.
    const auto expected = seen == unborn ? unborn : seen | FUTEX_WAITERS;
    if (seen == expected || word_.compare_exchange_strong(seen, expected))
      wait_while(word_, expected);
  }
}

void life_line::end() {
  // What is lost stays so.
  for (auto seen = word_.load(); (seen & FUTEX_OWNER_DIED) == 0;)
    if (word_.compare_exchange_weak(seen, over)) {
      wake_all(word_);
      return;
    }
}

} // namespace troupe
