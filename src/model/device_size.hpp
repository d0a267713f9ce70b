#pragma once

#include "troupe/model/model_config.hpp"
#include "troupe/model/stage_model.hpp"
#include "troupe/model/weights.hpp"

#include <cstdint>

/// What a GPU needs for a model with either kind of numerics, known from its config alone, so that
/// too little memory is found out before anything is read. Follows what kernels/cuda does with
/// weights (`place`) and with scratch memory, and is a little above it.
namespace troupe::model {

/// What the weights of a part take as a GPU keeps them: rows and columns in whole tiles, wide where
/// it expands them, in blocks of which some are not full.
std::uint64_t device_weight_bytes(const model_config& config, const model_part& part,
                                  kernels::numerics mode = kernels::numerics::fast);

/// What a stage takes beside weights and KV pages, with the room for the largest micro-batch that
/// it is given.
std::uint64_t device_scratch_bytes(const model_config& config, const stage_options& options,
                                   kernels::numerics mode = kernels::numerics::fast);

/// The same of an expert group of so many experts, to which stages send max_rows rows at a time.
std::uint64_t device_scratch_bytes(const model_config& config, std::int32_t num_experts,
                                   std::int32_t max_rows,
                                   kernels::numerics mode = kernels::numerics::fast);

} // namespace troupe::model
