#include "gpu.hpp"

#include <cmath>
#include <limits>
#include <random>

namespace kernel_tests {

using troupe::kernels::weight_use;

TEST_CASE("norms, activations, sums and biases are those of the reference") {
  if (gpu() == nullptr) {
    return;
  }
  std::mt19937 random(6);
  for (const int cols : {1, 24, 192, 1536, 7168}) {
    INFO(cols << " columns");
    auto x = random_rows(37, cols, random, 3.0F);
    auto y = random_rows(37, cols, random);
    const auto weight = random_matrix(1, cols, random).data;
    const gpu_rows a(x, cols + 8), b(y), out(37, cols);

    matrix expected(37, cols);
    reference().rms_norm(x.view(), weight.data(), 1e-6F, expected.view());
    gpu()->rms_norm(a.view(), gpu_vector(weight), 1e-6F, out.view());
    const auto normed = out.read();
    CHECK(distance(normed, expected) < kRounding);
    const gpu_rows alone(1, cols);
    gpu()->rms_norm(a.first_rows(1), gpu_vector(weight), 1e-6F, alone.view());
    CHECK(same_bits(alone.read(), select_rows(normed, {0})));

    reference().swiglu(x.view(), y.view(), expected.view());
    gpu()->swiglu(a.view(), b.view(), out.view());
    CHECK(distance(out.read(), expected) < kRounding);

    auto sum = x;
    reference().add(sum.view(), y.view());
    gpu()->add(a.view(), b.view());
    CHECK(same_bits(a.read(), rounded(sum)));
    sum = rounded(sum);
    reference().add_bias(sum.view(), weight.data());
    gpu()->add_bias(a.view(), gpu_vector(weight));
    CHECK(same_bits(a.read(), rounded(sum)));

    // In place.
    const gpu_rows same(x);
    gpu()->rms_norm(same.view(), gpu_vector(weight), 1e-6F, same.view());
    CHECK(same_bits(same.read(), normed));
  }
}

TEST_CASE("rotation of neighbours and of halves is that of the reference") {
  if (gpu() == nullptr) {
    return;
  }
  std::mt19937 random(7);
  constexpr int kHeads = 3, kStride = 80, kOffset = 10, kWidth = 64;
  std::vector<float> inv_freq;
  for (int i = 0; i < kWidth / 2; ++i) {
    inv_freq.push_back(static_cast<float>(std::pow(10000.0, -2.0 * i / kWidth)));
  }
  const std::vector<std::int32_t> positions{0, 1, 17, 4095, 163839, 163840 * 4};
  for (const bool halves : {false, true}) {
    auto x = random_rows(int(positions.size()), kHeads * kStride, random);
    const gpu_rows on_gpu(x);
    auto expected = x;
    if (halves) {
      reference().rope_halves(expected.view(), kHeads, kStride, kOffset, kWidth, positions,
                              inv_freq.data(), 1.3F);
      gpu()->rope_halves(on_gpu.view(), kHeads, kStride, kOffset, kWidth, positions,
                         gpu_vector(inv_freq), 1.3F);
    } else {
      reference().rope(expected.view(), kHeads, kStride, kOffset, kWidth, positions,
                       inv_freq.data(), 1.3F);
      gpu()->rope(on_gpu.view(), kHeads, kStride, kOffset, kWidth, positions, gpu_vector(inv_freq),
                  1.3F);
    }
    const auto got = on_gpu.read();
    for (std::size_t row = 0; row < positions.size(); ++row) {
      INFO("position " << positions[row]);
      CHECK(distance(select_rows(got, {int(row)}), select_rows(expected, {int(row)})) < kRounding);
    }
  }
}

TEST_CASE("rows of a table, of any type") {
  if (gpu() == nullptr) {
    return;
  }
  std::mt19937 random(8);
  for (const auto type : {element_type::f32, element_type::bf16, element_type::f8_e4m3}) {
    const auto table = random_weight(type, 50, 100, random, type == element_type::f8_e4m3, 16, 32);
    const auto placed = gpu()->place(table.view, weight_use::stored);
    const std::vector<std::int32_t> ids{49, 0, 7, 7};
    matrix expected(4, 100);
    reference().embed(table.view, ids, expected.view());
    const gpu_rows out(4, 100);
    gpu()->embed(placed, ids, out.view());
    CHECK(same_bits(out.read(), rounded(expected)));
  }
}

TEST_CASE("weighted sums of expert rows are those of the reference") {
  if (gpu() == nullptr) {
    return;
  }
  std::mt19937 random(9);
  constexpr int kRows = 13, kTopK = 8, kCols = 200;
  auto expert_out = random_rows(kRows * kTopK, kCols, random);
  auto shared = random_rows(kRows, kCols, random);
  const auto rows = [&] {
    const auto order = shuffled(kRows * kTopK, random);
    return std::vector<std::int32_t>(order.begin(), order.end());
  }();
  const auto weights = random_matrix(1, kRows * kTopK, random).data;
  for (const bool with_shared : {false, true}) {
    auto x = random_rows(kRows, kCols, random);
    const gpu_rows out(x), experts_gpu(expert_out), shared_gpu(shared);
    reference().combine(expert_out.view(), rows, weights, kTopK,
                        with_shared ? shared.view() : rows_view{}, x.view());
    gpu()->combine(experts_gpu.view(), rows, weights, kTopK,
                   with_shared ? shared_gpu.view() : rows_view{}, out.view());
    CHECK(distance(out.read(), x) < kRounding);
  }
}

TEST_CASE("a sum and its norm at once have the bits of one after the other") {
  if (gpu() == nullptr) {
    return;
  }
  std::mt19937 random(14);
  for (const auto& [rows, cols, stride] :
       {std::tuple{5, 7168, 7168}, {3, 200, 208}, {70, 64, 64}, {2, 100, 103}, {2, 9000, 9000}}) {
    const auto x = random_rows(rows, cols, random);
    const gpu_rows delta(random_rows(rows, cols, random), stride);
    const auto* weight = gpu_vector(random_matrix(1, cols, random).data);
    const gpu_rows once(x, stride), twice(x, stride), out(rows, cols), expected(rows, cols);
    gpu()->add(twice.view(), delta.view());
    gpu()->rms_norm(twice.view(), weight, 1e-6F, expected.view());
    gpu()->add_rms_norm(once.view(), delta.view(), weight, 1e-6F, out.view());
    INFO(rows << " x " << cols);
    CHECK(same_bits(once.read(), twice.read()));
    CHECK(same_bits(out.read(), expected.read()));
    CHECK_FALSE(same_bits(once.read(), x));
  }
}

TEST_CASE("values that are not finite are found wherever they are") {
  if (gpu() == nullptr) {
    return;
  }
  for (const float bad : {std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity(), std::nanf("")}) {
    for (const int at : {0, 99, 100, 12345, 29999}) {
      matrix x(300, 100);
      x.data[at] = bad;
      CHECK_FALSE(gpu()->all_finite(gpu_rows(x).view()));
    }
  }
  matrix x(300, 100);
  x.data[77] = 3e38F;
  // The places between the rows are NaN, and nobody's.
  CHECK(gpu()->all_finite(gpu_rows(x, 111).view()));
}

TEST_CASE("copies keep what they are given") {
  if (gpu() == nullptr) {
    return;
  }
  std::mt19937 random(10);
  const auto x = random_rows(50, 33, random);
  CHECK(same_bits(gpu_rows(x, 40).read(), x));
  CHECK(gpu()->memory().total_bytes > gpu()->memory().free_bytes);
  CHECK(gpu()->failure().empty());
}

} // namespace kernel_tests
