#pragma once

#include "troupe/base/error.hpp"

#include <string>
#include <string_view>

#include <transport.pb.h>

namespace troupe::transport {

/// An address as bytes with a check sum, since UCX trusts its part of it.
std::string write_address(const proto::TransportAddress& address);

/// Fails with invalid_request where the bytes are not those that were written.
expected<proto::TransportAddress> read_address(std::string_view bytes);

} // namespace troupe::transport
