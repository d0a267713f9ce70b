#include "troupe/transport/address.hpp"

#include "troupe/transport/checksum.hpp"

#include <cstdint>
#include <cstring>
#include <span>

#include <fmt/format.h>

namespace troupe::transport {

namespace {

std::uint64_t sum_of(std::string_view text) {
  return checksum(std::as_bytes(std::span{text.data(), text.size()}));
}

} // namespace

std::string write_address(const proto::TransportAddress& address) {
  const auto content = address.SerializeAsString();
  const std::uint64_t sum = sum_of(content);
  std::string result(sizeof sum, '\0');
  std::memcpy(result.data(), &sum, sizeof sum);
  return result.append(content);
}

expected<proto::TransportAddress> read_address(std::string_view bytes) {
  proto::TransportAddress result;
  std::uint64_t sum = 0;
  if (bytes.size() > sizeof sum) {
    std::memcpy(&sum, bytes.data(), sizeof sum);
    const auto content = bytes.substr(sizeof sum);
    if (sum_of(content) == sum
        && result.ParseFromArray(content.data(), static_cast<int>(content.size())))
      return result;
  }
  return fail(error_code::invalid_request,
              fmt::format("a transport address of {} bytes is damaged", bytes.size()),
              "pass what endpoint::address() of the peer gave, unchanged");
}

} // namespace troupe::transport
