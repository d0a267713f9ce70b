#pragma once

#include "troupe/base/error.hpp"
#include "troupe/model/model_config.hpp"
#include "troupe/model/stored_weight.hpp"

#include <cstdint>
#include <string_view>

namespace troupe::model {

/// How a weight is cut into parts for the ranks that compute a stage together (tensor parallelism
/// as in Megatron-LM, arXiv 1909.08053): what makes heads or the inner width of an MLP by its rows,
/// what reads them by its columns, so that each rank has whole heads and whole inner columns, and
/// the results of the latter are parts of a sum. All else every rank has whole.
enum class weight_cut : std::uint8_t { whole, rows, cols };

/// By the name of a weight or of a bias. A bias of what is cut by columns is added by rank 0.
weight_cut cut_of(std::string_view name);

/// The config of one rank's part. Errors: invalid_config where heads or inner widths cannot be
/// cut into so many parts, naming what can be.
expected<model_config> rank_config(const model_config& whole, std::int32_t rank,
                                   std::int32_t num_ranks);

/// Rows [first, first + count). Where the cut goes through a block of scales, blocks become
/// smaller.
stored_weight cut_rows(stored_weight whole, std::int32_t first, std::int32_t count);

/// Columns [first, first + count), likewise. The elements are copied, or left out.
stored_weight cut_cols(stored_weight whole, std::int32_t first, std::int32_t count,
                       bool with_elements = true);

} // namespace troupe::model
