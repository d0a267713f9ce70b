#include <catch2/catch.hpp>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <ctime>

#include "support.hpp"

namespace kernel_tests {

namespace {

struct seconds {
  double wall;
  double processor; ///< of all threads; tells the speed on a machine that others use too
};

seconds time_of(ops& device, matrix& x, const std::vector<test_weight>& weights, matrix& out) {
  const auto start = std::chrono::steady_clock::now();
  const std::clock_t processor_start = std::clock();
  for (const auto& w : weights) {
    device.linear(x.view(), w.view, out.view());
  }
  const double processor = double(std::clock() - processor_start) / CLOCKS_PER_SEC;
  const std::chrono::duration<double> wall = std::chrono::steady_clock::now() - start;
  return {wall.count() / double(weights.size()), processor / double(weights.size())};
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

} // namespace

// Not part of a normal run: kernels_tests "[.benchmark]". Weights are walked through so that they
// come from memory and not from a cache, as in a model; medians of 9 rounds.
TEST_CASE("speed of linear", "[.benchmark]") {
  std::mt19937 random(50);
  for (const int size : {1024, 4096}) {
    for (const auto type : {element_type::bf16, element_type::f8_e4m3}) {
      const bool fp8 = type == element_type::f8_e4m3;
      const double bytes = double(size) * size * double(troupe::kernels::size_of(type));
      std::vector<test_weight> weights{random_weight(type, size, size, random, fp8)};
      while (double(weights.size()) * bytes < 128e6) {
        auto copy = weights.front();
        copy.data = std::make_shared<std::vector<unsigned char>>(*copy.data);
        copy.view.data = copy.data->data();
        copy.values.clear();
        weights.push_back(copy);
      }
      for (const char* isa : {"avx512", "avx2"}) {
        for (const int threads : {1, 2}) {
          const auto device = make_ops(isa, threads);
          if (device == nullptr) {
            continue;
          }
          for (const int rows : {1, 8, 64}) {
            matrix x = random_matrix(rows, size, random);
            matrix out(rows, size);
            std::vector<double> walls;
            std::vector<double> processors;
            for (int round = 0; round < 9; ++round) {
              const auto time = time_of(*device, x, weights, out);
              walls.push_back(time.wall);
              processors.push_back(time.processor);
            }
            const double wall = median(walls);
            const double processor = median(processors);
            const double products = double(rows) * size * size;
            std::printf("%-23s %s %4dx%d, %2d rows: %8.1f us %6.1f GB/s %6.1f GFLOP/s; a "
                        "processor second: %6.1f GB %6.1f GFLOP\n",
                        device->description(), fp8 ? "fp8 " : "bf16", size, size, rows, wall * 1e6,
                        bytes / wall / 1e9, 2.0 * products / wall / 1e9, bytes / processor / 1e9,
                        2.0 * products / processor / 1e9);
            CHECK(std::isfinite(out.at(0, 0)));
          }
        }
      }
    }
  }
}

} // namespace kernel_tests
