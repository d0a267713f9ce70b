#include <catch2/catch.hpp>

#include <algorithm>

#include "support.hpp"

namespace kernel_tests {
using troupe::kernels::expert_task;
using troupe::kernels::expert_weights;

namespace {

struct test_expert {
  test_weight gate, up, down;
};

std::vector<test_expert> random_experts(int count, element_type type, int hidden, int inner,
                                        std::mt19937& random) {
  std::vector<test_expert> result;
  for (int e = 0; e < count; ++e) {
    const bool scaled = type == element_type::f8_e4m3;
    result.push_back({random_weight(type, inner, hidden, random, scaled),
                      random_weight(type, inner, hidden, random, scaled),
                      random_weight(type, hidden, inner, random, scaled)});
  }
  return result;
}

std::vector<expert_weights> views(const std::vector<test_expert>& experts) {
  std::vector<expert_weights> result;
  for (const auto& expert : experts) {
    result.push_back({expert.gate.view, expert.up.view, expert.down.view});
  }
  return result;
}

std::vector<double> exact_expert(const test_expert& expert, const matrix& x, int row) {
  const int inner = expert.gate.view.num_rows;
  const int hidden = expert.down.view.num_rows;
  std::vector<double> middle(inner);
  for (int i = 0; i < inner; ++i) {
    const double gate = exact_dot(x, row, expert.gate, i).value;
    middle[i] = gate / (1.0 + std::exp(-gate)) * exact_dot(x, row, expert.up, i).value;
  }
  std::vector<double> out(hidden);
  for (int o = 0; o < hidden; ++o) {
    for (int i = 0; i < inner; ++i) {
      out[o] += middle[i] * expert.down.value(o, i);
    }
  }
  return out;
}

} // namespace

TEST_CASE("experts agree with double precision and a task with itself alone, bit for bit") {
  std::mt19937 random(7);
  for (const auto type : {element_type::bf16, element_type::f8_e4m3}) {
    for (const auto& [hidden, inner] : {std::pair{64, 48}, {50, 37}, {160, 200}}) {
      const auto experts = random_experts(5, type, hidden, inner, random);
      const auto weights = views(experts);
      matrix x = random_matrix(9, hidden, random, 0.3F);
      std::vector<expert_task> tasks;
      for (int e : {0, 1, 3, 4}) { // nobody asks the third
        for (int row = 0; row < 9; ++row) {
          if ((row + e) % 3 != 0 || e == 4) {
            tasks.push_back({row, e});
          }
        }
      }
      std::vector<matrix> seen;
      for (auto& [name, device] : all_variants()) {
        INFO(name << ", type " << int(type) << ", " << hidden << "x" << inner);
        matrix out(int(tasks.size()), hidden);
        device->experts(x.view(), tasks, weights, out.view());
        seen.push_back(out);
        CHECK(same_bits(seen.front(), out));
        int different = 0;
        double worst = 0.0;
        for (std::size_t t = 0; t < tasks.size(); ++t) {
          matrix alone(1, hidden);
          device->experts(x.view(), {&tasks[t], 1}, weights, alone.view());
          different += std::memcmp(&out.at(int(t), 0), alone.data.data(), hidden * 4) == 0 ? 0 : 1;
          const auto want = exact_expert(experts[tasks[t].expert], x, tasks[t].row);
          double size = 0.0;
          for (const double value : want) {
            size = std::max(size, std::abs(value));
          }
          for (int o = 0; o < hidden; ++o) {
            worst = std::max(worst, std::abs(out.at(int(t), o) - want[o]) / size);
          }
        }
        CHECK(different == 0);
        CHECK(worst < 1e-5);
      }
    }
  }
}

TEST_CASE("rows that travel to experts and back have the bits of those that stay") {
  std::mt19937 random(17);
  for (const auto mode : {numerics::exact, numerics::fast}) {
    for (const auto type : {element_type::bf16, element_type::f8_e4m3, element_type::i8}) {
      for (const auto& [hidden, inner] : {std::pair{128, 48}, {50, 37}, {160, 200}}) {
        std::vector<test_expert> experts;
        for (int e = 0; e < 3; ++e) {
          const bool scaled = type != element_type::bf16;
          const int rows = type == element_type::i8 ? 1 : 128;
          experts.push_back({random_weight(type, inner, hidden, random, scaled, rows, 128),
                             random_weight(type, inner, hidden, random, scaled, rows, 128),
                             random_weight(type, hidden, inner, random, scaled, rows, 128)});
        }
        const std::vector<expert_task> tasks{{0, 0}, {2, 0}, {1, 1}, {0, 2}, {2, 2}};
        const auto num_tasks = static_cast<int>(tasks.size());
        matrix x = random_matrix(3, hidden, random, 0.3F);
        for (auto& [name, device] : all_variants(mode)) {
          std::vector<expert_weights> placed;
          for (const auto& each : views(experts)) {
            placed.push_back(
              {device->place(each.gate), device->place(each.up), device->place(each.down)});
          }
          INFO(name << ", type " << int(type) << ", " << hidden << " x " << inner);
          matrix here(num_tasks, hidden);
          device->experts(x.view(), tasks, placed, here.view());

          const auto element = size_of(device->exchange_type());
          CHECK(element == (mode == numerics::fast ? 2 : 4));
          std::vector<char> way_there(element * 3 * hidden);
          std::vector<char> way_back(element * num_tasks * hidden);
          matrix arrived(3, hidden);
          matrix there(num_tasks, hidden);
          matrix returned(num_tasks, hidden);
          device->export_rows(x.view(), way_there.data());
          device->import_rows(way_there.data(), arrived.view());
          device->experts(arrived.view(), tasks, placed, there.view());
          device->export_rows(there.view(), way_back.data());
          device->import_rows(way_back.data(), returned.view());
          CHECK(same_bits(returned, here));
          if (mode == numerics::fast) {
            CHECK_FALSE(same_bits(arrived, x)); // or the test would show nothing
          }
        }
      }
    }
  }
}

TEST_CASE("experts of different widths work side by side") {
  std::mt19937 random(8);
  auto experts = random_experts(1, element_type::f32, 32, 20, random);
  experts.push_back(random_experts(1, element_type::f32, 32, 90, random).front());
  const auto weights = views(experts);
  const std::vector<expert_task> tasks{{0, 0}, {1, 0}, {0, 1}};
  matrix x = random_matrix(2, 32, random, 0.3F);
  for (auto& [name, device] : all_variants()) {
    matrix out(3, 32);
    device->experts(x.view(), tasks, weights, out.view());
    device->experts(x.view(), {}, weights, out.view()); // nothing to do
    for (int t = 0; t < 3; ++t) {
      const auto want = exact_expert(experts[tasks[t].expert], x, tasks[t].row);
      for (int o = 0; o < 32; ++o) {
        INFO(name << ", task " << t << ", " << o);
        CHECK(out.at(t, o) == Approx(want[o]).margin(1e-4));
      }
    }
  }
}

TEST_CASE("combine sums in the order of the choices") {
  std::mt19937 random(9);
  for (const int cols : {16, 21, 64}) {
    matrix expert_out = random_matrix(12, cols, random);
    matrix shared = random_matrix(3, cols, random);
    const matrix before = random_matrix(3, cols, random);
    const std::vector<std::int32_t> rows{0, 5, 11, 2, 2, 7, 1, 3, 9, 10, 4, 6};
    std::vector<float> weights(12);
    for (auto& weight : weights) {
      weight = std::uniform_real_distribution<float>(0.0F, 1.0F)(random);
    }
    for (auto& [name, device] : all_variants()) {
      for (const bool with_shared : {true, false}) {
        matrix out = before;
        device->combine(expert_out.view(), rows, weights, 4,
                        with_shared ? shared.view() : rows_view{}, out.view());
        int wrong = 0;
        for (int m = 0; m < 3; ++m) {
          for (int c = 0; c < cols; ++c) {
            float sum = 0.0F;
            for (int j = 0; j < 4; ++j) {
              sum = std::fma(weights[m * 4 + j], expert_out.at(rows[m * 4 + j], c), sum);
            }
            sum = with_shared ? sum + shared.at(m, c) : sum;
            wrong += out.at(m, c) == before.at(m, c) + sum ? 0 : 1;
          }
        }
        INFO(name << ", " << cols << " columns, shared " << with_shared);
        CHECK(wrong == 0);
      }
    }
  }
}

} // namespace kernel_tests
