#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include <catch2/catch.hpp>

#include "../support.hpp"
#include "troupe/kernels/cuda/cuda_ops.hpp"

/// What the tests of the CUDA back end share: the GPU, and rows on it.
namespace kernel_tests {

using troupe::kernels::cuda::gpu_ops;

/// The first GPU; null, with a word to CTest, where there is none.
inline gpu_ops* gpu() {
  static std::string error;
  static const auto device = troupe::kernels::cuda::num_devices() > 0
                               ? troupe::kernels::cuda::make_cuda_ops(0, error)
                               : nullptr;
  if (device == nullptr) {
    WARN("skipped: no GPU here. " << error);
  }
  return device.get();
}

/// The same GPU, computing with exact numerics.
inline gpu_ops* exact_gpu() {
  static std::string error;
  static const auto device = gpu() != nullptr ? troupe::kernels::cuda::make_cuda_ops(
                               0, error, nullptr, nullptr, nullptr, 0, numerics::exact)
                                              : nullptr;
  return device.get();
}

inline ops& reference() {
  static const auto device = troupe::kernels::make_cpu_ops(4);
  return *device;
}

inline std::uint16_t to_bf16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) {
    return static_cast<std::uint16_t>(bits >> 16 | 0x40U);
  }
  return static_cast<std::uint16_t>((bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16);
}

/// Values as the GPU will see them.
inline matrix rounded(matrix x) {
  for (auto& value : x.data) {
    value = bf16_value(to_bf16(value));
  }
  return x;
}

inline matrix random_rows(int rows, int cols, std::mt19937& random, float width = 1.0F) {
  return rounded(random_matrix(rows, cols, random, width));
}

/// Rows on a GPU, elements of its activation_type, in memory that was full of NaN; the stride may
/// be wider than the rows.
class gpu_rows {
public:
  gpu_rows(int rows, int cols, int stride = 0, gpu_ops& device = *gpu())
    : device_(device), rows_(rows), cols_(cols), stride_(stride > 0 ? stride : cols) {
    const auto count = std::size_t(std::max(rows, 1)) * stride_;
    memory_ = device_.allocate(count * element_bytes());
    const auto nan = to_elements(std::vector<float>(count, std::nanf("")));
    device_.copy_from_host(nan.data(), {memory_.get(), 1, int(count), int(count)});
  }

  explicit gpu_rows(const matrix& from, int stride = 0, gpu_ops& device = *gpu())
    : gpu_rows(from.num_rows, from.num_cols, stride, device) {
    device_.copy_from_host(to_elements(from.data).data(), view());
  }

  rows_view view() const { return {memory_.get(), rows_, cols_, stride_}; }

  rows_view first_rows(int count) const { return {memory_.get(), count, cols_, stride_}; }

  matrix read() const {
    matrix result(rows_, cols_);
    if (is_float()) {
      device_.copy_to_host(view(), result.data.data());
      return result;
    }
    std::vector<std::uint16_t> bits(std::size_t(rows_) * cols_);
    device_.copy_to_host(view(), bits.data());
    for (std::size_t i = 0; i < bits.size(); ++i) {
      result.data[i] = bf16_value(bits[i]);
    }
    return result;
  }

private:
  bool is_float() const { return device_.activation_type() == element_type::f32; }
  std::size_t element_bytes() const { return troupe::kernels::size_of(device_.activation_type()); }

  std::vector<unsigned char> to_elements(const std::vector<float>& values) const {
    std::vector<unsigned char> bytes(values.size() * element_bytes());
    for (std::size_t i = 0; i < values.size(); ++i) {
      const std::uint16_t bits = to_bf16(values[i]);
      std::memcpy(&bytes[i * element_bytes()],
                  is_float() ? static_cast<const void*>(&values[i]) : &bits, element_bytes());
    }
    return bytes;
  }

  gpu_ops& device_;
  int rows_;
  int cols_;
  int stride_;
  std::shared_ptr<void> memory_;
};

/// Float32 rows on the GPU whatever its activation_type: two places of 16 bit each.
class gpu_floats {
public:
  gpu_floats(int rows, int cols, gpu_ops& device = *gpu())
    : device_(device), rows_(rows), cols_(cols) {
    memory_ = device_.allocate(std::size_t(rows) * cols * 4);
  }

  explicit gpu_floats(const matrix& from, gpu_ops& device = *gpu())
    : gpu_floats(from.num_rows, from.num_cols, device) {
    device_.copy_from_host(from.data.data(), in_places());
  }

  rows_view view() const { return {memory_.get(), rows_, cols_, cols_}; }

  matrix read() const {
    matrix result(rows_, cols_);
    device_.copy_to_host(in_places(), result.data.data());
    return result;
  }

private:
  rows_view in_places() const {
    const auto places =
      static_cast<int>(sizeof(float) / troupe::kernels::size_of(device_.activation_type()));
    return {memory_.get(), rows_, cols_ * places, cols_ * places};
  }

  gpu_ops& device_;
  int rows_;
  int cols_;
  std::shared_ptr<void> memory_;
};

/// A vector of float32 on the GPU.
inline const float* gpu_vector(const std::vector<float>& values, gpu_ops& device = *gpu()) {
  weight_matrix w;
  w.data = values.data();
  w.num_rows = 1;
  w.num_cols = static_cast<std::int32_t>(values.size());
  return static_cast<const float*>(device.place(w, troupe::kernels::weight_use::stored).data);
}

/// ||a - b|| / ||b||; NaN never passes a comparison.
inline double distance(const matrix& a, const matrix& b) {
  double difference = 0.0;
  double size = 0.0;
  for (std::size_t i = 0; i < b.data.size(); ++i) {
    difference += (double{a.data[i]} - b.data[i]) * (double{a.data[i]} - b.data[i]);
    size += double{b.data[i]} * b.data[i];
  }
  return std::sqrt(difference / std::max(size, 1e-30));
}

/// Rounding a result to bf16 costs 2^-9 at most; sums and intermediate steps a little more.
inline constexpr double kRounding = 4e-3;

inline matrix select_rows(const matrix& from, const std::vector<int>& rows) {
  matrix result(static_cast<int>(rows.size()), from.num_cols);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    std::copy_n(&from.data[std::size_t(rows[i]) * from.num_cols], from.num_cols,
                &result.data[i * from.num_cols]);
  }
  return result;
}

/// A weight of 4 bit with zero points.
inline test_weight random_i4(int rows, int cols, int block_cols, std::mt19937& random) {
  test_weight w;
  const auto groups = (cols + block_cols - 1) / block_cols;
  const auto bytes = std::size_t(rows) * ((cols + 1) / 2);
  w.data = std::make_shared<std::vector<unsigned char>>(bytes);
  w.scales = std::make_shared<std::vector<unsigned char>>(std::size_t(rows) * groups * 5);
  for (auto& byte : *w.data) {
    byte = static_cast<unsigned char>(random());
  }
  auto* zeros = w.scales->data() + std::size_t(rows) * groups * 4;
  std::uniform_real_distribution<float> uniform(0.001F, 0.01F);
  for (int i = 0; i < rows * groups; ++i) {
    const float scale = uniform(random);
    std::memcpy(w.scales->data() + i * 4, &scale, 4);
    zeros[i] = static_cast<unsigned char>(random() % 16);
  }
  w.view = {w.data->data(),
            element_type::i4,
            rows,
            cols,
            reinterpret_cast<const float*>(w.scales->data()),
            1,
            block_cols,
            zeros};
  return w;
}

inline std::vector<int> shuffled(int count, std::mt19937& random) {
  std::vector<int> result(count);
  std::iota(result.begin(), result.end(), 0);
  std::shuffle(result.begin(), result.end(), random);
  return result;
}

} // namespace kernel_tests
