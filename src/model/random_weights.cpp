#include "troupe/model/random_weights.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <thread>
#include <utility>

#include <fmt/format.h>

namespace troupe::model {

namespace {

/// Worth another thread.
constexpr std::size_t kElementsOfThread = std::size_t{1} << 16;

constexpr float kLargestE4m3 = 448.0F;

/// FNV-1a, 64 bits (Fowler, Noll and Vo; draft-eastlake-fnv).
std::uint64_t fnv1a(std::string_view text) {
  std::uint64_t hash = 0xCBF29CE484222325U;
  for (const char c : text) {
    hash ^= static_cast<unsigned char>(c);
    hash *= 0x100000001B3U;
  }
  return hash;
}

std::uint64_t splitmix64(std::uint64_t z) {
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9U;
  z = (z ^ z >> 27) * 0x94D049BB133111EBU;
  return z ^ z >> 31;
}

std::uint16_t to_bf16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  return static_cast<std::uint16_t>((bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16);
}

/// The nearest e4m3 code, ties to even; beyond the largest value, the largest.
std::uint8_t to_e4m3(float value) {
  const auto sign = static_cast<std::uint8_t>(std::signbit(value) ? 0x80 : 0);
  const float size = std::min(std::abs(value), kLargestE4m3);
  if (size < 0x1p-6F) // subnormal: multiples of 2^-9, and the first normal value follows them
    return static_cast<std::uint8_t>(sign | static_cast<int>(std::nearbyint(size * 512.0F)));
  const auto bits = std::bit_cast<std::uint32_t>(size);
  const auto rounded = (bits + 0x7FFFFU + (bits >> 20 & 1U)) >> 20;
  return static_cast<std::uint8_t>(sign | (rounded - (120U << 3)));
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

float largest_of(const float* values, std::size_t count) {
  float largest = 0.0F;
  for (std::size_t i = 0; i < count; ++i)
    largest = std::max(largest, std::abs(values[i]));
  return largest;
}

} // namespace

void fill_random(std::string_view name, double deviation, std::uint64_t first,
                 std::span<std::uint16_t> out) {
  constexpr std::uint64_t step = 0x9E3779B97F4A7C15U;
  auto state = fnv1a(name) + first * step;
  const double width = std::sqrt(3.0) * deviation;
  for (auto& value : out) {
    state += step;
    const double uniform = static_cast<double>(splitmix64(state) >> 40) * 0x1p-24 * 2.0 - 1.0;
    value = to_bf16(static_cast<float>(uniform * width));
  }
}

double random_deviation(const tensor_spec& spec) {
  if (spec.num_rows == 0)
    return spec.name.find("norm") != std::string::npos ? 0.0 : 0.02;
  if (spec.name == "model.embed_tokens.weight")
    return 1.0;
  return 0.7 / std::sqrt(static_cast<double>(spec.num_cols));
}

random_weights::random_weights(const model_config& config, std::string origin)
  : origin_(std::move(origin)),
    fp8_(config.fp8),
    int8_(config.int8),
    specs_(list_tensors(config, whole_model(config, true))) {
  for (std::size_t i = 0; i < specs_.size(); ++i) {
    const auto& spec = specs_[i];
    const std::int64_t rows = spec.num_rows;
    const std::int64_t cols = spec.num_cols;
    const bool is_projection = rows > 0 && spec.name.find("_proj") != std::string::npos;
    if (rows == 0) {
      add(i, spec.name, "BF16", {cols});
    } else if (is_projection && fp8_) {
      add(i, spec.name, "F8_E4M3", {rows, cols});
      add(i, spec.name + "_scale_inv", "F32",
          {(rows + fp8_->block_rows - 1) / fp8_->block_rows,
           (cols + fp8_->block_cols - 1) / fp8_->block_cols});
    } else if (is_projection && int8_) {
      // Where groups do not fit, a row is one group.
      const std::int64_t group = int8_->group_size;
      add(i, spec.name, "I8", {rows, cols});
      add(i, spec.name + "_scale", "F32",
          {rows, group > 0 && cols % group == 0 ? cols / group : 1});
    } else {
      add(i, spec.name, "BF16", {rows, cols});
    }
  }
}

void random_weights::add(std::size_t spec, const std::string& name, std::string_view dtype,
                         std::vector<std::int64_t> shape) {
  entries_.emplace(name, entry{spec, dtype, std::move(shape), {}});
}

bool random_weights::contains(const std::string& tensor) const {
  return entries_.count(tensor) != 0;
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
    make(specs_[one.spec]);
  tensor_view view;
  view.dtype = one.dtype;
  view.type = one.dtype == "BF16"      ? kernels::element_type::bf16
              : one.dtype == "F8_E4M3" ? kernels::element_type::f8_e4m3
              : one.dtype == "I8"      ? kernels::element_type::i8
                                       : kernels::element_type::f32;
  view.shape = one.shape;
  view.data = one.bytes.data();
  view.num_bytes = one.bytes.size();
  return view;
}

void random_weights::make(const tensor_spec& spec) {
  const auto cols = static_cast<std::size_t>(spec.num_cols);
  const auto count = static_cast<std::size_t>(std::max(spec.num_rows, 1)) * cols;
  const double deviation = random_deviation(spec);
  std::vector<std::byte> bytes(count * sizeof(std::uint16_t));
  const std::span values(reinterpret_cast<std::uint16_t*>(bytes.data()), count);
  if (deviation == 0.0)
    std::fill(values.begin(), values.end(), to_bf16(1.0F));
  else
    for_parts(count, count, [&](std::size_t first, std::size_t end) {
      fill_random(spec.name, deviation, first, values.subspan(first, end - first));
    });
  auto& target = entries_.at(spec.name);
  if (target.dtype == "BF16") {
    target.bytes = std::move(bytes);
    return;
  }
  std::vector<float> exact(count);
  to_float32(bytes.data(), kernels::element_type::bf16, exact);
  if (target.dtype == "I8")
    make_int8(spec, exact);
  else
    make_fp8(spec, exact);
}

void random_weights::make_fp8(const tensor_spec& spec, std::span<const float> values) {
  const auto rows = static_cast<std::size_t>(spec.num_rows);
  const auto cols = static_cast<std::size_t>(spec.num_cols);
  const auto block_rows = static_cast<std::size_t>(fp8_->block_rows);
  const auto block_cols = static_cast<std::size_t>(fp8_->block_cols);
  const auto across = (cols + block_cols - 1) / block_cols;
  const auto down = (rows + block_rows - 1) / block_rows;
  std::vector<std::byte> codes(rows * cols);
  std::vector<float> scales(down * across);
  for_parts(down, values.size(), [&](std::size_t first, std::size_t end) {
    for (auto y = first; y < end; ++y)
      for (std::size_t x = 0; x < across; ++x) {
        const auto last_row = std::min(rows, (y + 1) * block_rows);
        const auto width = std::min(cols - x * block_cols, block_cols);
        float largest = 0.0F;
        for (auto row = y * block_rows; row < last_row; ++row)
          largest = std::max(largest, largest_of(&values[row * cols + x * block_cols], width));
        const float scale = std::max(largest, 1e-4F) / kLargestE4m3;
        scales[y * across + x] = scale;
        for (auto row = y * block_rows; row < last_row; ++row)
          for (std::size_t i = 0; i < width; ++i) {
            const auto at = row * cols + x * block_cols + i;
            codes[at] = std::byte{to_e4m3(values[at] / scale)};
          }
      }
  });
  entries_.at(spec.name).bytes = std::move(codes);
  auto& to = entries_.at(spec.name + "_scale_inv").bytes;
  to.resize(scales.size() * sizeof(float));
  std::memcpy(to.data(), scales.data(), to.size());
}

void random_weights::make_int8(const tensor_spec& spec, std::span<const float> values) {
  auto& scale_entry = entries_.at(spec.name + "_scale");
  const auto num_scales = static_cast<std::size_t>(scale_entry.shape[0] * scale_entry.shape[1]);
  const auto group = values.size() / num_scales;
  std::vector<std::byte> codes(values.size());
  std::vector<float> scales(num_scales);
  for_parts(num_scales, values.size(), [&](std::size_t first, std::size_t end) {
    for (auto g = first; g < end; ++g) {
      const auto* from = &values[g * group];
      const float scale = std::max(largest_of(from, group), 1e-4F) / 127.0F;
      scales[g] = scale;
      for (std::size_t i = 0; i < group; ++i)
        codes[g * group + i] =
          static_cast<std::byte>(static_cast<std::int8_t>(std::nearbyint(from[i] / scale)));
    }
  });
  entries_.at(spec.name).bytes = std::move(codes);
  scale_entry.bytes.resize(num_scales * sizeof(float));
  std::memcpy(scale_entry.bytes.data(), scales.data(), scale_entry.bytes.size());
}

} // namespace troupe::model
