#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace troupe::transport {

/// XXH3, 64 bits, seed 0 (https://github.com/Cyan4973/xxHash), except that 0 becomes 1:
/// in a FrameHeader, 0 says that the sender computed none.
std::uint64_t checksum(std::span<const std::byte> bytes);

} // namespace troupe::transport
