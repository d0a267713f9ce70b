#pragma once

#include "troupe/base/error.hpp"

#include <cstdint>
#include <string>

namespace troupe::placement {

/// What a GPU is to hold, in bytes, by kind.
struct device_need {
  std::uint64_t weights = 0;
  std::uint64_t kv_pages = 0;
  std::uint64_t scratch = 0;  ///< activations and what kernels want beside them
  std::uint64_t graphs = 0;   ///< steps recorded for repetition
  std::uint64_t contexts = 0; ///< of the processes that use the GPU

  std::uint64_t total() const { return weights + kv_pages + scratch + graphs + contexts; }
  device_need& operator+=(const device_need& other);
  friend bool operator==(const device_need&, const device_need&) = default;
};

/// What one process that uses a GPU takes of it for its context: code of kernels, stacks, and what
/// the driver keeps. Measured with CUDA 13 on Hopper: about 0.5 GB.
inline constexpr std::uint64_t context_bytes = 600'000'000;

/// What the steps of one actor take that are recorded, of so many layers: at most 64 of them.
constexpr std::uint64_t graph_bytes(std::uint64_t num_layers) {
  return 64 * (1'000'000 + num_layers * 100'000);
}

/// Whether a GPU has room for what it is to hold. `available` is what nobody else uses of it,
/// `kv_tokens` what the pages are for. Fails with invalid_config, since trying again does not help:
/// what is needed, what there is, and what to change, in the order of what it costs.
expected<void> check_device(const std::string& device, const device_need& need,
                            std::uint64_t available, std::uint32_t kv_tokens);

/// "weights 41.2 GB, KV pages 9.4 GB, ..."; kinds of which there is nothing are left out.
std::string describe(const device_need& need);

} // namespace troupe::placement
