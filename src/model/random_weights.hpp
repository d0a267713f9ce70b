#pragma once

#include "troupe/kernels/made_weight.hpp"
#include "troupe/model/model_config.hpp"
#include "troupe/model/tensor_source.hpp"
#include "troupe/model/weights.hpp"

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace troupe::model {

/// Elements first, first + 1, ... of a tensor called `name`, in BF16. A pure function of name and
/// index, so that any program can build the same model:
///   h = fnv1a64(name), z = splitmix64(h + (index + 1) * 0x9E3779B97F4A7C15),
///   w = bf16(((z >> 40) * 2^-24 * 2 - 1) * sqrt(3) * deviation)
/// Products are taken in float64, rounded to float32 and then, to nearest even, to BF16: see
/// kernels/made_weight.hpp, by which a device makes the same.
void fill_random(std::string_view name, double deviation, std::uint64_t first,
                 std::span<std::uint16_t> out);

/// The standard deviation of a tensor: 1 for the embedding, 0.7 / sqrt(columns) for any other
/// matrix, 0.02 for biases. 0 for norms, whose values are all 1.
double random_deviation(const tensor_spec& spec);

/// All weights of a model, made up when they are asked for and kept in memory: what a config
/// names as "random:FILE". For measurements that need the arithmetic of a model but not its sense.
/// Tensors are of the types that a checkpoint of this config would have: BF16, and projections
/// quantized from that where the config says fp8 (in blocks) or int8 (compressed-tensors).
class random_weights final : public tensor_source {
public:
  /// `origin` stands for the file in errors.
  random_weights(const model_config& config, std::string origin);

  bool contains(const std::string& tensor) const override;
  expected<tensor_view> tensor(const std::string& name) override;
  std::optional<made_tensor> recipe(const std::string& name) const override;
  std::string file_of(const std::string&) const override { return origin_; }

private:
  struct entry {
    std::size_t spec = 0; ///< what it is made from
    std::string_view dtype;
    kernels::element_type type;
    std::vector<std::int64_t> shape;
    std::int32_t block_rows = 0; ///< of a quantized matrix: elements that share a scale
    std::int32_t block_cols = 0;
    entry* scales = nullptr;      ///< of a quantized matrix
    std::vector<std::byte> bytes; ///< empty until asked for
  };

  entry& add(std::size_t spec, const std::string& name, kernels::element_type type,
             std::vector<std::int64_t> shape);
  void add_quantized(std::size_t spec, kernels::element_type type, std::int32_t block_rows,
                     std::int32_t block_cols, const std::string& scale_suffix);
  kernels::weight_recipe recipe_of(const entry& matrix) const;
  void make(entry& one);

  std::string origin_;
  std::vector<tensor_spec> specs_;
  std::mutex mutex_; ///< guards entry::bytes
  std::unordered_map<std::string, entry> entries_;
};

} // namespace troupe::model
