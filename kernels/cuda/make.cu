#include "troupe/kernels/cuda/device.cuh"
#include "troupe/kernels/made_weight.hpp"

/// Made-up weights, made where they are needed.
namespace troupe::kernels::cuda {

namespace {

constexpr int kThreads = 256;

/// Elements of a scale's block for which a warp is enough.
constexpr std::int64_t kWarpElements = 1024;

__global__ void make_elements(weight_recipe recipe, std::int32_t num_rows, std::int32_t num_cols,
                              std::uint16_t* out) {
  const auto count = std::int64_t{num_rows} * num_cols;
  for (auto i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += std::int64_t{gridDim.x} * blockDim.x) {
    const auto row = static_cast<std::uint64_t>(recipe.first_row + i / num_cols);
    const auto col = static_cast<std::uint64_t>(recipe.first_col + i % num_cols);
    out[i] = made_element(recipe.key, recipe.width,
                          row * static_cast<std::uint64_t>(recipe.num_cols) + col);
  }
}

/// A block of threads makes one scale, from all that shares it in the whole matrix, and the codes
/// of those elements that are asked for.
__global__ void make_codes(weight_recipe recipe, weight_matrix to) {
  __shared__ float memory[32];
  const std::int32_t across = ceil_div(to.num_cols, to.block_cols);
  const auto block_row = static_cast<std::int32_t>(blockIdx.x) / across;
  const auto block_col = static_cast<std::int32_t>(blockIdx.x) % across;
  const std::int32_t first_row = block_row * to.block_rows;
  const std::int32_t first_col = block_col * to.block_cols;

  const std::int32_t top = (recipe.first_row + first_row) / recipe.block_rows * recipe.block_rows;
  const std::int32_t left = (recipe.first_col + first_col) / recipe.block_cols * recipe.block_cols;
  const std::int32_t height = min(recipe.block_rows, recipe.num_rows - top);
  const std::int32_t width = min(recipe.block_cols, recipe.num_cols - left);
  float largest = 0.0F;
  for (auto i = static_cast<std::int32_t>(threadIdx.x); i < height * width; i += blockDim.x) {
    largest = fmaxf(largest, fabsf(made_value(recipe, top + i / width, left + i % width)));
  }
  const float scale = made_scale(to.type, block_max(largest, memory));
  if (threadIdx.x == 0) {
    const_cast<float*>(to.scales)[blockIdx.x] = scale;
  }

  const std::int32_t num_rows = min(to.block_rows, to.num_rows - first_row);
  const std::int32_t num_cols = min(to.block_cols, to.num_cols - first_col);
  auto* codes = static_cast<std::uint8_t*>(const_cast<void*>(to.data));
  for (auto i = static_cast<std::int32_t>(threadIdx.x); i < num_rows * num_cols; i += blockDim.x) {
    const std::int32_t row = first_row + i / num_cols;
    const std::int32_t col = first_col + i % num_cols;
    const float value = made_value(recipe, recipe.first_row + row, recipe.first_col + col);
    codes[std::int64_t{row} * to.num_cols + col] = made_code(to.type, value, scale);
  }
}

} // namespace

void launch_make(cudaStream_t stream, const weight_recipe& recipe, const weight_matrix& to) {
  if (recipe.block_rows == 0) {
    make_elements<<<4096, kThreads, 0, stream>>>(
      recipe, to.num_rows, to.num_cols, static_cast<std::uint16_t*>(const_cast<void*>(to.data)));
    return;
  }
  const auto num_blocks = static_cast<unsigned>(ceil_div(to.num_rows, to.block_rows))
                          * static_cast<unsigned>(ceil_div(to.num_cols, to.block_cols));
  const bool is_small = std::int64_t{recipe.block_rows} * recipe.block_cols <= kWarpElements;
  make_codes<<<num_blocks, is_small ? 32 : kThreads, 0, stream>>>(recipe, to);
}

} // namespace troupe::kernels::cuda
