#include <catch2/catch.hpp>

#include <chrono>
#include <numeric>
#include <thread>

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

TEST_CASE("scratch memory is kept, aligned and grows") {
  scratch<float> memory;
  float* first = memory.take(100);
  CHECK(reinterpret_cast<std::uintptr_t>(first) % 64 == 0);
  CHECK(memory.take(7) == first);
  float* bigger = memory.take(100000);
  bigger[99999] = 1.0F;
  CHECK(memory.take(100000) == bigger);
}
