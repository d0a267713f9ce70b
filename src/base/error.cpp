#include "troupe/base/error.hpp"

#include "troupe/base/identity.hpp"

#include <fmt/format.h>

namespace troupe {

std::string_view to_string(error_code code) {
  switch (code) {
  case error_code::none: return "none";
  case error_code::invalid_request: return "invalid_request";
  case error_code::not_found: return "not_found";
  case error_code::too_large: return "too_large";
  case error_code::overloaded: return "overloaded";
  case error_code::deadline_exceeded: return "deadline_exceeded";
  case error_code::cancelled: return "cancelled";
  case error_code::peer_lost: return "peer_lost";
  case error_code::stale_epoch: return "stale_epoch";
  case error_code::unavailable: return "unavailable";
  case error_code::resource_exhausted: return "resource_exhausted";
  case error_code::io_failed: return "io_failed";
  case error_code::internal: return "internal";
  case error_code::invalid_config: return "invalid_config";
  case error_code::invalid_model: return "invalid_model";
  }
  return "unknown";
}

bool is_permanent(error_code code) {
  return code == error_code::invalid_config || code == error_code::invalid_model;
}

std::string error::text() const {
  std::string result = cause;
  if (!cure.empty())
    result += fmt::format(". {}", cure);
  result += fmt::format(" [{}", to_string(code));
  if (!origin.empty())
    result += fmt::format(", at {}", origin);
  return result + "]";
}

tl::unexpected<error> fail(error_code code, std::string cause, std::string cure) {
  return tl::unexpected<error>(
    error{code, std::move(cause), std::move(cure), host_name() + "/" + process_name()});
}

} // namespace troupe
