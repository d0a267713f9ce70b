#include <catch2/catch.hpp>

#include <atomic>
#include <functional>
#include <numeric>

#include "attention_support.hpp"
#include "troupe/kernels/machine.hpp"

namespace kernel_tests {
using troupe::kernels::expert_task;
using troupe::kernels::expert_weights;

TEST_CASE("every fast operation that can take long ticks on its way") {
  std::vector<unsigned char> codes(std::size_t{8192} * 4096);
  const auto weight = [&](int rows, int cols) {
    weight_matrix w;
    w.data = codes.data();
    w.type = element_type::f8_e4m3;
    w.num_rows = rows;
    w.num_cols = cols;
    return w;
  };
  for (const int threads : {1, 2}) {
    std::atomic<std::uint64_t> progress = 0;
    const auto device = troupe::kernels::make_cpu_ops(threads, &progress, numerics::fast);
    const auto ticks = [&](const std::function<void()>& operation) {
      const auto before = progress.load();
      operation();
      return progress - before;
    };
    INFO(device->description());
    weight_matrix wide;
    const bool packs = device->place(weight(16, 16)).packed != nullptr;
    const auto placing = ticks([&] { wide = device->place(weight(8192, 4096)); });
    CHECK((!packs || placing >= 32));
    const weight_matrix down = device->place(weight(4096, 8192));
    matrix x(64, 4096);
    matrix out(64, 8192);
    CHECK(ticks([&] {
            device->linear({x.data.data(), 1, 4096, 4096}, wide, {out.data.data(), 1, 8192, 8192});
          })
          >= 4);
    if (!packs) {
      continue; // the exact loops, which have a test of their own
    }
    CHECK(ticks([&] { device->linear(x.view(), wide, out.view()); }) >= 64);
    std::vector<expert_task> tasks;
    for (int row = 0; row < 64; ++row) {
      tasks.push_back({row, 0});
    }
    const expert_weights expert{wide, wide, down};
    matrix expert_out(64, 4096);
    CHECK(ticks([&] { device->experts(x.view(), tasks, std::span(&expert, 1), expert_out.view()); })
          >= 192);
  }
}

TEST_CASE("fast attention ticks for every block of positions") {
  std::mt19937 random(51);
  std::vector<matrix> latents{random_matrix(640, 32, random)};
  std::vector<matrix> keys{random_matrix(640, 16, random)};
  for (const int threads : {1, 2}) {
    std::atomic<std::uint64_t> progress = 0;
    const auto device = troupe::kernels::make_cpu_ops(threads, &progress, numerics::fast);
    test_cache cache(*device, latents, keys, 16, 1);
    query_rows q{{639}, {0}, random_matrix(1, 32, random), random_matrix(1, 16, random)};
    const auto before = progress.load();
    attend(*device, q, 1, 16, cache);
    INFO(device->description());
    const bool emulated = std::string(device->description()).find("emulated") != std::string::npos;
    CHECK(progress - before >= (emulated ? 1U : 5U));
  }
}

TEST_CASE("the machine has a speed") {
  const auto speed = troupe::kernels::measure_machine(1);
  CHECK(speed.read > 1e7);
  CHECK(speed.f32 > 1e7);
  CHECK((speed.bf16 == 0.0 || speed.bf16 > 1e7));
  CHECK((speed.i8 == 0.0 || speed.i8 > 1e7));
}

} // namespace kernel_tests
