#include "troupe/model/quantize.hpp"

#include "troupe/model/half_float.hpp"
#include "troupe/model/integer_packing.hpp"
#include "troupe/model/stored_weight.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include <catch2/catch.hpp>

using namespace troupe;
using namespace troupe::model;

namespace {

using engine = std::mt19937;

/// Squared distance of a group from what its codes stand for, in double.
double true_error(const std::vector<float>& values, const group_rounding& how, int bits) {
  std::vector<std::uint8_t> codes(values.size());
  encode(values, how, bits, codes);
  double sum = 0.0;
  for (std::size_t i = 0; i < values.size(); ++i)
    sum += std::pow(double{decode(codes[i], how, bits)} - values[i], 2);
  return sum;
}

/// Rounding to the nearest with the scale of the range, worked out apart from the code that is
/// tested: codes 0 to 15 from the smallest to the largest value, or -127 to 127.
double error_of_range(const std::vector<float>& values, int bits) {
  const double low = std::min(0.0F, *std::min_element(values.begin(), values.end()));
  const double high = std::max(0.0F, *std::max_element(values.begin(), values.end()));
  if (low == high)
    return 0.0;
  const double widest = bits == 8 ? std::max(high, -low) / 127.0 : (high - low) / 15.0;
  const double scale =
    bits == 8 ? static_cast<float>(widest) : f16_value(f16_bits(static_cast<float>(widest)));
  const double zero = bits == 8 ? 0.0 : std::clamp(std::nearbyint(-low / scale), 0.0, 15.0);
  double sum = 0.0;
  for (const double value : values) {
    const double code = bits == 8 ? std::clamp(std::nearbyint(value / scale), -128.0, 127.0)
                                  : std::clamp(std::nearbyint(value / scale) + zero, 0.0, 15.0);
    // Weights are expanded in float32.
    const auto expanded = static_cast<float>(code - zero) * static_cast<float>(scale);
    sum += std::pow(double{expanded} - value, 2);
  }
  return sum;
}

/// Values of many kinds: bell-shaped, even, with outliers, of one sign, huge and tiny.
std::vector<float> draw_group(engine& random, std::size_t size) {
  std::vector<float> values(size);
  std::normal_distribution<float> bell(0.0F, 0.02F);
  std::uniform_real_distribution<float> even(-0.1F, 0.1F);
  const auto kind = random() % 8;
  for (auto& value : values)
    value = kind % 2 == 0 ? bell(random) : even(random);
  switch (kind) {
  case 2: values[random() % size] *= 40.0F; break;
  case 3:
    for (auto& value : values)
      value = std::abs(value) + 0.3F;
    break;
  case 4:
    for (auto& value : values)
      value = -std::abs(value);
    break;
  case 5:
    for (auto& value : values)
      value *= std::ldexp(1.0F, static_cast<int>(random() % 30) - 20);
    break;
  case 6:
    for (auto& value : values)
      value = random() % 3 == 0 ? value : 0.0F;
    break;
  default: break;
  }
  return values;
}

} // namespace

TEST_CASE("half precision: every finite value comes back, ties go to the even one") {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    if ((bits >> 10 & 0x1f) == 0x1f)
      continue;
    CHECK(f16_bits(f16_value(static_cast<std::uint16_t>(bits))) == bits);
    if (bits < 0x7bff) {
      const float here = f16_value(static_cast<std::uint16_t>(bits));
      const float next = f16_value(static_cast<std::uint16_t>(bits + 1));
      const float middle = here + (next - here) / 2;
      CHECK(f16_bits(middle) == (bits % 2 == 0 ? bits : bits + 1));
      CHECK(f16_bits(std::nextafter(middle, next)) == bits + 1);
    }
  }
  CHECK(f16_bits(65519.0F) == 0x7bff);
  CHECK(f16_bits(65520.0F) == 0x7c00);
  CHECK(f16_bits(-1e9F) == 0xfc00);
  CHECK(f16_bits(std::numeric_limits<float>::infinity()) == 0x7c00);
  CHECK((f16_bits(std::nanf("")) & 0x7fff) > 0x7c00);
}

TEST_CASE("a group is never rounded worse than by its range, and usually better") {
  const int bits = GENERATE(4, 8);
  engine random(static_cast<unsigned>(bits));
  int num_better = 0;
  constexpr int rounds = 4000;
  for (int round = 0; round < rounds; ++round) {
    const auto values = draw_group(random, 1 + random() % 200);
    INFO("bits " << bits << ", round " << round);
    const auto found = fit_least_squares(values, bits);
    const double error = true_error(values, found, bits);
    const double plain = error_of_range(values, bits);
    REQUIRE(error <= plain * (1 + 1e-6));
    num_better += error < plain * 0.98 ? 1 : 0;
    const double told = found.squared_error;
    REQUIRE(told == Approx(error).epsilon(1e-3).margin(1e-20));
  }
  CHECK(num_better > rounds / 4);
}

TEST_CASE("the search comes near the best of a thousand scales") {
  engine random(5);
  std::normal_distribution<float> bell(0.0F, 0.02F);
  double found = 0.0;
  double best = 0.0;
  for (int round = 0; round < 40; ++round) {
    std::vector<float> values(128);
    for (auto& value : values)
      value = bell(random);
    found += true_error(values, fit_least_squares(values, 4), 4);
    const auto range = fit_range(values, 4);
    double least = std::numeric_limits<double>::infinity();
    for (int step = 0; step <= 1000; ++step)
      for (int zero = range.zero - 2; zero <= range.zero + 2; ++zero)
        if (zero >= 0 && zero <= 15) {
          const float scale = range.scale * (0.5F + 0.0006F * static_cast<float>(step));
          least = std::min(
            least, true_error(values,
                              {f16_value(f16_bits(scale)), static_cast<std::uint8_t>(zero), 0}, 4));
        }
    best += least;
  }
  CHECK(found < 1.02 * best);
}

TEST_CASE("what the format can hold comes out exactly") {
  const int bits = GENERATE(4, 8);
  engine random(17);
  for (int round = 0; round < 500; ++round) {
    INFO("bits " << bits << ", round " << round);
    // Some groups use all codes, others a few neighbouring ones.
    const int lowest = bits == 8 ? -128 : 0;
    const int used = 1 + static_cast<int>(random() % (bits == 8 ? 256 : 16));
    const int first = lowest + static_cast<int>(random() % (bits == 8 ? 257 - used : 17 - used));
    const int zero = bits == 8 ? 0 : static_cast<int>(random() % 16);
    const float scale = f16_value(static_cast<std::uint16_t>(0x1000 + random() % 0x3000));
    std::vector<float> values(64);
    for (auto& value : values)
      value = static_cast<float>(first + static_cast<int>(random() % used) - zero) * scale;
    // The codes must lie about 0 as the format has them.
    const auto [low, high] = std::minmax_element(values.begin(), values.end());
    const float steps = (std::max(*high, 0.0F) - std::min(*low, 0.0F)) / scale;
    if (bits == 4 && steps > 15.0F)
      continue;
    CHECK(true_error(values, fit_least_squares(values, bits), bits) == 0.0);
  }
}

TEST_CASE("groups of zeros, of one value, with one outlier, of one element") {
  const int bits = GENERATE(4, 8);
  INFO("bits " << bits);
  const auto relative = [&](const std::vector<float>& values) {
    double sum = 0.0;
    for (const double value : values)
      sum += value * value;
    const auto found = fit_least_squares(values, bits);
    CHECK(std::isfinite(found.scale));
    CHECK(found.scale > 0.0F);
    return sum > 0.0 ? std::sqrt(true_error(values, found, bits) / sum)
                     : true_error(values, found, bits);
  };
  CHECK(relative(std::vector<float>(128, 0.0F)) == 0.0);
  CHECK(relative(std::vector<float>(128, -0.0F)) == 0.0);
  for (const float value : {1.0F, -1.0F, 0.3F, -7.77F, 1e-3F})
    CHECK(relative(std::vector<float>(128, value)) < 5e-4); // what the scale is rounded by
  CHECK(relative({0.1234F}) < 5e-4);
  std::vector<float> outlier(128, 0.0F);
  outlier[77] = -12.5F;
  CHECK(relative(outlier) == 0.0);
  engine random(3);
  std::normal_distribution<float> bell(0.0F, 0.01F);
  for (auto& value : outlier)
    value = bell(random);
  outlier[5] = 0.2F;
  CHECK(relative(outlier) < (bits == 8 ? 0.03 : 0.25));
  // Denormal and huge values neither divide by zero nor become something else than numbers.
  CHECK(relative(std::vector<float>(64, 1e-42F)) <= 1.0);
  for (const float huge : {1e30F, -3e38F}) {
    std::vector<float> values(64, 1.0F);
    values[3] = huge;
    const auto found = fit_least_squares(values, bits);
    CHECK(std::isfinite(found.scale));
    std::vector<std::uint8_t> codes(values.size());
    encode(values, found, bits, codes);
    CHECK(std::isfinite(decode(codes[3], found, bits)));
  }
}

TEST_CASE("rows are cut into groups, the last of them ragged, and slices make the same bits") {
  const auto format = GENERATE(integer_format{4, 64}, integer_format{4, 128}, integer_format{8, 0},
                               integer_format{8, 64});
  constexpr std::int32_t rows = 24, cols = 300;
  engine random(9);
  std::vector<float> values(rows * cols);
  std::normal_distribution<float> bell(0.0F, 0.02F);
  for (auto& value : values)
    value = bell(random);
  auto whole = make_integer_rows(format, rows, cols);
  REQUIRE_FALSE(quantize_rows(values, 0, whole));
  auto sliced = make_integer_rows(format, rows, cols);
  for (const auto& [first, count] : {std::pair{8, 3}, std::pair{0, 8}, std::pair{11, 13}})
    REQUIRE_FALSE(quantize_rows(
      {values.data() + first * cols, static_cast<std::size_t>(count) * cols}, first, sliced));
  CHECK(whole.codes == sliced.codes);
  CHECK(whole.scales == sliced.scales);
  CHECK(whole.zeros == sliced.zeros);
  CHECK(whole.loss.squared_error == Approx(sliced.loss.squared_error));
  CHECK(whole.loss.worst == sliced.loss.worst);
  CHECK(whole.loss.worst_row == sliced.loss.worst_row);
  CHECK(whole.loss.worst_col == sliced.loss.worst_col);
  CHECK(whole.loss.num_elements == values.size());

  const auto groups = format.num_groups(cols);
  CHECK(groups == (format.group_size == 0 ? 1 : format.group_size == 64 ? 5 : 3));
  const auto size = format.group_size == 0 ? cols : format.group_size;
  double error = 0.0, worst = 0.0;
  for (std::int32_t row = 0; row < rows; ++row)
    for (std::int32_t col = 0; col < cols; ++col) {
      const auto at = static_cast<std::size_t>(row * groups + col / size);
      const group_rounding how{whole.scales[at],
                               format.bits == 4 ? whole.zeros[at] : std::uint8_t{0}, 0.0};
      const double distance = std::abs(
        double{decode(whole.codes[row * cols + col], how, format.bits)} - values[row * cols + col]);
      error += distance * distance;
      worst = std::max(worst, distance);
    }
  CHECK(whole.loss.squared_error == Approx(error));
  CHECK(whole.loss.worst == worst);
}

TEST_CASE("values that are not finite are refused with their place") {
  const auto format = GENERATE(integer_format{4, 64}, integer_format{8, 0});
  for (const float bad : {std::nanf(""), std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity()}) {
    std::vector<float> values(4 * 64, 0.5F);
    values[130] = bad;
    auto rows = make_integer_rows(format, 4, 64);
    const auto found = quantize_rows(values, 0, rows);
    REQUIRE(found);
    CHECK(*found == 130);
  }
}

TEST_CASE("AWQ's words are packed as they are unpacked") {
  engine random(21);
  for (const auto& [rows, cols] :
       {std::pair{8, 1}, std::pair{16, 3}, std::pair{40, 130}, std::pair{64, 64}}) {
    std::vector<std::uint8_t> codes(static_cast<std::size_t>(rows) * cols);
    for (auto& code : codes)
      code = static_cast<std::uint8_t>(random() % 16);
    const auto words = pack_awq(codes, rows, cols);
    REQUIRE(words.size() == codes.size() / 2);
    CHECK(unpack_awq_zeros(words.data(), rows, cols) == codes);
    const auto bytes = unpack_awq(words.data(), rows, cols);
    const auto row_bytes = (cols + 1) / 2;
    for (int row = 0; row < rows; ++row)
      for (int col = 0; col < cols; ++col)
        CHECK((std::to_integer<int>(bytes[row * row_bytes + col / 2]) >> (col % 2 * 4) & 15)
              == codes[row * cols + col]);
  }
  // The order of AutoAWQ's from_linear, by hand: rows 0, 2, 4, 6, 1, 3, 5, 7 from the low bits on.
  const std::vector<std::uint8_t> column{0, 1, 2, 3, 4, 5, 6, 7};
  const auto word = pack_awq(column, 8, 1);
  CHECK(std::to_integer<int>(word[0]) == 0x20);
  CHECK(std::to_integer<int>(word[1]) == 0x64);
  CHECK(std::to_integer<int>(word[2]) == 0x31);
  CHECK(std::to_integer<int>(word[3]) == 0x75);
}
