#include <catch2/catch.hpp>

#include <numeric>

#include "support.hpp"

namespace kernel_tests {

namespace {

bool same_value(float got, double want) {
  return std::isnan(want)
           ? std::isnan(got)
           : static_cast<double>(got) == want && std::signbit(got) == std::signbit(want);
}

/// All codes of a type as one row after another, expanded by `embed`.
matrix expand_all(ops& device, const weight_matrix& table) {
  std::vector<std::int32_t> ids(table.num_rows);
  std::iota(ids.begin(), ids.end(), 0);
  matrix out(table.num_rows, table.num_cols);
  device.embed(table, ids, out.view());
  return out;
}

} // namespace

TEST_CASE("element sizes") {
  CHECK(troupe::kernels::size_of(element_type::f32) == 4);
  CHECK(troupe::kernels::size_of(element_type::bf16) == 2);
  CHECK(troupe::kernels::size_of(element_type::f16) == 2);
  CHECK(troupe::kernels::size_of(element_type::f8_e4m3) == 1);
}

TEST_CASE("all 256 codes of e4m3 are exact, with and without a scale") {
  std::vector<std::uint8_t> codes(256);
  std::iota(codes.begin(), codes.end(), 0);
  // Large and small scales, where a combined factor might overflow or lose bits.
  for (const float scale : {0.0F, 1.0F, 0.0123F, 3e-39F, 1000.0F, 1e30F}) {
    weight_matrix table{codes.data(), element_type::f8_e4m3, 1, 256};
    table.block_rows = table.block_cols = 256;
    table.scales = scale == 0.0F ? nullptr : &scale;
    for (auto& [name, device] : all_variants()) {
      const matrix out = expand_all(*device, table);
      int wrong = 0;
      for (int i = 0; i < 256; ++i) {
        const float factor = scale == 0.0F ? 1.0F : scale;
        const float want = static_cast<float>(e4m3_value(i)) * factor;
        wrong += same_value(out.at(0, i), want) ? 0 : 1;
      }
      INFO(name << ", scale " << scale);
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("codes of e4m3 are exact in products of one row and of several") {
  // Row n of the weight holds the code n at place n and zeros elsewhere.
  std::vector<std::uint8_t> codes(256 * 256);
  for (int n = 0; n < 256; ++n) {
    codes[n * 256 + n] = static_cast<std::uint8_t>(n);
  }
  const weight_matrix w{codes.data(), element_type::f8_e4m3, 256, 256};
  for (auto& [name, device] : all_variants()) {
    for (const int num_rows : {1, 5}) {
      matrix x(num_rows, 256);
      std::fill(x.data.begin(), x.data.end(), 1.0F);
      matrix out(num_rows, 256);
      device->linear(x.view(), w, out.view());
      int wrong = 0;
      for (int m = 0; m < num_rows; ++m) {
        for (int n = 0; n < 256; ++n) {
          // A sum that starts at +0 never is -0.
          wrong += same_value(out.at(m, n), e4m3_value(n) + 0.0) ? 0 : 1;
        }
      }
      INFO(name << ", " << num_rows << " rows");
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("all codes of bf16 and f16 are exact") {
  std::vector<std::uint16_t> codes(65536);
  std::iota(codes.begin(), codes.end(), 0);
  for (auto& [name, device] : all_variants()) {
    INFO(name);
    const matrix bf16 = expand_all(*device, {codes.data(), element_type::bf16, 256, 256});
    const matrix f16 = expand_all(*device, {codes.data(), element_type::f16, 256, 256});
    int wrong_bf16 = 0;
    int wrong_f16 = 0;
    for (int i = 0; i < 65536; ++i) {
      wrong_bf16 += same_value(bf16.data[i], bf16_value(codes[i])) ? 0 : 1;
      wrong_f16 += same_value(f16.data[i], f16_value(codes[i])) ? 0 : 1;
    }
    CHECK(wrong_bf16 == 0);
    CHECK(wrong_f16 == 0);
  }
}

TEST_CASE("embed expands ragged, scaled and unaligned rows of every type") {
  std::mt19937 random(1);
  for (auto& [name, device] : all_variants()) {
    for (const auto type : kAllTypes) {
      for (const int cols : {1, 15, 16, 17, 131, 300}) {
        for (const int block : {7, 128}) {
          const auto w = random_weight(type, 9, cols, random, true, 4, block, 1);
          const std::vector<std::int32_t> ids{8, 0, 3, 3};
          matrix out(4, cols);
          device->embed(w.view, ids, out.view());
          int wrong = 0;
          for (int i = 0; i < 4; ++i) {
            for (int c = 0; c < cols; ++c) {
              wrong += out.at(i, c) == static_cast<float>(w.value(ids[i], c)) ? 0 : 1;
            }
          }
          INFO(name << ", type " << int(type) << ", cols " << cols << ", block " << block);
          CHECK(wrong == 0);
        }
      }
    }
  }
}

} // namespace kernel_tests
