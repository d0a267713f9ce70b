#include "troupe/model/stored_weight.hpp"

#include "troupe/model/integer_packing.hpp"
#include "troupe/model/ordered_groups.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace troupe::model {

namespace {

using kernels::element_type;

float half_to_float(std::uint16_t bits) {
  const bool negative = (bits & 0x8000U) != 0;
  const int exponent = bits >> 10 & 0x1f;
  const int mantissa = bits & 0x3ff;
  float value = 0.0F;
  if (exponent == 0x1f)
    value = mantissa == 0 ? std::numeric_limits<float>::infinity()
                          : std::numeric_limits<float>::quiet_NaN();
  else if (exponent == 0)
    value = std::ldexp(static_cast<float>(mantissa), -24);
  else
    value = std::ldexp(static_cast<float>(mantissa | 0x400), exponent - 25);
  return negative ? -value : value;
}

float f8_to_float(std::uint8_t bits) {
  const bool negative = (bits & 0x80U) != 0;
  const int exponent = bits >> 3 & 0xf;
  const int mantissa = bits & 0x7;
  float value = 0.0F;
  if (exponent == 0xf && mantissa == 0x7)
    value = std::numeric_limits<float>::quiet_NaN();
  else if (exponent == 0)
    value = std::ldexp(static_cast<float>(mantissa), -9);
  else
    value = std::ldexp(static_cast<float>(mantissa | 0x8), exponent - 10);
  return negative ? -value : value;
}

const std::array<float, 256>& f8_table() {
  static const auto table = [] {
    std::array<float, 256> values{};
    for (int i = 0; i < 256; ++i)
      values[i] = f8_to_float(static_cast<std::uint8_t>(i));
    return values;
  }();
  return table;
}

/// 2^(bits - 127), all ones NaN (OCP Microscaling specification 1.0, E8M0).
float e8m0_to_float(std::uint8_t bits) {
  return bits == 0xff ? std::numeric_limits<float>::quiet_NaN()
                      : std::ldexp(1.0F, static_cast<int>(bits) - 127);
}

template <class T>
T load(const std::byte* data, std::size_t index) {
  T value;
  std::memcpy(&value, data + index * sizeof(T), sizeof(T));
  return value;
}

std::int32_t ceil_div(std::int32_t a, std::int32_t b) {
  return (a + b - 1) / b;
}

tl::unexpected<error> wrong(const tensor_source& source, const std::string& tensor,
                            const std::string& what, std::string cure) {
  return fail(error_code::invalid_model,
              fmt::format("{}: tensor \"{}\" {}", source.file_of(tensor), tensor, what),
              std::move(cure));
}

/// A tensor of exactly this shape.
expected<tensor_view> find_shaped(tensor_source& source, const std::string& name,
                                  std::initializer_list<std::int64_t> shape) {
  auto view = source.tensor(name);
  if (!view)
    return view;
  if (!std::equal(view->shape.begin(), view->shape.end(), shape.begin(), shape.end()))
    return wrong(source, name,
                 fmt::format("has shape [{}], but config.json makes it [{}]",
                             fmt::join(view->shape, ", "), fmt::join(shape, ", ")),
                 "config.json and weights belong to different models");
  return view;
}

/// A tensor of packed integers of exactly this shape.
expected<tensor_view> find_packed(tensor_source& source, const std::string& name,
                                  std::initializer_list<std::int64_t> shape) {
  auto view = find_shaped(source, name, shape);
  if (view && view->dtype != "I32")
    return wrong(source, name, fmt::format("has dtype {}", view->dtype),
                 "packed integers must be I32");
  return view;
}

bool is_float(const tensor_view& view) {
  return view.type && *view.type != element_type::i8;
}

/// Reads one matrix, whichever way it is stored.
class weight_finder {
public:
  weight_finder(tensor_source& source, const model_config& config, const std::string& name,
                std::int32_t num_rows, std::int32_t num_cols, weight_loading how)
    : source_(source),
      config_(config),
      name_(name),
      stem_(name.substr(0, name.size() - std::string_view("weight").size())),
      how_(how) {
    out_.num_rows = num_rows;
    out_.num_cols = num_cols;
  }

  expected<stored_weight> find() {
    if (auto made = how_ == weight_loading::recipe ? source_.recipe(name_) : std::nullopt)
      return take_recipe(*made);
    auto ok = source_.contains(name_)                     ? read_plain()
              : source_.contains(stem_ + "weight_packed") ? read_compressed()
              : source_.contains(stem_ + "qweight")       ? read_quantised()
                                                          : read_plain(); // says what is missing
    if (!ok)
      return tl::unexpected(std::move(ok.error()));
    return std::move(out_);
  }

private:
  void count(const tensor_view& view) {
    ++out_.num_tensors;
    out_.num_bytes += view.num_bytes;
  }

  expected<stored_weight> take_recipe(const made_tensor& made) {
    const auto& recipe = made.recipe;
    if (recipe.num_rows != out_.num_rows || recipe.num_cols != out_.num_cols)
      return wrong(source_, name_,
                   fmt::format("is made of shape [{}, {}], but [{}, {}] is asked for",
                               recipe.num_rows, recipe.num_cols, out_.num_rows, out_.num_cols),
                   "");
    out_.type = made.type;
    if (recipe.block_rows > 0) {
      out_.block_rows = recipe.block_rows;
      out_.block_cols = recipe.block_cols;
    }
    out_.recipe = recipe;
    out_.num_tensors = made.num_tensors;
    out_.num_bytes = made.num_bytes;
    return std::move(out_);
  }

  expected<void> read_plain() {
    auto view = find_tensor(source_, name_, {out_.num_rows, out_.num_cols});
    if (!view)
      return tl::unexpected(std::move(view.error()));
    count(*view);
    out_.type = *view->type;
    out_.data = view->data;
    if (out_.type == element_type::f8_e4m3 || out_.type == element_type::i8)
      return source_.contains(name_ + "_scale") ? read_scales() : read_block_scales();
    return {};
  }

  /// `<name>_scale_inv` is a multiplier, in spite of its name.
  expected<void> read_block_scales() {
    if (!config_.fp8)
      return wrong(source_, name_,
                   fmt::format("is {}, but config.json has no quantization_config that says how",
                               out_.type == element_type::i8 ? "I8" : "F8_E4M3"),
                   "add quantization_config with quant_method fp8 and weight_block_size");
    out_.block_rows = config_.fp8->block_rows;
    out_.block_cols = config_.fp8->block_cols;
    const auto scale_name = name_ + "_scale_inv";
    auto view = find_shaped(
      source_, scale_name,
      {ceil_div(out_.num_rows, out_.block_rows), ceil_div(out_.num_cols, out_.block_cols)});
    if (!view)
      return tl::unexpected(std::move(view.error()));
    return take_scales(scale_name, *view);
  }

  /// `<name>_scale`: of the tensor, of channels (rows of the matrix) or of groups of columns.
  expected<void> read_scales() {
    const auto scale_name = name_ + "_scale";
    auto view = source_.tensor(scale_name);
    if (!view)
      return tl::unexpected(std::move(view.error()));
    const auto shape = view->shape;
    std::int64_t count = 1;
    for (const auto dim : shape)
      count *= dim;
    const std::int64_t groups = shape.size() == 2 ? shape[1] : 1;
    out_.block_rows = 1;
    if (count == 1) {
      out_.block_rows = out_.num_rows;
      out_.block_cols = out_.num_cols;
    } else if (!shape.empty() && shape[0] == out_.num_rows && groups > 0
               && out_.num_cols % groups == 0 && count == out_.num_rows * groups) {
      out_.block_cols = static_cast<std::int32_t>(out_.num_cols / groups);
    } else if (config_.fp8 && shape.size() == 2
               && shape[0] == ceil_div(out_.num_rows, config_.fp8->block_rows)
               && shape[1] == ceil_div(out_.num_cols, config_.fp8->block_cols)) {
      out_.block_rows = config_.fp8->block_rows;
      out_.block_cols = config_.fp8->block_cols;
    } else {
      return wrong(source_, scale_name,
                   fmt::format("has shape [{}], which does not go with a weight of [{}, {}]",
                               fmt::join(shape, ", "), out_.num_rows, out_.num_cols),
                   "scales are of the tensor, of its rows or of equal groups of its columns");
    }
    if (auto ok = refuse_zero_points(stem_ + "weight_zero_point"); !ok)
      return ok;
    return take_scales(scale_name, *view);
  }

  /// Zero points of 8-bit weights must be 0.
  expected<void> refuse_zero_points(const std::string& zero_name) {
    if (!source_.contains(zero_name))
      return {};
    auto view = source_.tensor(zero_name);
    if (!view)
      return tl::unexpected(std::move(view.error()));
    count(*view);
    if (std::any_of(view->data, view->data + view->num_bytes,
                    [](std::byte one) { return one != std::byte{0}; }))
      return wrong(source_, zero_name, "holds zero points other than 0",
                   "8-bit weights are supported where they are symmetric");
    return {};
  }

  expected<void> take_scales(const std::string& scale_name, const tensor_view& view) {
    auto values = read_finite(source_, scale_name, view);
    if (!values)
      return tl::unexpected(std::move(values.error()));
    count(view);
    const bool is_aligned = reinterpret_cast<std::uintptr_t>(view.data) % alignof(float) == 0;
    if (view.type == element_type::f32 && is_aligned)
      out_.mapped_scales = reinterpret_cast<const float*>(view.data);
    else
      out_.scales = std::move(*values);
    return {};
  }

  /// compressed-tensors "pack-quantized" (pack_to_int32 of its pack_quantized/helpers.py): offset
  /// integers in ascending order from the low bits, weights along columns, zero points along rows.
  expected<void> read_compressed() {
    const auto packed_name = stem_ + "weight_packed";
    auto raw = source_.tensor(packed_name);
    if (!raw)
      return tl::unexpected(std::move(raw.error()));
    const bool is_8_bit = raw->shape.size() == 2 && raw->shape[1] == ceil_div(out_.num_cols, 4);
    auto view =
      find_packed(source_, packed_name, {out_.num_rows, ceil_div(out_.num_cols, is_8_bit ? 4 : 8)});
    if (!view)
      return tl::unexpected(std::move(view.error()));
    count(*view);
    if (auto ok = read_scales_of_packed(); !ok)
      return ok;
    if (auto ok = read_order(stem_ + "weight_g_idx"); !ok)
      return ok;
    const auto groups = ceil_div(out_.num_cols, out_.block_cols);
    const auto zero_name = stem_ + "weight_zero_point";
    std::optional<tensor_view> zeros;
    if (source_.contains(zero_name)) {
      auto found = find_packed(source_, zero_name, {ceil_div(out_.num_rows, 8), groups});
      if (!found || is_8_bit)
        return !found ? tl::unexpected(std::move(found.error()))
                      : wrong(source_, zero_name, "holds zero points",
                              "8-bit weights are supported where they are symmetric");
      count(*found);
      zeros = *found;
    }
    out_.type = is_8_bit ? element_type::i8 : element_type::i4;
    if (how_ == weight_loading::check)
      return {};
    out_.repacked = unpack_rows(view->data, is_8_bit ? 8 : 4, out_.num_rows, out_.num_cols);
    if (zeros)
      out_.zeros = unpack_zeros_by_rows(zeros->data, out_.num_rows, groups);
    apply_order();
    return {};
  }

  expected<void> read_scales_of_packed() {
    // Zero points of this format are packed and read apart.
    const auto scale_name = stem_ + "weight_scale";
    auto view = source_.tensor(scale_name);
    if (!view)
      return tl::unexpected(std::move(view.error()));
    const std::int64_t groups = view->shape.size() == 2 ? view->shape[1] : 0;
    if (groups < 1 || view->shape[0] != out_.num_rows || out_.num_cols % groups != 0)
      return wrong(source_, scale_name,
                   fmt::format("has shape [{}], which does not go with a weight of [{}, {}]",
                               fmt::join(view->shape, ", "), out_.num_rows, out_.num_cols),
                   "scales are of rows or of equal groups of columns");
    out_.block_rows = 1;
    out_.block_cols = static_cast<std::int32_t>(out_.num_cols / groups);
    scale_type_ = view->type.value_or(element_type::f32);
    return take_scales(scale_name, *view);
  }

  /// AWQ's GEMM layout (WQLinear_GEMM of AutoAWQ) and GPTQ's (QuantLinear of AutoGPTQ): weights,
  /// zero points and scales lie transposed, [in, out].
  expected<void> read_quantised() {
    const auto weight_name = stem_ + "qweight";
    if (!config_.packed)
      return wrong(source_, weight_name,
                   "is packed, but config.json has no quantization_config that says how",
                   "add quantization_config with quant_method awq or gptq");
    const auto& how = *config_.packed;
    const auto a_word = 32 / how.bits;
    const auto rows = out_.num_rows;
    const auto cols = out_.num_cols;
    out_.block_rows = 1;
    out_.block_cols = how.group_size > 0 ? std::min(how.group_size, cols) : cols;
    const auto groups = ceil_div(cols, out_.block_cols);
    const bool is_awq = how.layout == packed_layout::awq;
    if (rows % a_word != 0 || (!is_awq && cols % a_word != 0))
      return wrong(source_, weight_name,
                   fmt::format("stands for a weight of [{}, {}], which does not fill words of {}",
                               rows, cols, a_word),
                   "config.json and weights belong to different models");
    auto weight = is_awq ? find_packed(source_, weight_name, {cols, rows / a_word})
                         : find_packed(source_, weight_name, {cols / a_word, rows});
    if (!weight)
      return tl::unexpected(std::move(weight.error()));
    auto zeros = find_packed(source_, stem_ + "qzeros", {groups, rows / a_word});
    if (!zeros)
      return tl::unexpected(std::move(zeros.error()));
    auto scales = find_shaped(source_, stem_ + "scales", {groups, rows});
    if (!scales)
      return tl::unexpected(std::move(scales.error()));
    auto values = read_finite(source_, stem_ + "scales", *scales);
    if (!values)
      return tl::unexpected(std::move(values.error()));
    for (const auto* one : {&*weight, &*zeros, &*scales})
      count(*one);
    scale_type_ = scales->type.value_or(element_type::f32);
    if (auto ok = read_order(stem_ + "g_idx"); !ok)
      return ok;
    out_.type = how.bits == 8 ? element_type::i8 : element_type::i4;
    auto zero_points =
      is_awq ? unpack_awq_zeros(zeros->data, rows, groups)
             : unpack_gptq_zeros(zeros->data, how.bits, how.zeros_less_one, rows, groups);
    if (how.bits == 8) {
      if (std::any_of(zero_points.begin(), zero_points.end(), [](auto one) { return one != 128; }))
        return wrong(source_, stem_ + "qzeros", "holds zero points other than 128",
                     "8-bit weights are supported where they are symmetric");
      zero_points.clear();
    }
    if (how_ == weight_loading::check)
      return {};
    out_.zeros = std::move(zero_points);
    out_.scales.resize(values->size());
    for (std::int32_t group = 0; group < groups; ++group)
      for (std::int32_t row = 0; row < rows; ++row)
        out_.scales[static_cast<std::size_t>(row) * groups + group] =
          (*values)[static_cast<std::size_t>(group) * rows + row];
    out_.repacked = is_awq ? unpack_awq(weight->data, rows, cols)
                           : unpack_gptq(weight->data, how.bits, rows, cols);
    apply_order();
    return {};
  }

  /// Which group each column belongs to, where columns were sorted by their activations (desc_act).
  /// Kept where groups are not of neighbours.
  expected<void> read_order(const std::string& order_name) {
    if (!source_.contains(order_name))
      return {};
    auto view = find_packed(source_, order_name, {out_.num_cols});
    if (!view)
      return tl::unexpected(std::move(view.error()));
    count(*view);
    const auto groups = ceil_div(out_.num_cols, out_.block_cols);
    bool of_neighbours = true;
    for (std::int32_t col = 0; col < out_.num_cols; ++col) {
      const auto group = load<std::int32_t>(view->data, col);
      if (group < 0 || group >= groups)
        return wrong(source_, order_name,
                     fmt::format("puts column {} into group {} of {}", col, group, groups),
                     "the file is damaged, or config.json has another group_size");
      of_neighbours = of_neighbours && group == col / out_.block_cols;
      order_.push_back(group);
    }
    if (of_neighbours)
      order_.clear();
    return {};
  }

  /// Multiplies codes, zero points and scales out where columns have an order of their own.
  void apply_order() {
    if (order_.empty())
      return;
    const auto groups = ceil_div(out_.num_cols, out_.block_cols);
    out_.repacked = multiply_out(out_.view(), groups, order_, scale_type_);
    out_.type = scale_type_;
    out_.mapped_scales = nullptr;
    out_.scales.clear();
    out_.zeros.clear();
    out_.block_rows = 1;
    out_.block_cols = 1;
  }

  tensor_source& source_;
  const model_config& config_;
  const std::string& name_;
  std::string stem_; ///< "model.layers.0.mlp.up_proj."
  weight_loading how_;
  element_type scale_type_ = element_type::f32; ///< of packed weights, as stored
  std::vector<std::int32_t> order_; ///< group of each column, unless groups are of neighbours
  stored_weight out_;
};

} // namespace

void to_float32(const std::byte* data, element_type type, std::span<float> out) {
  switch (type) {
  case element_type::f32: std::memcpy(out.data(), data, out.size_bytes()); break;
  case element_type::bf16:
    for (std::size_t i = 0; i < out.size(); ++i)
      out[i] = std::bit_cast<float>(std::uint32_t{load<std::uint16_t>(data, i)} << 16);
    break;
  case element_type::f16:
    for (std::size_t i = 0; i < out.size(); ++i)
      out[i] = half_to_float(load<std::uint16_t>(data, i));
    break;
  case element_type::f8_e4m3:
    for (std::size_t i = 0; i < out.size(); ++i)
      out[i] = f8_table()[std::to_integer<std::uint8_t>(data[i])];
    break;
  case element_type::i8:
    for (std::size_t i = 0; i < out.size(); ++i)
      out[i] = static_cast<float>(load<std::int8_t>(data, i));
    break;
  case element_type::i4:
    for (std::size_t i = 0; i < out.size(); ++i)
      out[i] = static_cast<float>(std::to_integer<int>(data[i / 2]) >> (i % 2 * 4) & 15);
    break;
  }
}

expected<tensor_view> find_tensor(tensor_source& source, const std::string& name,
                                  std::initializer_list<std::int64_t> shape) {
  auto view = find_shaped(source, name, shape);
  if (view && !view->type)
    return wrong(source, name, fmt::format("has dtype {}", view->dtype),
                 "weights must be F32, BF16, F16, F8_E4M3 or I8");
  return view;
}

expected<std::vector<float>> read_finite(const tensor_source& source, const std::string& name,
                                         const tensor_view& view) {
  std::size_t count = 1;
  for (const auto dim : view.shape)
    count *= static_cast<std::size_t>(dim);
  std::vector<float> values(count);
  if (view.dtype == "F8_E8M0")
    for (std::size_t i = 0; i < count; ++i)
      values[i] = e8m0_to_float(std::to_integer<std::uint8_t>(view.data[i]));
  else if (is_float(view))
    to_float32(view.data, *view.type, values);
  else
    return wrong(source, name, fmt::format("has dtype {}", view.dtype),
                 "it must be F32, BF16 or F16");
  const auto bad = std::find_if_not(values.begin(), values.end(),
                                    [](float value) { return std::isfinite(value); });
  if (bad != values.end())
    return wrong(source, name,
                 fmt::format("has the value {} at element {}", *bad, bad - values.begin()),
                 "the file is damaged: copy it again from its source");
  return values;
}

kernels::weight_matrix stored_weight::view() const {
  kernels::weight_matrix result;
  result.data = data != nullptr ? data : repacked.data();
  result.type = type;
  result.num_rows = num_rows;
  result.num_cols = num_cols;
  result.scales = mapped_scales != nullptr ? mapped_scales
                  : scales.empty()         ? nullptr
                                           : scales.data();
  if (recipe) {
    result.data = nullptr;
    result.recipe = &*recipe;
  }
  if (result.scales != nullptr || (recipe && recipe->block_rows > 0)) {
    result.block_rows = block_rows;
    result.block_cols = block_cols;
  }
  result.zeros = zeros.empty() ? nullptr : zeros.data();
  return result;
}

expected<stored_weight> find_weight(tensor_source& source, const model_config& config,
                                    const std::string& name, std::int32_t num_rows,
                                    std::int32_t num_cols, weight_loading how) {
  return weight_finder(source, config, name, num_rows, num_cols, how).find();
}

std::vector<float> dequantise(const kernels::weight_matrix& weight) {
  const auto cols = static_cast<std::size_t>(weight.num_cols);
  std::vector<float> values(weight.num_rows * cols);
  const auto groups = ceil_div(weight.num_cols, weight.block_cols);
  for (std::int32_t row = 0; row < weight.num_rows; ++row) {
    auto* out = values.data() + row * cols;
    to_float32(static_cast<const std::byte*>(weight.data)
                 + row * kernels::row_bytes(weight.type, weight.num_cols),
               weight.type, {out, cols});
    if (weight.scales == nullptr)
      continue;
    const auto first = static_cast<std::size_t>(row / weight.block_rows) * groups;
    for (std::int32_t col = 0; col < weight.num_cols; ++col) {
      const auto group = first + col / weight.block_cols;
      if (weight.type == element_type::i4)
        out[col] -= weight.zeros != nullptr ? static_cast<float>(weight.zeros[group]) : 8.0F;
      out[col] *= weight.scales[group];
    }
  }
  return values;
}

} // namespace troupe::model
