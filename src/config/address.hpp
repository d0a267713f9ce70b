#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include <tl/expected.hpp>

namespace troupe::config {

struct endpoint {
  std::string host; ///< a name or an address; IPv6 without its brackets
  std::uint16_t port = 0;
};

/// Reads "host:port", "1.2.3.4:port" or "[::1]:port". The error says what is wrong and
/// what would be right.
tl::expected<endpoint, std::string> parse_endpoint(std::string_view text);

/// An IPv4 or IPv6 address in digits.
bool is_ip_address(const std::string& text);

/// A host name (RFC 1123) or an address in digits.
bool is_host(const std::string& text);

/// An address that stands for all of a machine's, such as 0.0.0.0.
bool is_wildcard(const std::string& host);

/// Whether `host` can only mean this machine.
bool is_this_machine(const std::string& host);

} // namespace troupe::config
