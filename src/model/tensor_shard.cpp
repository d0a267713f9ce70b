#include "troupe/model/tensor_shard.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#include <fmt/format.h>

namespace troupe::model {

namespace {

std::int32_t ceil_div(std::int32_t a, std::int32_t b) {
  return (a + b - 1) / b;
}

/// "q_b_proj" of "model.layers.0.self_attn.q_b_proj.weight".
std::string_view module_of(std::string_view name) {
  name = name.substr(0, name.rfind('.'));
  return name.substr(name.rfind('.') + 1);
}

/// Blocks so small that a cut at `first` is at the border of one, and no larger than the part.
std::int32_t cut_block(std::int32_t block, std::int32_t first, std::int32_t count) {
  return std::min(std::gcd(block, first), count);
}

/// The scales and zero points of a part. Each block of the part lies in one block of the whole.
void cut_scales(stored_weight& part, const stored_weight& whole, std::int32_t first_row,
                std::int32_t first_col) {
  const auto* from = whole.view().scales;
  if (from == nullptr && !whole.recipe)
    return;
  part.block_rows = cut_block(whole.block_rows, first_row, part.num_rows);
  part.block_cols = cut_block(whole.block_cols, first_col, part.num_cols);
  if (whole.recipe)
    return; // scales are made with the elements
  const auto across = ceil_div(whole.num_cols, whole.block_cols);
  const auto rows = ceil_div(part.num_rows, part.block_rows);
  const auto cols = ceil_div(part.num_cols, part.block_cols);
  std::vector<float> scales;
  std::vector<std::uint8_t> zeros;
  for (std::int32_t row = 0; row < rows; ++row)
    for (std::int32_t col = 0; col < cols; ++col) {
      const auto y = (first_row + row * part.block_rows) / whole.block_rows;
      const auto x = (first_col + col * part.block_cols) / whole.block_cols;
      const auto at = static_cast<std::size_t>(y) * across + x;
      scales.push_back(from[at]);
      if (!whole.zeros.empty())
        zeros.push_back(whole.zeros[at]);
    }
  part.mapped_scales = nullptr;
  part.scales = std::move(scales);
  part.zeros = std::move(zeros);
}

/// All but elements, scales and zero points.
stored_weight empty_part(const stored_weight& whole, std::int32_t num_rows, std::int32_t num_cols) {
  stored_weight part;
  part.type = whole.type;
  part.num_rows = num_rows;
  part.num_cols = num_cols;
  part.block_rows = whole.block_rows;
  part.block_cols = whole.block_cols;
  part.recipe = whole.recipe;
  part.num_tensors = whole.num_tensors;
  part.num_bytes = whole.num_bytes;
  return part;
}

} // namespace

weight_cut cut_of(std::string_view name) {
  const auto module = module_of(name);
  for (const auto* by_rows :
       {"q_proj", "q_b_proj", "k_proj", "v_proj", "kv_b_proj", "gate_proj", "up_proj"})
    if (module == by_rows)
      return weight_cut::rows;
  return module == "o_proj" || module == "down_proj" ? weight_cut::cols : weight_cut::whole;
}

expected<model_config> rank_config(const model_config& whole, std::int32_t rank,
                                   std::int32_t num_ranks) {
  auto config = whole;
  config.part = {rank, num_ranks};
  // Columns of 4 bit share bytes.
  const auto columns = whole.packed ? 2 : 1;
  const auto cut = [&](std::int32_t& size, std::int32_t unit, const char* what) -> expected<void> {
    if (size % (num_ranks * unit) != 0)
      return fail(error_code::invalid_config,
                  fmt::format("{} {} cannot be cut into {} parts", size, what, num_ranks),
                  "parallel.tensor has to divide them");
    size /= num_ranks;
    return {};
  };
  for (auto done :
       {cut(config.num_heads, 1, "attention heads"),
        cut(config.intermediate_size, columns, "inner columns of an MLP (intermediate_size)"),
        cut(config.moe_intermediate_size, columns,
            "inner columns of an expert (moe_intermediate_size)"),
        whole.attention == attention_kind::grouped
          ? cut(config.num_kv_heads, 1, "heads of keys and values")
          : expected<void>()})
    if (!done)
      return tl::unexpected(std::move(done.error()));
  return config;
}

stored_weight cut_rows(stored_weight whole, std::int32_t first, std::int32_t count) {
  auto part = empty_part(whole, count, whole.num_cols);
  cut_scales(part, whole, first, 0);
  if (part.recipe) {
    part.recipe->first_row += first;
    return part;
  }
  const auto row = kernels::row_bytes(whole.type, whole.num_cols);
  const auto begin = static_cast<std::ptrdiff_t>(first * row);
  if (whole.data != nullptr)
    part.data = whole.data + begin;
  else
    part.repacked.assign(whole.repacked.begin() + begin,
                         whole.repacked.begin() + begin + static_cast<std::ptrdiff_t>(count * row));
  return part;
}

stored_weight cut_cols(stored_weight whole, std::int32_t first, std::int32_t count,
                       bool with_elements) {
  auto part = empty_part(whole, whole.num_rows, count);
  cut_scales(part, whole, 0, first);
  if (part.recipe)
    part.recipe->first_col += first;
  if (!with_elements || part.recipe)
    return part;
  const auto from_row = kernels::row_bytes(whole.type, whole.num_cols);
  const auto row = kernels::row_bytes(whole.type, count);
  const auto skipped = kernels::row_bytes(whole.type, first);
  const auto* from = static_cast<const std::byte*>(whole.view().data) + skipped;
  part.repacked.resize(whole.num_rows * row);
  for (std::int32_t r = 0; r < whole.num_rows; ++r)
    std::memcpy(part.repacked.data() + r * row, from + r * from_row, row);
  return part;
}

} // namespace troupe::model
