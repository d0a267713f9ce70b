#include "troupe/config/address.hpp"

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>

#include <arpa/inet.h>

#include <fmt/format.h>

#include "troupe/base/identity.hpp"
#include "troupe/config/report.hpp"

namespace troupe::config {

namespace {

bool parses_as(int family, const std::string& text) {
  std::array<unsigned char, sizeof(in6_addr)> address{};
  // inet_pton stops at a null byte, which must not hide the rest of the text.
  return text.find('\0') == std::string::npos
         && inet_pton(family, text.c_str(), address.data()) == 1;
}

bool is_host_name(std::string_view text) {
  if (text.empty() || text.size() > 253)
    return false;
  // Digits and dots alone can only be a broken address.
  if (std::ranges::all_of(text, [](unsigned char c) { return std::isdigit(c) || c == '.'; }))
    return false;
  while (true) {
    const std::string_view label = text.substr(0, text.find('.'));
    const bool legal = std::ranges::all_of(
      label, [](unsigned char c) { return std::isalnum(c) || c == '-' || c == '_'; });
    if (label.empty() || label.size() > 63 || !legal || label.starts_with('-')
        || label.ends_with('-'))
      return false;
    if (label.size() == text.size())
      return true;
    text.remove_prefix(label.size() + 1);
  }
}

} // namespace

bool is_ip_address(const std::string& text) {
  return parses_as(AF_INET, text) || parses_as(AF_INET6, text);
}

bool is_host(const std::string& text) {
  return is_host_name(text) || is_ip_address(text);
}

bool is_wildcard(const std::string& host) {
  return host == "0.0.0.0" || host == "::";
}

bool is_this_machine(const std::string& host) {
  return host == "localhost" || host == "::1" || host == host_name()
         || (host.starts_with("127.") && parses_as(AF_INET, host));
}

tl::expected<endpoint, std::string> parse_endpoint(std::string_view text) {
  const auto wrong = [&](std::string_view what) {
    return tl::unexpected(
      fmt::format("{} {}; HOST:PORT is needed, such as 127.0.0.1:8000", in_quotes(text), what));
  };
  const std::size_t colon = text.rfind(':');
  if (colon == std::string_view::npos || text.ends_with(']'))
    return wrong("has no port");
  endpoint result;
  result.host = text.substr(0, colon);
  if (result.host.empty())
    return wrong("has no host (0.0.0.0 stands for every interface)");
  const bool bracketed = result.host.starts_with('[') && result.host.ends_with(']');
  if (bracketed)
    result.host = result.host.substr(1, result.host.size() - 2);
  else if (result.host.find(':') != std::string::npos)
    return wrong("has an IPv6 address without [brackets] or more than one port");
  if (bracketed ? !parses_as(AF_INET6, result.host) : !is_host(result.host))
    return wrong(fmt::format("has the impossible host {}", in_quotes(result.host)));
  const std::string_view port = text.substr(colon + 1);
  std::uint32_t number = 0;
  const auto [rest, failure] = std::from_chars(port.data(), port.data() + port.size(), number);
  if (failure != std::errc{} || rest != port.data() + port.size() || number > 65535)
    return wrong(fmt::format("has the impossible port {} (0 to 65535)", in_quotes(port)));
  result.port = static_cast<std::uint16_t>(number);
  return result;
}

} // namespace troupe::config
