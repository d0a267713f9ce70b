#pragma once

#include "troupe/base/error.hpp"
#include "troupe/kernels/made_weight.hpp"
#include "troupe/model/safetensors.hpp"

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>

namespace troupe::model {

/// A matrix that nobody has stored, and how its elements and scales come about.
struct made_tensor {
  kernels::element_type type = kernels::element_type::bf16;
  kernels::weight_recipe recipe; ///< of all of it
  std::size_t num_tensors = 0;   ///< that stand for it: itself, and its scales
  std::uint64_t num_bytes = 0;   ///< of these
};

/// Tensors by name: a checkpoint on disk, or one made up for measurements. Any thread may use it.
class tensor_source {
public:
  virtual ~tensor_source() = default;

  virtual bool contains(const std::string& tensor) const = 0;

  /// A view valid as long as this object. Errors: invalid_model naming the tensor and where it
  /// was looked for; io_failed.
  virtual expected<tensor_view> tensor(const std::string& name) = 0;

  /// How a matrix ("....weight") is made, if this source makes it up: for those who can do without
  /// its elements. Nothing for all others.
  virtual std::optional<made_tensor> recipe(const std::string& /*name*/) const {
    return std::nullopt;
  }

  /// Where a tensor is, for errors: its file, or what stands for one.
  virtual std::string file_of(const std::string& tensor) const = 0;
};

/// Opens the weights of a model: of a Hugging Face directory, or "random:FILE" for made-up ones
/// of the shapes that the config.json FILE gives (random_weights.hpp).
/// Errors: as checkpoint::open; for made-up ones as load_model_config.
expected<std::shared_ptr<tensor_source>> open_weights(const std::filesystem::path& model);

} // namespace troupe::model
