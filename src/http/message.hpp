#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace troupe::http {

/// One header field; names compare without regard to case.
struct header {
  std::string name;
  std::string value;
};

using header_list = std::vector<header>;

/// The value of the first field called `name`, or nothing. The view lives as
/// long as the list.
std::optional<std::string_view> find_header(const header_list& headers, std::string_view name);

/// A request that arrived completely. A plain value: it may be moved to any thread.
struct request {
  std::string method;  ///< as sent, for instance "POST"; unknown methods are passed on
  std::string target;  ///< as sent, for instance "/v1/models?limit=2"
  std::string path;    ///< the target without its query, percent-decoded
  std::string query;   ///< what follows '?', as sent
  header_list headers; ///< in the order sent
  std::string body;    ///< with any transfer coding removed
  std::string peer;    ///< "address:port" of the client, for logs

  /// The value of the first field called `name`, or nothing.
  std::optional<std::string_view> header(std::string_view name) const;

  /// The decoded value of query parameter `name` ('+' is a space), or nothing.
  std::optional<std::string> query_value(std::string_view name) const;
};

/// Replaces %XX by the byte that it names; a '%' that no two hexadecimal digits
/// follow stays as it is.
std::string percent_decode(std::string_view text, bool plus_is_space = false);

/// An error body as OpenAI's API has it:
/// {"error":{"message":…,"type":…,"param":null,"code":…}}. Bytes of `message`
/// that are not UTF-8 are replaced. An empty `code` becomes null.
std::string error_json(std::string_view message, std::string_view type, std::string_view code);

/// "host:port", with brackets around a host that contains colons (IPv6).
std::string host_port(std::string_view host, unsigned port);

} // namespace troupe::http
