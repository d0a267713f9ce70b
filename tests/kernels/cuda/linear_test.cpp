#include "gpu.hpp"

#include <algorithm>
#include <random>
#include <span>

namespace kernel_tests {

using troupe::kernels::weight_use;

namespace {

struct shape {
  int num_rows, num_cols;
  element_type type;
  int block_rows = 0; ///< 0: no scales
  int block_cols = 0;
};

test_weight weight_of(const shape& s, std::mt19937& random) {
  if (s.type == element_type::i4) {
    return random_i4(s.num_rows, s.num_cols, s.block_cols, random);
  }
  return random_weight(s.type, s.num_rows, s.num_cols, random, s.block_rows > 0,
                       s.block_rows > 0 ? s.block_rows : 128,
                       s.block_cols > 0 ? s.block_cols : 128);
}

const shape kShapes[] = {
  {64, 128, element_type::bf16},
  {2112, 7168, element_type::bf16},
  {100, 72, element_type::bf16},
  {24, 48, element_type::f32},
  {96, 160, element_type::f16},
  {512, 2048, element_type::f8_e4m3, 128, 128},
  {576, 7168, element_type::f8_e4m3, 128, 128},
  {200, 320, element_type::f8_e4m3, 128, 128},
  {80, 192, element_type::f8_e4m3},
  {130, 200, element_type::f8_e4m3, 32, 48},
  {256, 1024, element_type::i8, 1, 1024},
  {48, 384, element_type::i8, 1, 128},
  {72, 96, element_type::i8, 1, 32},
  {256, 1024, element_type::i4, 1, 128},
  {40, 256, element_type::i4, 1, 256},
  {33, 100, element_type::i4, 1, 32},
  {130, 512, element_type::f8_e4m3, 128, 128},
};

/// So many rows that no tile is shared by blocks.
const shape kLargeShapes[] = {
  {9000, 1152, element_type::f8_e4m3, 128, 128},
  {9000, 640, element_type::i4, 1, 128},
  {34000, 640, element_type::bf16},
};

void check_products(std::span<const shape> shapes) {
  std::mt19937 random(1);
  for (const auto& s : shapes) {
    const auto w = weight_of(s, random);
    const auto placed = gpu()->place(w.view);
    constexpr int kRows = 200;
    auto x = random_rows(kRows, s.num_cols, random);
    matrix expected(kRows, s.num_rows);
    reference().linear(x.view(), w.view, expected.view());
    INFO("type " << int(s.type) << ", " << s.num_rows << " x " << s.num_cols);
    const gpu_rows input(x);
    const gpu_rows out(kRows, s.num_rows);
    gpu()->linear(input.view(), placed, out.view());
    const auto got = out.read();
    CHECK(distance(got, expected) < kRounding);
    for (const int count : {1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 128, 200}) {
      auto order = shuffled(kRows, random);
      order.resize(count);
      const gpu_rows some(select_rows(x, order), s.num_cols + 5);
      const gpu_rows some_out(count, s.num_rows, s.num_rows + 3);
      gpu()->linear(some.view(), placed, some_out.view());
      INFO(count << " rows");
      CHECK(same_bits(some_out.read(), select_rows(got, order)));
    }
    const gpu_floats logits(kRows, s.num_rows);
    gpu()->logits(input.view(), placed, logits.view());
    CHECK(distance(logits.read(), expected) < kRounding);
    CHECK(same_bits(rounded(logits.read()), got));
  }
  CHECK(gpu()->failure().empty());
}

} // namespace

TEST_CASE("products are those of the reference, the same bits for a row in any company") {
  if (gpu() != nullptr) {
    check_products(kShapes);
  }
}

TEST_CASE("large products are those of the reference, the same bits for a row in any company",
          "[large]") {
  if (gpu() != nullptr) {
    check_products(kLargeShapes);
  }
}

TEST_CASE("every code of f8 and i8 stands for its value, NaN included") {
  if (gpu() == nullptr) {
    return;
  }
  for (const auto type : {element_type::f8_e4m3, element_type::i8}) {
    std::vector<unsigned char> codes(256 * 256, 0);
    for (int i = 0; i < 256; ++i) {
      codes[i * 256 + i] = static_cast<unsigned char>(i);
    }
    const bool has_nan = type == element_type::f8_e4m3;
    for (const bool with_nan : {false, true}) {
      if (has_nan && !with_nan) {
        codes[0x7F * 257] = codes[0xFF * 257] = 0;
      } else if (has_nan) {
        codes[0x7F * 257] = 0x7F;
        codes[0xFF * 257] = 0xFF;
      }
      const weight_matrix w{codes.data(), type, 256, 256};
      const auto placed = gpu()->place(w);
      matrix x(256, 256);
      for (int i = 0; i < 256; ++i) {
        x.at(i, i) = 1.0F;
      }
      const gpu_rows out(256, 256);
      gpu()->linear(gpu_rows(x).view(), placed, out.view());
      const auto got = out.read();
      for (int i = 0; i < 256; ++i) {
        const double want =
          has_nan ? e4m3_value(codes[i * 257]) : static_cast<std::int8_t>(codes[i * 257]);
        INFO("code " << i);
        if (want == want) {
          CHECK(got.at(i, i) == want);
        } else {
          CHECK(got.at(i, i) != got.at(i, i));
        }
      }
    }
  }
}

TEST_CASE("a product by heads is one product for each head") {
  if (gpu() == nullptr) {
    return;
  }
  std::mt19937 random(2);
  struct heads {
    int count, in, out, in_stride, out_stride;
  };
  for (const auto& h :
       {heads{4, 32, 64, 48, 64}, heads{6, 48, 24, 48, 24}, heads{3, 20, 12, 28, 12},
        heads{16, 128, 512, 192, 512}, heads{16, 512, 128, 512, 128}}) {
    const auto w = random_weight(element_type::f32, h.count * h.out, h.in, random);
    auto rounded_weight = w;
    for (std::size_t i = 0; i < w.values.size(); ++i) {
      const float value = bf16_value(to_bf16(w.values[i]));
      std::memcpy(rounded_weight.data->data() + i * 4, &value, 4);
    }
    const auto placed = gpu()->place(rounded_weight.view);
    auto x = random_rows(70, h.count * h.in_stride, random);
    matrix expected(70, h.count * h.out_stride);
    reference().linear_per_head(x.view(), h.in_stride, rounded_weight.view, h.count,
                                expected.view(), h.out_stride);
    const gpu_rows input(x);
    const gpu_rows out(70, h.count * h.out_stride);
    gpu()->linear_per_head(input.view(), h.in_stride, placed, h.count, out.view(), h.out_stride);
    const auto got = out.read();
    INFO(h.count << " heads, " << h.in << " to " << h.out);
    CHECK(distance(got, expected) < kRounding);
    for (const int count : {1, 7, 64}) {
      const gpu_rows some_out(count, h.count * h.out_stride);
      gpu()->linear_per_head(input.first_rows(count), h.in_stride, placed, h.count, some_out.view(),
                             h.out_stride);
      std::vector<int> first(count);
      std::iota(first.begin(), first.end(), 0);
      CHECK(same_bits(some_out.read(), select_rows(got, first)));
    }
  }
}

TEST_CASE("two products at once have the bits of one after the other") {
  if (gpu() == nullptr) {
    return;
  }
  using troupe::kernels::linear_part;
  std::mt19937 random(6);
  const std::pair<shape, shape> kPairs[] = {
    {{576, 7168, element_type::f8_e4m3, 128, 128}, {1536, 7168, element_type::f8_e4m3, 128, 128}},
    {{200, 320, element_type::bf16}, {24, 320, element_type::bf16}},
    {{40, 384, element_type::i8, 1, 128}, {130, 384, element_type::i8, 1, 128}},
    {{72, 256, element_type::i4, 1, 128}, {72, 256, element_type::i4, 1, 128}},
    {{64, 256, element_type::bf16}, {64, 256, element_type::f8_e4m3, 128, 128}}};
  for (const auto& [a, b] : kPairs) {
    const auto first = weight_of(a, random);
    const auto second = weight_of(b, random);
    const weight_matrix placed[] = {gpu()->place(first.view), gpu()->place(second.view)};
    const auto x = random_rows(40, a.num_cols, random);
    for (const int count : {1, 5, 8, 9, 32, 33, 40}) {
      std::vector<int> rows(count);
      std::iota(rows.begin(), rows.end(), 0);
      const gpu_rows input(select_rows(x, rows), a.num_cols + 8);
      const gpu_rows out_a(count, a.num_rows, a.num_rows + 5), out_b(count, b.num_rows);
      const gpu_rows want_a(count, a.num_rows), want_b(count, b.num_rows);
      const linear_part parts[] = {{placed[0], out_a.view()}, {placed[1], out_b.view()}};
      gpu()->linears(input.view(), parts);
      gpu()->linear(input.view(), placed[0], want_a.view());
      gpu()->linear(input.view(), placed[1], want_b.view());
      INFO(a.num_rows << " and " << b.num_rows << " x " << a.num_cols << ", " << count << " rows");
      CHECK(same_bits(out_a.read(), want_a.read()));
      CHECK(same_bits(out_b.read(), want_b.read()));
    }
  }
  CHECK(gpu()->failure().empty());
}

TEST_CASE("an MLP has the bits of its operations one by one") {
  if (gpu() == nullptr) {
    return;
  }
  std::mt19937 random(7);
  for (const auto& [inner, hidden, type] :
       {std::tuple{2048, 1024, element_type::f8_e4m3}, std::tuple{100, 72, element_type::bf16},
        std::tuple{384, 256, element_type::i8}, std::tuple{48, 640, element_type::i4}}) {
    const bool is_scaled = type != element_type::bf16;
    const bool is_f8 = type == element_type::f8_e4m3;
    const int block_rows = !is_scaled ? 0 : is_f8 ? 128 : 1;
    const auto gate = weight_of({inner, hidden, type, block_rows, 128}, random);
    const auto up = weight_of({inner, hidden, type, block_rows, 128}, random);
    const auto down = weight_of({hidden, inner, type, block_rows, 128}, random);
    const troupe::kernels::expert_weights w{gpu()->place(gate.view), gpu()->place(up.view),
                                            gpu()->place(down.view)};
    const auto x = random_rows(12, hidden, random, 0.3F);
    for (const int count : {1, 3, 8, 9, 12}) {
      std::vector<int> rows(count);
      std::iota(rows.begin(), rows.end(), 0);
      const gpu_rows input(select_rows(x, rows));
      const gpu_rows gates(count, inner, inner + 8), ups(count, inner, inner + 8);
      const gpu_rows out(count, hidden), expected(count, hidden);
      gpu()->mlp(input.view(), w, gates.view(), ups.view(), out.view());
      gpu()->linear(input.view(), w.gate, gates.view());
      gpu()->linear(input.view(), w.up, ups.view());
      gpu()->swiglu(gates.view(), ups.view(), gates.view());
      gpu()->linear(gates.view(), w.down, expected.view());
      INFO(inner << " x " << hidden << ", " << count << " rows");
      CHECK(same_bits(out.read(), expected.read()));
      CHECK(distance(out.read(), expected.read()) < kRounding); // no NaN
    }
  }
  CHECK(gpu()->failure().empty());
}

TEST_CASE("experts compute their tasks as the reference does, whatever the crowd") {
  if (gpu() == nullptr) {
    return;
  }
  using troupe::kernels::expert_task;
  using troupe::kernels::expert_weights;
  std::mt19937 random(3);
  for (const auto& [hidden, inner, scaled] :
       {std::tuple{192, 80, true}, std::tuple{256, 128, true}, std::tuple{160, 72, false}}) {
    constexpr int kExperts = 6;
    const auto type = scaled ? element_type::f8_e4m3 : element_type::bf16;
    std::vector<test_weight> weights;
    std::vector<expert_weights> on_host, on_gpu;
    for (int e = 0; e < kExperts; ++e) {
      for (const auto& [rows, cols] :
           {std::pair{inner, hidden}, std::pair{inner, hidden}, std::pair{hidden, inner}}) {
        weights.push_back(random_weight(type, rows, cols, random, scaled));
      }
      const auto at = weights.size() - 3;
      on_host.push_back({weights[at].view, weights[at + 1].view, weights[at + 2].view});
      on_gpu.push_back({gpu()->place(weights[at].view), gpu()->place(weights[at + 1].view),
                        gpu()->place(weights[at + 2].view)});
    }
    auto x = random_rows(90, hidden, random, 0.3F);
    std::vector<expert_task> tasks;
    for (int e = 0; e < kExperts; ++e) {
      for (int row = 0; row < 90; ++row) {
        if (e != 2 && (row * 7 + e) % (e * e * e + 1) == 0) {
          tasks.push_back({row, e});
        }
      }
    }
    const auto num_tasks = static_cast<int>(tasks.size());
    matrix expected(num_tasks, hidden);
    reference().experts(x.view(), tasks, on_host, expected.view());
    const gpu_rows input(x);
    const gpu_rows out(num_tasks, hidden);
    gpu()->experts(input.view(), tasks, on_gpu, out.view());
    const auto got = out.read();
    CHECK(distance(got, expected) < 2 * kRounding);
    for (int t = 0; t < num_tasks; t += 11) {
      const gpu_rows alone(1, hidden);
      gpu()->experts(input.view(), {&tasks[t], 1}, on_gpu, alone.view());
      CHECK(same_bits(alone.read(), select_rows(got, {t})));
    }
  }
  CHECK(gpu()->failure().empty());
}

} // namespace kernel_tests
