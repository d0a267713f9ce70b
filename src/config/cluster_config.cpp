#include "troupe/config/cluster_config.hpp"

#include <fmt/format.h>

namespace troupe::config {

std::string device::name() const {
  return fmt::format("{}:{}", kind == device_kind::cpu ? "cpu" : "cuda", index);
}

std::string cluster_config::where(std::string_view key) const {
  while (true) {
    if (const auto found = positions.find(key); found != positions.end())
      return found->second;
    const std::size_t dot = key.rfind('.');
    if (dot == std::string_view::npos)
      return file;
    key = key.substr(0, dot);
  }
}

} // namespace troupe::config
