#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace troupe::kernels::cuda {

/// Zeroed memory of one GPU that `devices` reach at the same address (CUDA driver API, "Virtual
/// Memory Management"). Nothing else of these GPUs becomes reachable: where peer access is enabled
/// for everything, taking or giving back memory on one GPU can wait for the kernels of another.
/// Null where that fails, with the cause in `error`.
std::shared_ptr<std::byte> make_peer_memory(std::int32_t owner,
                                            std::span<const std::int32_t> devices,
                                            std::size_t bytes, std::string& error);

} // namespace troupe::kernels::cuda
