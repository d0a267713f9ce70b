#include <catch2/catch.hpp>

#include <limits>

#include "support.hpp"

namespace kernel_tests {

TEST_CASE("rms_norm agrees with double precision and is the same everywhere") {
  std::mt19937 random(10);
  for (const int cols : {1, 7, 16, 33, 256, 1536}) {
    matrix x = random_matrix(5, cols, random, 3.0F);
    const matrix weight = random_matrix(1, cols, random);
    std::vector<matrix> seen;
    for (auto& [name, device] : all_variants()) {
      INFO(name << ", " << cols << " columns");
      matrix out(5, cols);
      device->rms_norm(x.view(), weight.data.data(), 1e-6F, out.view());
      double worst = 0.0;
      for (int m = 0; m < 5; ++m) {
        double squares = 0.0;
        for (int c = 0; c < cols; ++c) {
          squares += double{x.at(m, c)} * x.at(m, c);
        }
        for (int c = 0; c < cols; ++c) {
          const double want = x.at(m, c) / std::sqrt(squares / cols + 1e-6) * weight.at(0, c);
          worst = std::max(worst, std::abs(out.at(m, c) - want) / (std::abs(want) + 1e-12));
        }
      }
      CHECK(worst < 1e-6);
      matrix in_place = x;
      device->rms_norm(in_place.view(), weight.data.data(), 1e-6F, in_place.view());
      CHECK(same_bits(in_place, out));
      seen.push_back(out);
      CHECK(same_bits(seen.front(), out));
    }
  }
}

TEST_CASE("swiglu agrees with double precision from deep underflow to overflow") {
  std::mt19937 random(11);
  matrix gate = random_matrix(3, 45, random, 4.0F);
  matrix up = random_matrix(3, 45, random);
  const float edges[] = {0.0F,  -0.0F, -87.0F, -88.0F, -104.0F, -1e30F,
                         88.0F, 89.0F, 1e30F,  1e-30F, -1e-30F};
  std::copy(std::begin(edges), std::end(edges), gate.data.begin());
  std::vector<matrix> seen;
  for (auto& [name, device] : all_variants()) {
    INFO(name);
    matrix out(3, 45);
    device->swiglu(gate.view(), up.view(), out.view());
    for (std::size_t i = 0; i < out.data.size(); ++i) {
      const double g = gate.data[i];
      const double want = g / (1.0 + std::exp(-g)) * up.data[i];
      INFO("gate " << g);
      CHECK(out.data[i] == Approx(want).epsilon(1e-6).margin(1e-35));
    }
    matrix in_place = gate;
    device->swiglu(in_place.view(), up.view(), in_place.view());
    CHECK(same_bits(in_place, out));
    seen.push_back(out);
    CHECK(same_bits(seen.front(), out));
    gate.data[40] = std::nanf("");
    device->swiglu(gate.view(), up.view(), out.view());
    CHECK(std::isnan(out.data[40]));
    gate.data[40] = 1.0F;
    device->swiglu(gate.view(), up.view(), seen.front().view());
  }
}

TEST_CASE("add adds, in place, within its columns") {
  std::mt19937 random(12);
  for (auto& [name, device] : all_variants()) {
    const matrix before = random_matrix(4, 37, random);
    matrix delta = random_matrix(4, 37, random);
    matrix x = before;
    device->add({x.data.data(), 4, 35, 37}, delta.view());
    for (int m = 0; m < 4; ++m) {
      for (int c = 0; c < 37; ++c) {
        INFO(name << ", " << m << ", " << c);
        CHECK(x.at(m, c) == (c < 35 ? before.at(m, c) + delta.at(m, c) : before.at(m, c)));
      }
    }
  }
}

TEST_CASE("rope rotates interleaved pairs by the float32 angle") {
  std::mt19937 random(13);
  const int heads = 3;
  const int stride = 24;
  const int offset = 8;
  const int dim = 12;
  std::vector<float> inv_freq(dim / 2);
  for (int i = 0; i < dim / 2; ++i) {
    inv_freq[i] = std::pow(10000.0F, -2.0F * float(i) / dim);
  }
  const std::vector<std::int32_t> positions{0, 1, 77, 163839};
  const matrix before = random_matrix(4, heads * stride, random);
  for (auto& [name, device] : all_variants()) {
    matrix x = before;
    device->rope(x.view(), heads, stride, offset, dim, positions, inv_freq.data(), 1.25F);
    for (int m = 0; m < 4; ++m) {
      for (int c = 0; c < heads * stride; ++c) {
        const int place = c % stride - offset;
        double want = before.at(m, c);
        if (place >= 0 && place < dim) {
          const float angle = float(positions[m]) * inv_freq[place / 2];
          const double cosine = 1.25 * std::cos(double{angle});
          const double sine = 1.25 * std::sin(double{angle});
          const double other = before.at(m, c ^ 1);
          want = place % 2 == 0 ? want * cosine - other * sine : want * cosine + other * sine;
        }
        INFO(name << ", row " << m << ", column " << c);
        CHECK(x.at(m, c) == Approx(want).epsilon(1e-6).margin(1e-6));
      }
    }
    CHECK(x.at(0, offset) == before.at(0, offset) * 1.25F);
    CHECK(x.at(2, offset - 1) == before.at(2, offset - 1));
  }
}

TEST_CASE("all_finite sees every infinity and NaN within the columns, nothing beside them") {
  for (auto& [name, device] : all_variants()) {
    matrix x(3, 20);
    std::fill(x.data.begin(), x.data.end(), std::numeric_limits<float>::max());
    const rows_view view{x.data.data(), 3, 19, 20};
    CHECK(device->all_finite(view));
    x.at(1, 19) = std::nanf("");
    CHECK(device->all_finite(view));
    for (const float bad : {std::nanf(""), -std::nanf(""), INFINITY, -INFINITY}) {
      for (const int place : {0, 18, 25, 58}) {
        const float good = x.data[place];
        x.data[place] = bad;
        INFO(name << ", " << bad << " at " << place);
        CHECK_FALSE(device->all_finite(view));
        x.data[place] = good;
      }
    }
  }
}

TEST_CASE("memory is zeroed and aligned, and rows are copied both ways") {
  auto device = troupe::kernels::make_cpu_ops(1);
  CHECK(device->activation_type() == element_type::f32);
  const auto memory = device->allocate(1000);
  REQUIRE(memory != nullptr);
  CHECK(reinterpret_cast<std::uintptr_t>(memory.get()) % 64 == 0);
  const auto* bytes = static_cast<const unsigned char*>(memory.get());
  CHECK(std::count(bytes, bytes + 1000, 0) == 1000);
  CHECK(device->allocate(0) != nullptr);

  const std::vector<float> host{1, 2, 3, 4, 5, 6};
  const rows_view rows{memory.get(), 2, 3, 5};
  device->copy_from_host(host.data(), rows);
  const auto* floats = static_cast<const float*>(memory.get());
  CHECK(floats[2] == 3.0F);
  CHECK(floats[3] == 0.0F);
  CHECK(floats[5] == 4.0F);
  std::vector<float> back(6);
  device->copy_to_host(rows, back.data());
  CHECK(back == host);
}

TEST_CASE("the back end says what it is, and TROUPE_CPU asks for less") {
  CHECK(std::string(make_ops("portable", 1)->description()) == "cpu (portable, 1 thread)");
  CHECK(std::string(make_ops("portable", 3)->description()) == "cpu (portable, 3 threads)");
  if (auto device = make_ops("avx2", 2)) {
    CHECK(std::string(device->description()) == "cpu (avx2, 2 threads)");
  }
}

} // namespace kernel_tests
