#pragma once

#include <cstdint>

#include "troupe/kernels/ops.hpp"

namespace troupe::kernels::cpu {

/// DeepSeek-V3's choice of experts for one row (`noaux_tc`: DeepSeek-V3 technical report, section
/// 2.1.2; inference/model.py of the release): groups are ranked by the sum of their
/// two best biased scores, experts of the kept groups by their biased score. Takes sigmoid
/// scores [num_experts]; `biased` is scratch, [num_experts + num_groups]. NaN ranks last.
/// Writes top_k experts, ascending, and their weights.
void choose_experts(const float* scores, const float* bias, const router_params& params,
                    float* biased, std::int32_t* experts, float* weights);

} // namespace troupe::kernels::cpu
