#include <catch2/catch.hpp>

#include <chrono>
#include <numeric>
#include <thread>
#include <vector>

#include <sched.h>

#include "troupe/kernels/cpu/scratch.hpp"
#include "troupe/kernels/cpu/thread_pool.hpp"

using troupe::kernels::cpu::scratch;
using troupe::kernels::cpu::thread_pool;

TEST_CASE("every chunk of every job is done exactly once, by a known thread") {
  for (const int threads : {1, 2, 4}) {
    thread_pool pool(threads);
    CHECK(pool.size() == threads);
    int wrong = 0;
    for (int job = 0; job < 2000; ++job) {
      const int chunks = job % 23;
      std::vector<int> done(chunks + 1, 0); // written without locks: one owner a chunk
      pool.run(chunks, [&](std::int32_t chunk, std::int32_t thread) {
        done[chunk] += thread >= 0 && thread < threads ? 1 : 100;
      });
      wrong += std::accumulate(done.begin(), done.end(), 0) == chunks ? 0 : 1;
      wrong += std::count(done.begin(), done.end() - 1, 1) == chunks ? 0 : 1;
    }
    INFO(threads << " threads");
    CHECK(wrong == 0);
  }
}

TEST_CASE("workers that fell asleep wake up for the next job") {
  thread_pool pool(2);
  for (int job = 0; job < 20; ++job) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1)); // longer than a worker spins
    std::atomic<int> sum = 0;
    pool.run(8, [&](std::int32_t chunk, std::int32_t) { sum += chunk; });
    CHECK(sum == 28);
  }
}

TEST_CASE("two threads really share the work") {
  thread_pool pool(2);
  std::atomic<int> present = 0;
  std::atomic<bool> met = false;
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  pool.run(2, [&](std::int32_t, std::int32_t) {
    ++present;
    while (present < 2 && std::chrono::steady_clock::now() < end) {
      std::this_thread::yield();
    }
    met = met || present == 2;
  });
  CHECK(met);
}

TEST_CASE("a pool as wide as the machine keeps each worker on a core, a narrower one does not") {
  cpu_set_t usable;
  REQUIRE(::sched_getaffinity(0, sizeof(usable), &usable) == 0);
  const int num_cores = CPU_COUNT(&usable);
  const auto cores_of_threads = [](int num_threads) {
    thread_pool pool(num_threads);
    std::vector<cpu_set_t> cores(num_threads);
    std::atomic<int> present = 0;
    pool.run(num_threads, [&](std::int32_t, std::int32_t thread) {
      ::sched_getaffinity(0, sizeof(cpu_set_t), &cores[thread]);
      ++present;
      while (present < num_threads) { // a chunk for every thread
        std::this_thread::yield();
      }
    });
    return cores;
  };
  const auto wide = cores_of_threads(num_cores);
  CHECK(CPU_EQUAL(&wide[0], &usable)); // the caller's are its own business
  cpu_set_t used;
  CPU_ZERO(&used);
  for (int thread = 1; thread < num_cores; ++thread) {
    CHECK(CPU_COUNT(&wide[thread]) == 1);
    CPU_OR(&used, &used, &wide[thread]);
  }
  CHECK(CPU_COUNT(&used) == num_cores - 1);
  for (const auto& cores : cores_of_threads(num_cores + 1)) {
    CHECK(CPU_EQUAL(&cores, &usable));
  }
}

TEST_CASE("scratch memory is kept, aligned and grows") {
  scratch<float> memory;
  float* first = memory.take(100);
  CHECK(reinterpret_cast<std::uintptr_t>(first) % 64 == 0);
  CHECK(memory.take(7) == first);
  float* bigger = memory.take(100000);
  bigger[99999] = 1.0F;
  CHECK(memory.take(100000) == bigger);
}
