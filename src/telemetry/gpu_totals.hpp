#pragma once

#include "troupe/telemetry/nvml.hpp"

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace troupe::telemetry {

/// How much memory this host's GPUs have, by CUDA's numbers, as the driver says without a CUDA
/// context. An entry is nullopt where it does not say, or where it cannot be told which GPU it is
/// (visible_gpus); all of them are missing where there is no driver, or none that answers within
/// `patience`.
std::vector<std::optional<std::uint64_t>>
gpu_totals(std::chrono::milliseconds patience, const std::string& library = nvml::usual_library,
           const cuda_environment& environment = cuda_environment::current());

} // namespace troupe::telemetry
