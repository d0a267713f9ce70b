#pragma once

#include <condition_variable>
#include <cstddef>
#include <functional>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace troupe::model {

/// Results of tasks 0, 1, ... made by several threads and taken in that order by one, so that what
/// is done with them does not depend on how many threads there are. Threads run ahead by at most
/// one result each beyond the one that is waited for, which bounds the memory.
/// The destructor waits for the tasks that have begun.
template <class Result>
class ordered_tasks {
public:
  ordered_tasks(std::size_t num_tasks, int num_threads, std::function<Result(std::size_t)> make)
    : num_tasks_(num_tasks),
      window_(static_cast<std::size_t>(num_threads) + 1),
      make_(std::move(make)) {
    for (int i = 0; i < num_threads; ++i)
      threads_.emplace_back([this] { run(); });
  }

  ~ordered_tasks() {
    {
      const std::lock_guard lock(mutex_);
      stops_ = true;
    }
    changed_.notify_all();
  }

  ordered_tasks(const ordered_tasks&) = delete;
  ordered_tasks& operator=(const ordered_tasks&) = delete;

  /// The result of the next task; at most num_tasks times.
  Result take() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return made_.count(num_taken_) != 0; });
    auto result = std::move(made_.extract(num_taken_).mapped());
    ++num_taken_;
    lock.unlock();
    changed_.notify_all();
    return result;
  }

private:
  void run() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] {
        return stops_ || num_begun_ == num_tasks_ || num_begun_ < num_taken_ + window_;
      });
      if (stops_ || num_begun_ == num_tasks_)
        return;
      const auto task = num_begun_++;
      lock.unlock();
      auto result = make_(task);
      lock.lock();
      made_.emplace(task, std::move(result));
      changed_.notify_all();
    }
  }

  const std::size_t num_tasks_;
  const std::size_t window_;
  const std::function<Result(std::size_t)> make_;
  std::mutex mutex_; ///< guards all below but threads_
  std::condition_variable changed_;
  std::map<std::size_t, Result> made_;
  std::size_t num_begun_ = 0;
  std::size_t num_taken_ = 0;
  bool stops_ = false;
  std::vector<std::jthread> threads_; ///< last: joined before the rest is gone
};

} // namespace troupe::model
