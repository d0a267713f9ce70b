#include "troupe/model/quantize.hpp"

#include "troupe/model/half_float.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>

namespace troupe::model {

namespace {

/// Floats that are computed at once, in registers that every machine of the kind has: the sums, and
/// so all choices, are the same on all of them.
using lanes = float __attribute__((vector_size(16)));
constexpr std::size_t kLanes = 4;
constexpr std::size_t kParts = 4; ///< registers that sum up in turn

/// Adding and taking off 1.5 * 2^23 rounds to the nearest integer, ties to even.
constexpr float kRounder = 12582912.0F;

/// Values summed up in float32 before they join a sum in double.
constexpr std::size_t kBlock = 256;

/// A choice must be better by this share to be preferred, so that sums in float32 cannot make the
/// result worse than what it is compared with.
constexpr double kClearlyLess = 1.0 - 1e-5;

constexpr float kSmallestScale = 0x1p-100F;
constexpr float kSmallestHalf = 0x1p-24F;
constexpr float kLargestHalf = 65504.0F;

/// Integers that a value divided by the scale may be rounded to.
struct code_range {
  float low = 0.0F;
  float high = 0.0F;
};

code_range range_of(int bits, std::uint8_t zero) {
  if (bits == 8)
    return {-128.0F, 127.0F};
  return {-static_cast<float>(zero), 15.0F - static_cast<float>(zero)};
}

/// The scale as it is stored.
float stored_scale(double scale, int bits) {
  if (bits == 8)
    return std::max(static_cast<float>(scale), kSmallestScale);
  const auto bounded = std::clamp(scale, double{kSmallestHalf}, double{kLargestHalf});
  return f16_value(f16_bits(static_cast<float>(bounded)));
}

float to_code(float value, float inverse, code_range codes) {
  const float clamped = std::min(std::max(value * inverse, codes.low), codes.high);
  return (clamped + kRounder) - kRounder;
}

/// Sums in lanes of several registers.
struct lane_sums {
  std::array<lanes, kParts> parts{};

  float total() const {
    const lanes all = (parts[0] + parts[2]) + (parts[1] + parts[3]);
    return (all[0] + all[2]) + (all[1] + all[3]);
  }
};

struct fit_sums {
  double error = 0.0;  ///< (value - code * scale)^2
  double cross = 0.0;  ///< value * code
  double square = 0.0; ///< code^2
};

fit_sums measure(std::span<const float> values, float scale, code_range codes) {
  fit_sums result;
  const float inverse = 1.0F / scale;
  const lanes lowest = lanes{} + codes.low;
  const lanes highest = lanes{} + codes.high;
  for (std::size_t begin = 0; begin < values.size(); begin += kBlock) {
    const auto end = std::min(values.size(), begin + kBlock);
    lane_sums error, cross, square;
    for (auto i = begin; i < end; i += kLanes * kParts)
      for (std::size_t part = 0; part < kParts; ++part) {
        const auto at = i + part * kLanes;
        lanes value{};
        if (at + kLanes <= end)
          std::memcpy(&value, values.data() + at, sizeof value);
        else if (at < end)
          std::memcpy(&value, values.data() + at, (end - at) * sizeof(float)); // zeros add nothing
        lanes code = value * inverse;
        code = code > lowest ? code : lowest;
        code = code < highest ? code : highest;
        code = (code + kRounder) - kRounder;
        const lanes distance = value - code * scale;
        error.parts[part] += distance * distance;
        cross.parts[part] += value * code;
        square.parts[part] += code * code;
      }
    result.error += double{error.total()};
    result.cross += double{cross.total()};
    result.square += double{square.total()};
  }
  return result;
}

/// The ends of the values, with 0 between them.
struct value_range {
  double low = 0.0;
  double high = 0.0;
};

value_range range_of(std::span<const float> values) {
  value_range result;
  for (const float value : values) {
    result.low = std::min(result.low, double{value});
    result.high = std::max(result.high, double{value});
  }
  return result;
}

/// One group on its way to the best rounding.
class group_search {
public:
  group_search(std::span<const float> values, int bits)
    : values_(values), bits_(bits), range_(range_of(values)) {
    if (bits == 8) {
      range_.high = std::max(range_.high, -range_.low);
      range_.low = -range_.high;
    }
    if (range_.high > range_.low)
      try_range(range_);
    else
      best_.squared_error = 0.0; // all zero: any scale will do
  }

  bool is_exact() const { return best_.squared_error == 0.0; }
  const group_rounding& best() const { return best_; }

  /// Values that are integers times some scale, with fewer steps than the codes have.
  void try_few_steps() {
    const double widest = bits_ == 8 ? range_.high : range_.high - range_.low;
    for (int steps = bits_ == 8 ? 128 : 14; steps > 0 && !is_exact(); --steps) {
      const float scale = stored_scale(widest / steps, bits_);
      if (holds_all(scale))
        take(scale, zero_of(range_.low, scale));
    }
  }

  void clip() {
    constexpr int max_steps = 24;
    constexpr int patience = 4;
    int in_vain = 0;
    for (int step = 1; step <= max_steps && in_vain < patience; ++step) {
      const double share = 1.0 - 0.025 * step;
      in_vain = try_range({range_.low * share, range_.high * share}) ? 0 : in_vain + 1;
    }
  }

  /// Each end of the best range so far moved alone.
  void move_ends() {
    for (const double step : {0.06, 0.03, 0.015})
      for (const auto& [low, high] : {std::pair{1.0 - step, 1.0}, std::pair{1.0 + step, 1.0},
                                      std::pair{1.0, 1.0 - step}, std::pair{1.0, 1.0 + step}})
        try_range({chosen_.low * low, chosen_.high * high});
  }

  void move_zero() {
    const int zero = best_.zero;
    for (const int other : {zero - 1, zero + 1})
      if (other >= 0 && other <= 15)
        take(best_.scale, static_cast<std::uint8_t>(other));
  }

  /// The scale that suits the codes best, then the codes that suit the scale, and so on.
  void settle() {
    for (int round = 0; round < 6; ++round)
      if (!(sums_.square > 0.0) || !(sums_.cross > 0.0)
          || !take(stored_scale(sums_.cross / sums_.square, bits_), best_.zero))
        return;
  }

private:
  std::uint8_t zero_of(double low, float scale) const {
    return bits_ == 8 ? 0
                      : static_cast<std::uint8_t>(
                        std::clamp(std::nearbyint(-low / double{scale}), 0.0, 15.0));
  }

  bool try_range(value_range range) {
    const double steps = bits_ == 8 ? 254.0 : 15.0;
    const float scale = stored_scale((range.high - range.low) / steps, bits_);
    if (!take(scale, zero_of(range.low, scale)))
      return false;
    chosen_ = range;
    return true;
  }

  /// Measures a choice and keeps it if it is better.
  bool take(float scale, std::uint8_t zero) {
    const auto sums = measure(values_, scale, model::range_of(bits_, zero));
    if (is_known_ && !(sums.error < best_.squared_error * kClearlyLess))
      return false;
    is_known_ = true;
    best_ = {scale, zero, sums.error};
    sums_ = sums;
    return true;
  }

  bool holds_all(float scale) const {
    const auto codes = model::range_of(bits_, zero_of(range_.low, scale));
    return std::all_of(values_.begin(), values_.end(), [&](float value) {
      const float code = (value / scale + kRounder) - kRounder;
      return code >= codes.low && code <= codes.high && code * scale == value;
    });
  }

  std::span<const float> values_;
  int bits_;
  value_range range_;
  value_range chosen_;
  bool is_known_ = false;
  group_rounding best_;
  fit_sums sums_;
};

} // namespace

group_rounding fit_range(std::span<const float> values, int bits) {
  return group_search(values, bits).best();
}

group_rounding fit_least_squares(std::span<const float> values, int bits) {
  group_search search(values, bits);
  if (!search.is_exact())
    search.try_few_steps();
  if (search.is_exact())
    return search.best();
  search.clip();
  if (bits == 4)
    search.move_ends();
  search.settle();
  if (bits == 4) {
    search.move_zero();
    search.settle();
  }
  return search.best();
}

void encode(std::span<const float> values, const group_rounding& how, int bits,
            std::span<std::uint8_t> codes) {
  const float inverse = 1.0F / how.scale;
  const auto range = range_of(bits, how.zero);
  for (std::size_t i = 0; i < values.size(); ++i)
    codes[i] = static_cast<std::uint8_t>(static_cast<int>(to_code(values[i], inverse, range))
                                         + (bits == 8 ? 0 : how.zero));
}

float decode(std::uint8_t code, const group_rounding& how, int bits) {
  const int steps = bits == 8 ? std::bit_cast<std::int8_t>(code) : int{code} - how.zero;
  return static_cast<float>(steps) * how.scale;
}

double rounding_loss::relative_rms() const {
  return squared_sum > 0.0 ? std::sqrt(squared_error / squared_sum) : 0.0;
}

void rounding_loss::add(const rounding_loss& other) {
  squared_error += other.squared_error;
  squared_sum += other.squared_sum;
  num_elements += other.num_elements;
  if (other.worst > worst) {
    worst = other.worst;
    worst_row = other.worst_row;
    worst_col = other.worst_col;
  }
}

integer_rows make_integer_rows(const integer_format& format, std::int32_t num_rows,
                               std::int32_t num_cols) {
  integer_rows result{format, num_rows, num_cols, {}, {}, {}, {}};
  const auto groups = static_cast<std::size_t>(num_rows) * format.num_groups(num_cols);
  result.codes.resize(static_cast<std::size_t>(num_rows) * num_cols);
  result.scales.resize(groups);
  if (format.bits == 4)
    result.zeros.resize(groups);
  return result;
}

std::optional<std::size_t> quantize_rows(std::span<const float> values, std::int32_t first_row,
                                         integer_rows& out) {
  const auto bad = std::find_if_not(values.begin(), values.end(),
                                    [](float value) { return std::isfinite(value); });
  if (bad != values.end())
    return static_cast<std::size_t>(bad - values.begin());
  const auto cols = static_cast<std::size_t>(out.num_cols);
  const auto bits = out.format.bits;
  const auto groups = static_cast<std::size_t>(out.format.num_groups(out.num_cols));
  const auto size =
    out.format.group_size > 0 ? static_cast<std::size_t>(out.format.group_size) : cols;
  auto& loss = out.loss;
  for (std::size_t local = 0; local * cols < values.size(); ++local) {
    const auto row = first_row + local;
    for (std::size_t group = 0; group < groups; ++group) {
      const auto begin = group * size;
      const auto part = values.subspan(local * cols + begin, std::min(size, cols - begin));
      const std::span codes(out.codes.data() + row * cols + begin, part.size());
      const auto how = fit_least_squares(part, bits);
      encode(part, how, bits, codes);
      out.scales[row * groups + group] = how.scale;
      if (bits == 4)
        out.zeros[row * groups + group] = how.zero;
      for (std::size_t i = 0; i < part.size(); ++i) {
        const double value = part[i];
        const double distance = std::abs(double{decode(codes[i], how, bits)} - value);
        loss.squared_error += distance * distance;
        loss.squared_sum += value * value;
        if (distance > loss.worst) {
          loss.worst = distance;
          loss.worst_row = static_cast<std::int64_t>(row);
          loss.worst_col = static_cast<std::int64_t>(begin + i);
        }
      }
    }
  }
  loss.num_elements += values.size();
  return std::nullopt;
}

} // namespace troupe::model
