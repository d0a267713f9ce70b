#pragma once

#include "troupe/base/error.hpp"
#include "troupe/kernels/ops.hpp"
#include "troupe/model/model_config.hpp"
#include "troupe/model/tensor_source.hpp"

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace troupe::model {

/// One matrix [num_rows, num_cols] of a linear layer as its source has it, made into what kernels
/// read (kernels::weight_matrix). How it is stored is seen from the tensors that are there; for
/// a name "P.weight":
///
/// | tensors                                       | as written by                            |
/// |-----------------------------------------------|------------------------------------------|
/// | P.weight: F32, BF16, F16                      | anybody                                  |
/// | P.weight: F8_E4M3, P.weight_scale_inv         | DeepSeek-V3 (blocks; scales F32, BF16    |
/// |                                               | or, with `scale_fmt: ue8m0`, F8_E8M0)    |
/// | P.weight: F8_E4M3 or I8, P.weight_scale       | compressed-tensors "float-quantized" and |
/// |                                               | "int-quantized": [1], [out], [out, 1] or |
/// |                                               | [out, groups]                            |
/// | P.weight: I8, P.weight_scale_inv              | block-wise INT8 of DeepSeek-V3           |
/// | P.weight_packed, P.weight_scale               | compressed-tensors "pack-quantized",     |
/// |   (, P.weight_zero_point)                     | 4 and 8 bits                             |
/// | P.qweight, P.qzeros, P.scales (, P.g_idx)     | AWQ (GEMM) and GPTQ, by quant_method     |
///
/// The last two are repacked, at the same size, into rows of `i4` or `i8`; all others are used
/// where they are mapped. Where g_idx (or weight_g_idx) does not put neighbours into groups
/// (`desc_act`), they are multiplied out into the type of their scales instead: see multiply_out.
struct stored_weight {
  kernels::element_type type = kernels::element_type::f32;
  std::int32_t num_rows = 0;
  std::int32_t num_cols = 0;
  const std::byte* data = nullptr; ///< mapped; null where `repacked` holds the elements
  std::vector<std::byte> repacked; ///< rows of kernels::row_bytes
  std::int32_t block_rows = 1;     ///< with scales
  std::int32_t block_cols = 1;
  const float* mapped_scales = nullptr;         ///< the scales where they may be used as mapped
  std::vector<float> scales;                    ///< as kernels::weight_matrix::scales, or empty
  std::vector<std::uint8_t> zeros;              ///< as kernels::weight_matrix::zeros, or empty
  std::optional<kernels::weight_recipe> recipe; ///< instead of elements and scales
  std::size_t num_tensors = 0;
  std::uint64_t num_bytes = 0; ///< of all tensors, as stored

  /// What kernels read. Points into this object and into the source.
  kernels::weight_matrix view() const;
};

enum class weight_loading : std::uint8_t {
  check, ///< shapes, types and small tensors; no repacking
  load,
  recipe, ///< how to make it where the source makes it up; else as load
};

/// Finds the matrix `name` ("….weight"). Errors: invalid_model naming file and tensor; io_failed.
expected<stored_weight> find_weight(tensor_source& source, const model_config& config,
                                    const std::string& name, std::int32_t num_rows,
                                    std::int32_t num_cols, weight_loading how);

/// A tensor of a dtype that weights may have and of exactly this shape.
expected<tensor_view> find_tensor(tensor_source& source, const std::string& name,
                                  std::initializer_list<std::int64_t> shape);

/// All values of a small tensor, checked to be finite, so that a bad value is found before it
/// spreads.
expected<std::vector<float>> read_finite(const tensor_source& source, const std::string& name,
                                         const tensor_view& view);

/// The values of out.size() stored elements as float32; `data` may be unaligned. FP8 is e4m3fn:
/// bias 7, no infinities, 0x7f and 0xff are NaN (OCP OFP8 specification 1.0). Not for i4.
void to_float32(const std::byte* data, kernels::element_type type, std::span<float> out);

/// All elements of a matrix as float32 [num_rows, num_cols], scales and zero points applied.
std::vector<float> dequantise(const kernels::weight_matrix& weight);

} // namespace troupe::model
