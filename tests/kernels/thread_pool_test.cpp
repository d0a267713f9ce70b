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

TEST_CASE("a pool as wide as the machine is kept on its cores, another one is not") {
  cpu_set_t usable;
  REQUIRE(::sched_getaffinity(0, sizeof(usable), &usable) == 0);
  const int num_cores = CPU_COUNT(&usable);
  const auto cores_of_threads = [](int num_threads, int place) {
    std::vector<cpu_set_t> cores(num_threads);
    std::thread caller([&] { // which stays on its core
      thread_pool pool(num_threads);
      pool.keep_on_cores(place);
      std::atomic<int> present = 0;
      pool.run(num_threads, [&](std::int32_t, std::int32_t thread) {
        ::sched_getaffinity(0, sizeof(cpu_set_t), &cores[thread]);
        ++present;
        while (present < num_threads) { // a chunk for every thread
          std::this_thread::yield();
        }
      });
    });
    caller.join();
    return cores;
  };
  if (num_cores > 1) { // with one core `run` does not ask the pool
    const auto first = cores_of_threads(num_cores, 0);
    const auto second = cores_of_threads(num_cores, num_cores + 1);
    cpu_set_t used;
    CPU_ZERO(&used);
    for (int thread = 0; thread < num_cores; ++thread) {
      CHECK(CPU_COUNT(&first[thread]) == 1);
      CHECK(CPU_EQUAL(&second[thread], &first[(thread + 1) % num_cores]));
      CPU_OR(&used, &used, &first[thread]);
    }
    CHECK(CPU_EQUAL(&used, &usable));
  }
  for (const auto& cores : cores_of_threads(num_cores + 1, 0)) {
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
