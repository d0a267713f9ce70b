#include <catch2/catch.hpp>

#include <cmath>
#include <cstring>

#include "support.hpp"

namespace kernel_tests {
using troupe::kernels::expert_weights;
using troupe::kernels::linear_part;
using troupe::kernels::weight_use;

namespace {

/// Root of the mean square of the difference, relative to that of `want`.
double relative_error(const matrix& out, const matrix& want) {
  double error = 0.0;
  double size = 1e-30;
  for (std::size_t i = 0; i < out.data.size(); ++i) {
    error += std::pow(double{out.data[i]} - want.data[i], 2);
    size += std::pow(double{want.data[i]}, 2);
  }
  return std::sqrt(error / size);
}

const element_type kTypes[] = {element_type::bf16, element_type::f8_e4m3, element_type::i8};

} // namespace

TEST_CASE("several products of the same rows have the bits of one after the other") {
  std::mt19937 random(61);
  for (const auto mode : {numerics::exact, numerics::fast}) {
    for (const auto type : kTypes) {
      const bool scaled = type != element_type::bf16;
      const auto a = random_weight(type, 100, 256, random, scaled, 1, 128);
      const auto b = random_weight(type, 37, 256, random, scaled, 1, 128);
      const auto other = random_weight(element_type::bf16, 20, 256, random, false, 1, 1);
      for (auto& [name, device] : all_variants(mode)) {
        const weight_matrix placed[] = {device->place(a.view), device->place(b.view),
                                        device->place(other.view)};
        for (const int rows : {1, 7, 150}) {
          matrix x = random_matrix(rows, 256, random);
          for (const std::size_t count : {1, 2, 3}) { // three: not all rounded alike
            matrix out[] = {matrix(rows, 100), matrix(rows, 37), matrix(rows, 20)};
            std::vector<linear_part> parts;
            for (std::size_t i = 0; i < count; ++i) {
              parts.push_back({placed[i], out[i].view()});
            }
            device->linears(x.view(), parts);
            INFO(name << ", type " << int(type) << ", " << rows << " rows, part of " << count);
            for (std::size_t i = 0; i < count; ++i) {
              matrix want(rows, out[i].num_cols);
              device->linear(x.view(), placed[i], want.view());
              CHECK(same_bits(out[i], want));
            }
          }
        }
      }
    }
  }
}

TEST_CASE("an MLP in one call has the bits of its parts") {
  std::mt19937 random(62);
  for (const auto mode : {numerics::exact, numerics::fast}) {
    for (const auto type : kTypes) {
      const bool scaled = type != element_type::bf16;
      for (const int inner : {128, 72, 300}) {
        const auto gate = random_weight(type, inner, 130, random, scaled, 1, 128);
        const auto up = random_weight(type, inner, 130, random, scaled, 1, 128);
        const auto down = random_weight(type, 90, inner, random, scaled, 1, 128);
        for (auto& [name, device] : all_variants(mode)) {
          const expert_weights w{device->place(gate.view), device->place(up.view),
                                 device->place(down.view)};
          for (const int rows : {1, 5, 140}) {
            matrix x = random_matrix(rows, 130, random);
            matrix gates(rows, inner);
            matrix ups(rows, inner);
            matrix want(rows, 90);
            device->linear(x.view(), w.gate, gates.view());
            device->linear(x.view(), w.up, ups.view());
            device->swiglu(gates.view(), ups.view(), gates.view());
            device->linear(gates.view(), w.down, want.view());
            matrix out(rows, 90);
            device->mlp(x.view(), w, gates.view(), ups.view(), out.view());
            INFO(name << ", type " << int(type) << ", " << rows << " rows, width " << inner);
            CHECK(same_bits(out, want));
          }
        }
      }
    }
  }
}

TEST_CASE("wide weights of 8 bit models stay close, and exact ones as they are") {
  std::mt19937 random(63);
  for (const auto type : {element_type::f32, element_type::bf16, element_type::f16}) {
    for (const auto& [n, k] : {std::pair{64, 128}, {48, 512}, {33, 200}}) {
      const auto w = random_weight(type, n, k, random, false, 1, 1);
      matrix x = random_matrix(40, k, random);
      auto reference = make_ops("portable", 1, numerics::exact);
      matrix want(40, n);
      reference->linear(x.view(), w.view, want.view());
      for (auto& [name, device] : all_variants(numerics::exact)) {
        CHECK(device->place(w.view, weight_use::narrow_product).packed == nullptr);
      }
      for (auto& [name, device] : all_variants(numerics::fast)) {
        const auto placed = device->place(w.view, weight_use::narrow_product);
        matrix out(40, n);
        device->linear(x.view(), placed, out.view());
        INFO(name << ", type " << int(type) << ", " << n << "x" << k);
        CHECK(relative_error(out, want) < 0.02);
        int different = 0;
        for (int m = 0; m < 40; ++m) {
          matrix alone(1, n);
          device->linear({&x.at(m, 0), 1, k, k}, placed, alone.view());
          different += std::memcmp(alone.data.data(), &out.at(m, 0), n * 4) == 0 ? 0 : 1;
        }
        CHECK(different == 0);
      }
    }
  }
}

TEST_CASE("products by head in 8 bit have the bits of each head alone") {
  std::mt19937 random(64);
  constexpr int heads = 3;
  for (const auto& [out_dim, in_dim] : {std::pair{32, 128}, {128, 512}, {16, 200}}) {
    const auto w = random_weight(element_type::f32, heads * out_dim, in_dim, random, false, 1, 1);
    for (auto& [name, device] : all_variants(numerics::fast)) {
      const auto placed = device->place(w.view, weight_use::narrow_product);
      for (const int rows : {1, 9, 140}) {
        matrix x = random_matrix(rows, heads * in_dim, random);
        matrix out(rows, heads * out_dim);
        device->linear_per_head(x.view(), in_dim, placed, heads, out.view(), out_dim);
        int different = 0;
        for (int h = 0; h < heads; ++h) {
          weight_matrix one = w.view;
          one.num_rows = out_dim;
          one.data = static_cast<const float*>(w.view.data) + std::size_t(h) * out_dim * in_dim;
          const auto own = device->place(one, weight_use::narrow_product);
          for (int m = 0; m < rows; ++m) {
            matrix want(1, out_dim);
            device->linear({&x.at(m, h * in_dim), 1, in_dim, in_dim}, own, want.view());
            different +=
              std::memcmp(want.data.data(), &out.at(m, h * out_dim), out_dim * 4) == 0 ? 0 : 1;
          }
        }
        INFO(name << ", " << rows << " rows, " << out_dim << "x" << in_dim);
        CHECK(different == 0);
      }
    }
  }
}

} // namespace kernel_tests
