#include "troupe/kernels/cpu/thread_pool.hpp"

#include "troupe/kernels/cpu/spin.hpp"

#include <cassert>
#include <chrono>

#include <pthread.h>
#include <sched.h>

namespace troupe::kernels::cpu {

namespace {

constexpr int kChunkBits = 20;
constexpr std::uint64_t kChunkMask = (std::uint64_t{1} << kChunkBits) - 1;
constexpr auto kSpinTime = std::chrono::microseconds(50);

} // namespace

thread_pool::thread_pool(std::int32_t num_threads) {
  for (std::int32_t thread = 1; thread < num_threads; ++thread) {
    workers_.emplace_back([this, thread] { serve(thread); });
  }
}

void thread_pool::keep_on_cores(std::int32_t place) {
  cpu_set_t allowed;
  if (::sched_getaffinity(0, sizeof(allowed), &allowed) != 0) {
    return;
  }
  std::vector<int> cores;
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (CPU_ISSET(core, &allowed)) {
      cores.push_back(core);
    }
  }
  if (cores.size() != workers_.size() + 1) {
    return;
  }
  const auto keep = [&](pthread_t thread, std::size_t which) {
    cpu_set_t own;
    CPU_ZERO(&own);
    CPU_SET(cores[(static_cast<std::size_t>(place) + which) % cores.size()], &own);
    ::pthread_setaffinity_np(thread, sizeof(own), &own);
  };
  keep(::pthread_self(), 0);
  for (std::size_t i = 0; i < workers_.size(); ++i) {
    keep(workers_[i].native_handle(), i + 1);
  }
}

thread_pool::~thread_pool() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) {
    worker.join();
  }
}

void thread_pool::share(std::int32_t num_chunks, function work, void* context) {
  assert(static_cast<std::uint64_t>(num_chunks) <= kChunkMask);
  unfinished_.store(num_chunks, std::memory_order_relaxed);
  work_.store(work, std::memory_order_relaxed);
  context_.store(context, std::memory_order_relaxed);
  const std::uint64_t job = (ticket_.load(std::memory_order_relaxed) >> kChunkBits) + 1;
  // Sequentially consistent, like the worker's counting itself as asleep and looking again:
  // one of the two sees the other.
  ticket_.store(job << kChunkBits | static_cast<std::uint64_t>(num_chunks));
  if (sleepers_.load() > 0) {
    const std::lock_guard lock(mutex_);
    wake_.notify_all();
  }
  take_chunks(0);
  const auto finished = [this] { return unfinished_.load(std::memory_order_acquire) == 0; };
  while (!spin(finished, kSpinTime)) {
    std::this_thread::yield();
  }
}

void thread_pool::take_chunks(std::int32_t thread) {
  std::uint64_t ticket = ticket_.load(std::memory_order_acquire);
  while ((ticket & kChunkMask) != 0) {
    const function work = work_.load(std::memory_order_relaxed);
    void* context = context_.load(std::memory_order_relaxed);
    if (ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel,
                                      std::memory_order_acquire)) {
      work(context, static_cast<std::int32_t>((ticket & kChunkMask) - 1), thread);
      unfinished_.fetch_sub(1, std::memory_order_acq_rel);
      ticket = ticket_.load(std::memory_order_acquire);
    }
  }
}

void thread_pool::serve(std::int32_t thread) {
  const auto has_work = [this] { return (ticket_.load() & kChunkMask) != 0 || stopping_.load(); };
  while (!stopping_.load(std::memory_order_relaxed)) {
    take_chunks(thread);
    if (spin(has_work, kSpinTime)) {
      continue;
    }
    std::unique_lock lock(mutex_);
    ++sleepers_;
    wake_.wait(lock, has_work);
    --sleepers_;
  }
}

} // namespace troupe::kernels::cpu
