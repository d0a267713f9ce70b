#pragma once

#include "troupe/base/error.hpp"
#include "troupe/kernels/ops.hpp"
#include "troupe/model/model_config.hpp"
#include "troupe/model/stored_weight.hpp"
#include "troupe/model/tensor_source.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace troupe::model {

/// A part of the model that one process loads. Any of the ranges may be empty.
struct model_part {
  std::int32_t first_layer = 0;
  std::int32_t end_layer = 0;
  bool trunk = true; ///< all but routed experts; with layer 0 the embedding, with the last the head
  std::int32_t first_expert = 0; ///< routed experts of the MoE layers among the layers
  std::int32_t end_expert = 0;
  bool mtp = false; ///< with the first MTP layer, which goes with the last layer
};

/// The whole model, with its first MTP layer if it has one and `with_mtp`.
model_part whole_model(const model_config& config, bool with_mtp = false);

/// A tensor that a part needs. Vectors have num_rows 0.
struct tensor_spec {
  std::string name;
  std::int32_t num_rows = 0;
  std::int32_t num_cols = 0;
};

/// Everything `part` needs, in order of layers, by the names of weights that are not quantized;
/// see stored_weight.hpp for what may stand in their place.
std::vector<tensor_spec> list_tensors(const model_config& config, const model_part& part);

/// The use of products that a checkpoint leaves in wider numbers than its other weights: the head,
/// and what is made of kv_b.
kernels::weight_use wide_product_use(const model_config& config);

/// The use of the head, whose format may be chosen.
kernels::weight_use head_use(const model_config& config);

struct part_size {
  std::size_t num_tensors = 0;
  std::uint64_t num_bytes = 0; ///< as stored, scales included
};

/// Checks a part without loading it: every tensor is there with the right shape and a usable
/// dtype, all scales, norms and router biases are finite. Opens the shards concerned and reads
/// those small tensors only. Errors: invalid_model naming file and tensor; io_failed.
expected<part_size> check_weights(tensor_source& source, const model_config& config,
                                  const model_part& part);

/// Where tensors of one part live as long as they are used: in the mapping as stored or, where
/// conversion is needed, in buffers of this object; not those of which the device has a copy. Of a
/// rank's config (model_config::part) sizes are those of its part, and weights are cut as they are
/// read (tensor_shard.hpp). Not thread-safe.
class weight_store {
public:
  /// `ops` must outlive the store.
  weight_store(std::shared_ptr<tensor_source> source, const model_config& config,
               kernels::ops& ops);

  /// A weight [num_rows, num_cols] with its scales, placed on the device.
  /// Errors: as check_weights.
  expected<kernels::weight_matrix> matrix(const std::string& name, std::int32_t num_rows,
                                          std::int32_t num_cols,
                                          kernels::weight_use use = kernels::weight_use::product);

  /// A vector converted to float32, placed on the device.
  expected<const float*> vector(const std::string& name, std::int32_t size);

  /// A weight as host float32 [num_rows, num_cols], scales applied; of no use but their number
  /// where what is made of them lies on the device already (kernels::weight_reading::shapes).
  expected<std::vector<float>> dequantised(const std::string& name, std::int32_t num_rows,
                                           std::int32_t num_cols);

  /// The device has all weights already: what `keep` is given is not looked at.
  bool are_there() const { return ops_.reads_of_weights() == kernels::weight_reading::shapes; }

  /// Keeps values and places them on the device.
  const float* keep(std::vector<float> values);

  /// The same for a weight of rows of num_cols values.
  kernels::weight_matrix keep(std::vector<float> values, std::int32_t num_cols,
                              kernels::weight_use use = kernels::weight_use::product);

  /// The same where `are_there` holds, of which only the shape is needed.
  kernels::weight_matrix keep_shape(std::int32_t num_rows, std::int32_t num_cols,
                                    kernels::weight_use use = kernels::weight_use::product);

private:
  expected<stored_weight> find_part(const std::string& name, std::int32_t num_rows,
                                    std::int32_t num_cols, weight_loading how);

  std::shared_ptr<tensor_source> source_;
  model_config config_;
  kernels::ops& ops_;
  std::vector<std::vector<float>> floats_;
  std::vector<std::vector<std::uint16_t>> halves_;
  std::vector<stored_weight> kept_;
};

/// The three weights of an MLP whose names begin with `prefix`: a dense layer's, the shared
/// experts' or one routed expert's.
expected<kernels::expert_weights> load_mlp(weight_store& store, const std::string& prefix,
                                           std::int32_t hidden_size,
                                           std::int32_t intermediate_size);

} // namespace troupe::model
