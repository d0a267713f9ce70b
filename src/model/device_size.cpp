#include "troupe/model/device_size.hpp"

#include "troupe/kernels/narrow_weight.hpp"

#include <algorithm>
#include <string_view>

namespace troupe::model {

namespace {

// What kernels/cuda does (packed_matrix.hpp, backend.cpp, products.cpp; linear_exact.hpp).
constexpr std::uint64_t kTileRows = 16;
constexpr std::uint64_t kBlockCols = 128;
constexpr std::uint64_t kExactPiece = 8;
constexpr std::uint64_t kWeightSlab = std::uint64_t{256} << 20;
constexpr std::uint64_t kStaged = std::uint64_t{64} << 20;
constexpr std::uint64_t kUploads = std::uint64_t{16} << 20;
constexpr std::uint64_t kSlab = std::uint64_t{16} << 20;

/// Latent queries are taken so many rows at a time (latent_attention.cpp), logits so many
/// (stage_model.cpp).
constexpr std::uint64_t kLatentRows = 256;
constexpr std::uint64_t kLogitRows = 64;

/// Routed rows of a mixture that the device computes without the host.
constexpr std::uint64_t kMixedRows = 64;

constexpr std::uint64_t kWide = 2; ///< bytes of what the matrix unit computes with

/// Bytes of an element of activations.
std::uint64_t wide_bytes(kernels::numerics mode) {
  return mode == kernels::numerics::exact ? sizeof(float) : kWide;
}

std::uint64_t round_up(std::uint64_t value, std::uint64_t unit) {
  return (value + unit - 1) / unit * unit;
}

std::uint64_t size(std::int32_t value) {
  return static_cast<std::uint64_t>(std::max(value, 0));
}

/// How a quantized matrix is kept.
struct packing {
  std::uint64_t bits = 16;
  std::uint64_t block_rows = 0; ///< that share a scale; 0: no scales
  std::uint64_t block_cols = 0;
};

/// As it is stored.
packing stored_packing(const model_config& config, const tensor_spec& spec) {
  if (spec.name.find("_proj") == std::string::npos || config.weight_bits >= 16)
    return {size(config.wide_bits)};
  packing result{static_cast<std::uint64_t>(config.weight_bits), 1, size(spec.num_cols)};
  if (config.fp8) {
    result.block_rows = size(config.fp8->block_rows);
    result.block_cols = size(config.fp8->block_cols);
  } else if (config.packed && config.packed->group_size > 0) {
    result.block_cols = size(config.packed->group_size);
  } else if (config.int8 && config.int8->group_size > 0
             && spec.num_cols % config.int8->group_size == 0) {
    result.block_cols = size(config.int8->group_size);
  }
  return result;
}

/// For the matrix unit. Scales that change within a block of columns make the device expand a
/// matrix.
packing packing_of(const model_config& config, const tensor_spec& spec) {
  const auto stored = stored_packing(config, spec);
  const bool is_expanded =
    stored.block_rows == 0
    || (stored.block_cols < size(spec.num_cols) && stored.block_cols % kBlockCols != 0);
  return is_expanded ? packing{} : stored;
}

std::uint64_t scale_bytes(const packing& how, std::uint64_t rows, std::uint64_t cols) {
  return how.block_rows == 0 ? 0
                             : (rows + how.block_rows - 1) / how.block_rows
                                 * ((cols + how.block_cols - 1) / how.block_cols) * sizeof(float);
}

/// Or the embedding, where the head is the same tensor.
bool is_head(const model_config& config, const tensor_spec& spec) {
  return spec.name == (config.tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight");
}

std::uint64_t placed_bytes(const model_config& config, const tensor_spec& spec) {
  const auto rows = size(spec.num_rows);
  const auto cols = size(spec.num_cols);
  if (spec.num_rows == 0)
    return cols * sizeof(float);
  if (spec.name == "model.embed_tokens.weight" && !config.tie_word_embeddings)
    return rows * cols * kWide;
  if (spec.name.ends_with("kv_b_proj.weight")) {
    // In two parts, of which the keys are transposed by head.
    const auto heads = size(config.num_heads);
    const auto latent = round_up(size(config.kv_lora_rank), kBlockCols);
    const auto keys =
      heads * size(config.kv_lora_rank) * round_up(size(config.qk_nope_head_dim), kBlockCols);
    return (keys + heads * size(config.v_head_dim) * latent) * kWide;
  }
  const auto how = is_head(config, spec) && config.head == head_format::int8
                     ? packing{8, 1, size(kernels::kNarrowGroup)}
                     : packing_of(config, spec);
  auto bytes = round_up(rows, kTileRows) * round_up(cols, kBlockCols) * how.bits / 8;
  bytes += scale_bytes(how, rows, cols);
  if (spec.name == "model.embed_tokens.weight")
    bytes += rows * cols * kWide; // the head is the same tensor, and kept apart
  return bytes;
}

/// The same with exact numerics: as it is stored, in whole pieces; what is made of other weights is
/// in float32 where bf16 does not hold it.
std::uint64_t exactly_placed_bytes(const model_config& config, const tensor_spec& spec) {
  const auto rows = size(spec.num_rows);
  const auto cols = size(spec.num_cols);
  const bool is_bf16 = config.wide_bits == 16 && !config.wide_is_f16;
  const std::uint64_t wide = is_bf16 ? 2 : sizeof(float);
  if (spec.num_rows == 0)
    return cols * sizeof(float);
  if (spec.name == "model.embed_tokens.weight" && !config.tie_word_embeddings)
    return rows * cols * wide;
  if (spec.name.ends_with("kv_b_proj.weight")) {
    const auto heads = size(config.num_heads);
    const auto latent = size(config.kv_lora_rank);
    const auto keys = latent * round_up(size(config.qk_nope_head_dim), kExactPiece);
    const auto values = size(config.v_head_dim) * round_up(latent, kExactPiece);
    return heads * (keys + values) * (config.weight_bits < 16 ? sizeof(float) : wide);
  }
  const auto how = is_head(config, spec) && config.head == head_format::int8
                     ? packing{8, 1, size(kernels::kNarrowGroup)}
                     : stored_packing(config, spec);
  auto bytes = rows * round_up(cols, kExactPiece) * how.bits / 8 + scale_bytes(how, rows, cols);
  if (spec.name == "model.embed_tokens.weight")
    bytes += rows * cols * wide; // the head is the same tensor, and kept apart
  return bytes;
}

/// Rows as the matrix unit wants them, of the widest products.
std::uint64_t packed_rows(std::uint64_t rows, std::uint64_t cols) {
  return (rows + 8 * 16) * round_up(cols, kBlockCols) * kWide;
}

/// Room for the products of experts, and for a mixture that the host does not see.
std::uint64_t expert_products(const model_config& config, std::uint64_t num_tasks,
                              kernels::numerics mode) {
  const auto inner = round_up(size(config.moe_intermediate_size), kBlockCols);
  const auto hidden = size(config.hidden_size);
  const auto most_slots = num_tasks + 7 * (num_tasks / 33);
  const auto mixed = kMixedRows * (size(config.num_experts_per_token) + 1);
  const auto packed =
    mode == kernels::numerics::exact ? 0 : packed_rows(most_slots, std::max(hidden, inner));
  return 2 * (num_tasks + mixed) * inner * wide_bytes(mode) + packed
         + 4096 * size(config.num_experts) * sizeof(float);
}

/// Buffers are in slabs, or in blocks of 2 MiB of their own; some grow in large steps.
std::uint64_t with_margin(std::uint64_t bytes) {
  return bytes + bytes / 8 + kStaged + kUploads + 2 * kSlab;
}

} // namespace

std::uint64_t device_weight_bytes(const model_config& config, const model_part& part,
                                  kernels::numerics mode) {
  const bool is_exact = mode == kernels::numerics::exact;
  std::uint64_t bytes = 0;
  for (const auto& spec : list_tensors(config, part))
    bytes +=
      round_up(is_exact ? exactly_placed_bytes(config, spec) : placed_bytes(config, spec), 256);
  // The last piece of a slab finds no room in it now and then.
  return bytes + bytes / 32 + kWeightSlab;
}

std::uint64_t device_scratch_bytes(const model_config& config, const stage_options& options,
                                   kernels::numerics mode) {
  const auto rows = size(options.max_rows);
  const auto hidden = size(config.hidden_size);
  const auto heads = size(config.num_heads);
  std::uint64_t widest = 0;
  bool has_moe = false;
  for (auto layer = options.first_layer; layer < options.end_layer + (options.max_drafts > 0);
       ++layer) {
    has_moe = has_moe || config.is_moe_layer(layer);
    widest = std::max(widest, size(config.is_moe_layer(layer) ? config.shared_intermediate_size()
                                                              : config.intermediate_size));
  }
  std::uint64_t elements = rows * (3 * hidden + 2 * widest);
  std::uint64_t packed = packed_rows(rows, std::max(hidden, widest));
  if (config.attention == attention_kind::latent) {
    const auto block = std::min(rows, kLatentRows);
    const auto latent = heads * size(config.kv_lora_rank);
    const auto values = heads * size(config.v_head_dim);
    elements += rows
                  * (size(config.q_lora_rank) + heads * size(config.qk_head_dim())
                     + size(config.kv_dim()) + values)
                + 2 * block * latent;
    packed = std::max({packed, packed_rows(block, latent), packed_rows(rows, values)});
  } else {
    elements += rows * (2 * heads * size(config.head_dim) + size(config.kv_dim()));
    packed = std::max(packed, packed_rows(rows, heads * size(config.head_dim)));
  }
  std::uint64_t bytes = 0;
  if (has_moe) {
    const auto num_tasks = rows * size(config.num_experts_per_token);
    elements += num_tasks * hidden;
    if (options.with_local_experts)
      bytes += expert_products(config, num_tasks, mode);
  }
  if (options.end_layer == config.num_layers) // logits, and what is left of them by a ban
    bytes += 2 * std::min(rows, kLogitRows) * size(config.vocab_size) * sizeof(float);
  if (options.max_drafts > 0) {
    elements += rows * 3 * hidden;
    packed = std::max(packed, packed_rows(rows, 2 * hidden));
  }
  if (mode == kernels::numerics::exact)
    packed = 0; // products take rows as they are
  return with_margin(bytes + elements * wide_bytes(mode) + packed);
}

std::uint64_t device_scratch_bytes(const model_config& config, std::int32_t num_experts,
                                   std::int32_t max_rows, kernels::numerics mode) {
  const auto rows = size(max_rows);
  const auto num_tasks = rows * std::min(size(config.num_experts_per_token), size(num_experts));
  return with_margin((rows + num_tasks) * size(config.hidden_size) * wide_bytes(mode)
                     + expert_products(config, num_tasks, mode));
}

} // namespace troupe::model
