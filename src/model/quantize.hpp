#pragma once

#include "troupe/base/error.hpp"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

/// Rounds matrices to integers with a scale, and for 4 bits a zero point, for each group of columns
/// of a row. Pure arithmetic: the same bits on every machine.
namespace troupe::model {

/// What weights are rounded to.
///
/// | bits | an element stands for       | codes       | scales                       |
/// |------|-----------------------------|-------------|------------------------------|
/// | 8    | code * scale                | -128 to 127 | float32                      |
/// | 4    | (code - zero point) * scale | 0 to 15     | of half precision, as float32|
struct integer_format {
  int bits = 8;
  std::int32_t group_size = 0; ///< columns that share a scale; 0: a whole row

  /// Groups of a row. The last is smaller where the size does not divide the columns.
  std::int32_t num_groups(std::int32_t num_cols) const {
    return group_size > 0 ? (num_cols + group_size - 1) / group_size : 1;
  }

  bool operator==(const integer_format&) const = default;
};

/// How one group is rounded.
struct group_rounding {
  float scale = 1.0F;
  std::uint8_t zero = 0;      ///< 4 bits only
  double squared_error = 0.0; ///< summed over the group

  bool operator==(const group_rounding&) const = default;
};

/// The usual choice: the scale that spreads the codes from the smallest to the largest value, or
/// for 8 bits to the largest magnitude. Values must be finite.
group_rounding fit_range(std::span<const float> values, int bits);

/// The scale and zero point with the least squared error among those tried, never worse than
/// fit_range: ranges clipped step by step (as Quantizer.find_params of GPTQ, arXiv 2210.17323, and
/// the weight clipping of AWQ, arXiv 2306.00978), the best of them widened and narrowed at each
/// end alone, neighbouring zero points, and the least-squares scale for the codes found so far
/// (in turn with rounding, as in Lloyd's method, IEEE Trans. Inf. Theory 28, 1982). Values that the
/// format can hold come out exactly.
group_rounding fit_least_squares(std::span<const float> values, int bits);

/// Rounds a group; `codes` has a byte for each value, signed for 8 bits.
void encode(std::span<const float> values, const group_rounding& how, int bits,
            std::span<std::uint8_t> codes);

/// The value that a code stands for.
float decode(std::uint8_t code, const group_rounding& how, int bits);

/// What rounding did to a matrix or to several.
struct rounding_loss {
  double squared_error = 0.0;
  double squared_sum = 0.0; ///< of the values before
  double worst = 0.0;       ///< largest distance of one element
  std::int64_t worst_row = 0;
  std::int64_t worst_col = 0;
  std::uint64_t num_elements = 0;

  /// Root of the mean squared error over that of the values; 0 where all values are 0.
  double relative_rms() const;

  void add(const rounding_loss& other);
};

/// Rows of integers: whole matrices or slices of them.
struct integer_rows {
  integer_format format;
  std::int32_t num_rows = 0;
  std::int32_t num_cols = 0;
  std::vector<std::uint8_t> codes; ///< [rows, cols], a byte each, signed for 8 bits
  std::vector<float> scales;       ///< [rows, groups]
  std::vector<std::uint8_t> zeros; ///< [rows, groups], 4 bits only
  rounding_loss loss;
};

/// Zeroed rows, to be filled by quantize_rows.
integer_rows make_integer_rows(const integer_format& format, std::int32_t num_rows,
                               std::int32_t num_cols);

/// Rounds values [rows, cols] into rows first_row and after of `out`. Returns the index of the
/// first value that is not finite, if there is one; nothing is promised of `out` then.
std::optional<std::size_t> quantize_rows(std::span<const float> values, std::int32_t first_row,
                                         integer_rows& out);

} // namespace troupe::model
