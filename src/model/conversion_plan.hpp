#pragma once

#include "troupe/base/error.hpp"
#include "troupe/model/checkpoint.hpp"
#include "troupe/model/model_config.hpp"
#include "troupe/model/quantize.hpp"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace troupe::model {

/// How the tensors of a converted model are spread over files.
struct shard_layout {
  std::vector<std::int32_t> stage_ends; ///< ascending; the last is the number of layers
  std::int32_t expert_groups = 0;       ///< 0: experts lie with their layers
  std::uint64_t shard_bytes = std::uint64_t{4} << 30; ///< a file is begun anew beyond this

  bool operator==(const shard_layout&) const = default;
};

enum class tensor_treatment : std::uint8_t {
  copied,   ///< byte by byte
  expanded, ///< its scales are multiplied in, and the result is rounded to BF16
  quantized,
};

/// A tensor as it stands in a file.
struct stored_tensor {
  std::string name;
  std::string dtype;
  std::vector<std::int64_t> shape;
  std::uint64_t num_bytes = 0;
};

/// One tensor of the source, with what becomes of it.
struct planned_tensor {
  std::string name; ///< in the source, "….weight" unless it is copied
  tensor_treatment treatment = tensor_treatment::copied;
  std::int32_t num_rows = 0; ///< unless it is copied
  std::int32_t num_cols = 0;
  std::vector<stored_tensor> outputs; ///< in the order in which they are written
};

/// One file of the converted model.
struct planned_shard {
  std::string file;
  std::int32_t stage = 0;
  std::int32_t expert_group = -1; ///< -1: everything but routed experts, or all of a stage
  std::vector<planned_tensor> tensors;
  std::uint64_t num_bytes = 0; ///< of the tensors, without the file's header

  std::vector<stored_tensor> outputs() const;
};

/// What a conversion writes: a pure function of the source's headers, the format and the layout.
struct conversion_plan {
  integer_format format;
  shard_layout layout;
  std::vector<planned_shard> shards;
  /// Modules with a matrix that stays as it is although its like may be quantized, for
  /// quantization_config: "model.layers.0.mlp.gate".
  std::vector<std::string> kept_modules;
  /// Matrices of a kind that is quantized whose shape does not allow it, with the reason.
  std::vector<std::string> misfits;
  std::uint64_t source_bytes = 0;
  std::uint64_t num_bytes = 0; ///< of all shards, without headers
};

/// Plans a conversion. Quantized are the projections of attention, MLPs and experts, those of MTP
/// layers too. Not quantized are norms and biases; the router, whose scores decide between experts;
/// embedding, head and what an MTP layer has of its own (eh_proj, shared_head), a small share with
/// much influence; and kv_b_proj, which is taken apart and expanded when it is loaded, so that
/// no memory would be saved.
///
/// Errors: invalid_model for a source that is quantized to integers already, and as
/// checkpoint::tensor; invalid_config for an impossible format or layout.
expected<conversion_plan> plan_conversion(checkpoint& source, const model_config& config,
                                          const integer_format& format, const shard_layout& layout);

/// The quantization_config of a converted model, as JSON text.
///
/// 8 bits: compressed-tensors "int-quantized": `P.weight` I8 and `P.weight_scale`, used by our
/// loader where they are mapped. By row it is what vLLM calls W8A8 with dynamic activations. 4
/// bits: AWQ's "gemm" version: `P.qweight`, `P.qzeros`, `P.scales`, the format with zero points
/// that other engines take for mixtures of experts.
std::string quantization_config_of(const conversion_plan& plan);

} // namespace troupe::model
