#include "troupe/transport/checksum.hpp"

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace troupe::transport {

std::uint64_t checksum(std::span<const std::byte> bytes) {
  const std::uint64_t hash = XXH3_64bits(bytes.data(), bytes.size());
  return hash == 0 ? 1 : hash;
}

} // namespace troupe::transport
