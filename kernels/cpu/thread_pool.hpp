#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace troupe::kernels::cpu {

/// Threads that share the chunks of one job at a time. The caller works too; with one
/// thread there is no other. Workers spin for some microseconds after a job
/// and then sleep. `run` may be called by one thread at a time.
class thread_pool {
public:
  explicit thread_pool(std::int32_t num_threads);
  ~thread_pool();

  thread_pool(const thread_pool&) = delete;
  thread_pool& operator=(const thread_pool&) = delete;

  /// Threads including the caller.
  std::int32_t size() const { return static_cast<std::int32_t>(workers_.size()) + 1; }

  /// Keeps the caller on core `place` of those that it may use, counted around, and the workers on
  /// those that follow, if they are as many as all of them; otherwise, or where that is forbidden,
  /// the system goes on placing them. Where several processes take turns on the same cores, as
  /// stages and expert groups of a host do, their threads otherwise queue up behind each other on
  /// one core while another idles: Linux does not move a thread to a core that has not been idle
  /// for long (kernel/sched/fair.c, newidle_balance).
  void keep_on_cores(std::int32_t place);

  /// Calls work(chunk, thread) for every chunk from 0 to num_chunks - 1 and returns when all
  /// are done. Threads are numbered from 0, which is the caller. `work` must not throw.
  template <class Work>
  void run(std::int32_t num_chunks, Work&& work) {
    if (num_chunks <= 1 || workers_.empty()) {
      for (std::int32_t chunk = 0; chunk < num_chunks; ++chunk) {
        work(chunk, 0);
      }
      return;
    }
    using target = std::remove_reference_t<Work>;
    share(
      num_chunks,
      [](void* context, std::int32_t chunk, std::int32_t thread) {
        (*static_cast<target*>(context))(chunk, thread);
      },
      const_cast<void*>(static_cast<const void*>(std::addressof(work))));
  }

private:
  using function = void (*)(void* context, std::int32_t chunk, std::int32_t thread);

  void share(std::int32_t num_chunks, function work, void* context);
  void take_chunks(std::int32_t thread);
  void serve(std::int32_t thread);

  // The number of the job in the upper bits, the chunks nobody has taken yet in the lower. Who
  // lowers it owns a chunk, and knows that the job could not have been replaced meanwhile.
  std::atomic<std::uint64_t> ticket_{0};
  std::atomic<function> work_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<std::int32_t> unfinished_{0};
  std::atomic<std::int32_t> sleepers_{0};
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

} // namespace troupe::kernels::cpu
