#pragma once

#include "troupe/base/error.hpp"
#include "troupe/model/conversion_plan.hpp"
#include "troupe/model/quantize.hpp"
#include "troupe/model/tensor_source.hpp"

#include <cstddef>
#include <vector>

namespace troupe::model {

/// The bytes that a conversion writes for one tensor of its source.
struct converted_tensor {
  std::vector<std::vector<std::byte>> outputs; ///< as planned_tensor::outputs
  rounding_loss loss;                          ///< of quantized ones
};

/// Makes them; nothing for a tensor that is only copied. Reads rows a few at a time: beside its
/// result it needs a byte for each element of the tensor. Any thread.
/// Errors: as find_weight; invalid_model for a value that is not finite.
expected<converted_tensor> convert_tensor(tensor_source& source, const model_config& config,
                                          const integer_format& format,
                                          const planned_tensor& tensor);

} // namespace troupe::model
