#include "troupe/model/random_weights.hpp"

#include <algorithm>
#include <cmath>
#include <thread>
#include <utility>

#include <fmt/format.h>

namespace troupe::model {

namespace {

/// Worth another thread.
constexpr std::size_t kElementsOfThread = std::size_t{1} << 16;

/// FNV-1a, 64 bits (Fowler, Noll and Vo; draft-eastlake-fnv).
std::uint64_t fnv1a(std::string_view text) {
  std::uint64_t hash = 0xCBF29CE484222325U;
  for (const char c : text) {
    hash ^= static_cast<unsigned char>(c);
    hash *= 0x100000001B3U;
  }
  return hash;
}

/// Calls fill(first, end) for parts of [0, count) on all cores.
template <class Fill>
void for_parts(std::size_t count, std::size_t elements, const Fill& fill) {
  const std::size_t cores = std::max(1U, std::thread::hardware_concurrency());
  const auto parts = std::clamp<std::size_t>(elements / kElementsOfThread, 1, cores);
  std::vector<std::thread> threads;
  for (std::size_t part = 1; part < parts; ++part)
    threads.emplace_back(
      [&fill, count, part, parts] { fill(count * part / parts, count * (part + 1) / parts); });
  fill(std::size_t{0}, count / parts);
  for (auto& thread : threads)
    thread.join();
}

/// Codes and scale number `block` of a quantized matrix, which lie in the order of its blocks.
void make_block(const kernels::weight_recipe& recipe, kernels::element_type type, std::size_t block,
                std::vector<float>& values, std::byte* codes, float* scales) {
  const auto across = (recipe.num_cols + recipe.block_cols - 1) / recipe.block_cols;
  const auto first_row = static_cast<std::int32_t>(block / across) * recipe.block_rows;
  const auto first_col = static_cast<std::int32_t>(block % across) * recipe.block_cols;
  const auto end_row = std::min(first_row + recipe.block_rows, recipe.num_rows);
  const auto end_col = std::min(first_col + recipe.block_cols, recipe.num_cols);
  values.clear();
  float largest = 0.0F;
  for (auto row = first_row; row < end_row; ++row)
    for (auto col = first_col; col < end_col; ++col) {
      values.push_back(kernels::made_value(recipe, row, col));
      largest = std::max(largest, std::abs(values.back()));
    }
  const float scale = kernels::made_scale(type, largest);
  scales[block] = scale;
  const auto* value = values.data();
  for (auto row = first_row; row < end_row; ++row) {
    auto* to = codes + static_cast<std::size_t>(row) * recipe.num_cols;
    for (auto col = first_col; col < end_col; ++col)
      to[col] = std::byte{kernels::made_code(type, *value++, scale)};
  }
}

std::string_view dtype_of(kernels::element_type type) {
  switch (type) {
  case kernels::element_type::f8_e4m3: return "F8_E4M3";
  case kernels::element_type::i8: return "I8";
  case kernels::element_type::f32: return "F32";
  default: return "BF16";
  }
}

} // namespace

void fill_random(std::string_view name, double deviation, std::uint64_t first,
                 std::span<std::uint16_t> out) {
  const auto key = fnv1a(name);
  const double width = std::sqrt(3.0) * deviation;
  for (auto& value : out)
    value = kernels::made_element(key, width, first++);
}

double random_deviation(const tensor_spec& spec) {
  if (spec.num_rows == 0)
    return spec.name.find("norm") != std::string::npos ? 0.0 : 0.02;
  if (spec.name == "model.embed_tokens.weight")
    return 1.0;
  return 0.7 / std::sqrt(static_cast<double>(spec.num_cols));
}

random_weights::random_weights(const model_config& config, std::string origin)
  : origin_(std::move(origin)), specs_(list_tensors(config, whole_model(config, true))) {
  for (std::size_t i = 0; i < specs_.size(); ++i) {
    const auto& spec = specs_[i];
    const bool is_projection = spec.num_rows > 0 && spec.name.find("_proj") != std::string::npos;
    if (spec.num_rows == 0) {
      add(i, spec.name, kernels::element_type::bf16, {spec.num_cols});
    } else if (is_projection && config.fp8) {
      add_quantized(i, kernels::element_type::f8_e4m3, config.fp8->block_rows,
                    config.fp8->block_cols, "_scale_inv");
    } else if (is_projection && config.int8) {
      // Where groups do not fit, a row is one group.
      const auto group = config.int8->group_size;
      const bool fits = group > 0 && spec.num_cols % group == 0;
      add_quantized(i, kernels::element_type::i8, 1, fits ? group : spec.num_cols, "_scale");
    } else {
      add(i, spec.name, kernels::element_type::bf16, {spec.num_rows, spec.num_cols});
    }
  }
}

random_weights::entry& random_weights::add(std::size_t spec, const std::string& name,
                                           kernels::element_type type,
                                           std::vector<std::int64_t> shape) {
  entry made;
  made.spec = spec;
  made.dtype = dtype_of(type);
  made.type = type;
  made.shape = std::move(shape);
  return entries_.insert_or_assign(name, std::move(made)).first->second;
}

void random_weights::add_quantized(std::size_t spec, kernels::element_type type,
                                   std::int32_t block_rows, std::int32_t block_cols,
                                   const std::string& scale_suffix) {
  const auto& [name, rows, cols] = specs_[spec];
  auto& matrix = add(spec, name, type, {rows, cols});
  matrix.block_rows = block_rows;
  matrix.block_cols = block_cols;
  matrix.scales =
    &add(spec, name + scale_suffix, kernels::element_type::f32,
         {(rows + block_rows - 1) / block_rows, (cols + block_cols - 1) / block_cols});
}

bool random_weights::contains(const std::string& tensor) const {
  return entries_.count(tensor) != 0;
}

kernels::weight_recipe random_weights::recipe_of(const entry& matrix) const {
  const auto& spec = specs_[matrix.spec];
  kernels::weight_recipe recipe;
  recipe.key = fnv1a(spec.name);
  recipe.width = std::sqrt(3.0) * random_deviation(spec);
  recipe.num_rows = spec.num_rows;
  recipe.num_cols = spec.num_cols;
  recipe.block_rows = matrix.block_rows;
  recipe.block_cols = matrix.block_cols;
  return recipe;
}

std::optional<made_tensor> random_weights::recipe(const std::string& name) const {
  const auto found = entries_.find(name);
  if (found == entries_.end() || found->second.shape.size() != 2
      || specs_[found->second.spec].name != name)
    return std::nullopt;
  const auto& matrix = found->second;
  const auto bytes_of = [](const entry& one) {
    return static_cast<std::uint64_t>(one.shape[0] * one.shape[1]) * kernels::size_of(one.type);
  };
  made_tensor made{matrix.type, recipe_of(matrix), 1, bytes_of(matrix)};
  if (matrix.scales != nullptr) {
    ++made.num_tensors;
    made.num_bytes += bytes_of(*matrix.scales);
  }
  return made;
}

expected<tensor_view> random_weights::tensor(const std::string& name) {
  const auto found = entries_.find(name);
  if (found == entries_.end())
    return fail(error_code::invalid_model,
                fmt::format("random:{} has no tensor \"{}\"", origin_, name),
                "made-up weights are those that its config.json needs");
  const std::lock_guard lock(mutex_);
  auto& one = found->second;
  if (one.bytes.empty())
    make(entries_.at(specs_[one.spec].name));
  tensor_view view;
  view.dtype = one.dtype;
  view.type = one.type;
  view.shape = one.shape;
  view.data = one.bytes.data();
  view.num_bytes = one.bytes.size();
  return view;
}

/// A vector, or a matrix with its scales.
void random_weights::make(entry& one) {
  const auto& spec = specs_[one.spec];
  const auto count =
    static_cast<std::size_t>(std::max(spec.num_rows, 1)) * static_cast<std::size_t>(spec.num_cols);
  one.bytes.resize(count * kernels::size_of(one.type));
  if (one.scales != nullptr) {
    const auto recipe = recipe_of(one);
    const auto num_scales = static_cast<std::size_t>(one.scales->shape[0] * one.scales->shape[1]);
    one.scales->bytes.resize(num_scales * sizeof(float));
    auto* scales = reinterpret_cast<float*>(one.scales->bytes.data());
    for_parts(num_scales, count, [&](std::size_t first, std::size_t end) {
      std::vector<float> values;
      for (auto block = first; block < end; ++block)
        make_block(recipe, one.type, block, values, one.bytes.data(), scales);
    });
    return;
  }
  const std::span values(reinterpret_cast<std::uint16_t*>(one.bytes.data()), count);
  const double deviation = random_deviation(spec);
  if (deviation == 0.0)
    std::fill(values.begin(), values.end(), kernels::made_bf16(1.0F));
  else
    for_parts(count, count, [&](std::size_t first, std::size_t end) {
      fill_random(spec.name, deviation, first, values.subspan(first, end - first));
    });
}

} // namespace troupe::model
