#include "troupe/kernels/narrow_weight.hpp"

#include <catch2/catch.hpp>

#include "support.hpp"

namespace kernel_tests {

using namespace troupe::kernels;

TEST_CASE("a group's largest magnitude is 127 steps, and all else is within half a step") {
  std::mt19937 random(3);
  for (const float width : {1e-20F, 0.003F, 1.0F, 7e30F}) {
    const auto values = random_matrix(1, kNarrowGroup, random, width).data;
    std::uint32_t largest = 0;
    for (const float value : values) {
      largest = std::max(largest, magnitude_bits(value));
    }
    const float scale = narrow_scale(largest);
    for (const float value : values) {
      const int code = narrow_code(value, scale);
      CHECK(std::abs(code) <= 127);
      CHECK((std::abs(code) == 127 || magnitude_bits(value) != largest));
      CHECK(std::abs(code * double{scale} - value) <= 0.5001 * scale);
    }
  }
  CHECK(narrow_code(0.0F, narrow_scale(0)) == 0);
  CHECK(narrow_code(1e-40F, narrow_scale(magnitude_bits(1e-40F))) == 0);
  CHECK(narrow_code(2.5F, 1.0F) == 2); // ties to even
  CHECK(narrow_code(-3.5F, 1.0F) == -4);
  CHECK(narrow_code(1000.0F, 1.0F) == 127);
  CHECK(narrow_code(-1000.0F, 1.0F) == -127);
}

TEST_CASE("what is not finite makes a group NaN") {
  const float infinite = std::numeric_limits<float>::infinity();
  const float nan = std::nanf("");
  for (const float bad : {infinite, -infinite, nan, -nan}) {
    CHECK(magnitude_bits(bad) > magnitude_bits(3e38F));
    const float scale = narrow_scale(magnitude_bits(bad));
    CHECK(std::isnan(scale));
    CHECK(narrow_code(1.0F, scale) == 0);
    CHECK(narrow_code(bad, scale) == 0);
  }
}

TEST_CASE("weights that are placed in 8 bit have the products of their codes and scales") {
  std::mt19937 random(4);
  for (const auto type : {element_type::f32, element_type::bf16, element_type::f16}) {
    for (const auto& [n, k] : {std::pair{64, 256}, {33, 200}, {7, 48}}) {
      const auto w = random_weight(type, n, k, random, false, 1, 1);
      const auto x = random_matrix(9, k, random);
      for (const auto mode : {numerics::exact, numerics::fast}) {
        for (auto& [name, device] : all_variants(mode)) {
          INFO(name << ", type " << int(type) << ", " << n << "x" << k);
          const auto placed = device->place(w.view, weight_use::int8_product);
          REQUIRE(placed.type == element_type::i8);
          REQUIRE(placed.block_rows == 1);
          REQUIRE(placed.block_cols == kNarrowGroup);
          CHECK(device->place(w.view).data == w.view.data);
          CHECK(device->place(w.view, weight_use::stored).data == w.view.data);
          auto rows = x;
          matrix out(9, n);
          device->logits(rows.view(), placed, out.view());
          const auto* codes = static_cast<const std::int8_t*>(placed.data);
          const int groups = (k + kNarrowGroup - 1) / kNarrowGroup;
          // Half a step of each weight, half a step of each activation with fast numerics, and
          // what sums in float32 may lose.
          for (int m = 0; m < 9; ++m) {
            for (int r = 0; r < n; ++r) {
              double want = 0.0;
              double bound = 0.0;
              for (int c = 0; c < k; ++c) {
                const double scale = placed.scales[r * groups + c / kNarrowGroup];
                want += w.value(r, c) * x.at(m, c);
                bound += 0.5001 * scale * std::abs(x.at(m, c));
                if (mode == numerics::fast) {
                  bound += std::abs(w.value(r, c)) * 5.0 / 254.0;
                } else if (std::abs(codes[r * k + c] * scale - w.value(r, c)) > 0.5001 * scale) {
                  FAIL_CHECK("row " << r << ", column " << c);
                }
              }
              if (!(std::abs(out.at(m, r) - want) <= bound + 1e-5)) {
                FAIL_CHECK("row " << m << ": " << out.at(m, r) << " for " << want);
              }
            }
          }
        }
      }
    }
  }
}

TEST_CASE("weights of 8 bit and less are placed as they are") {
  std::mt19937 random(5);
  for (const auto type : {element_type::f8_e4m3, element_type::i8}) {
    const auto w = random_weight(type, 32, 256, random, true, 1, 128);
    for (auto& [name, device] : all_variants()) {
      const auto placed = device->place(w.view, weight_use::int8_product);
      CHECK(placed.data == w.view.data);
      CHECK(placed.type == type);
    }
  }
}

} // namespace kernel_tests
