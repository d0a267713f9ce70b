#include "troupe/base/identity.hpp"

#include <array>

#include <unistd.h>

namespace troupe {

namespace {

std::string& name_storage() {
  static std::string name = "troupe";
  return name;
}

} // namespace

void set_process_name(std::string name) {
  name_storage() = std::move(name);
}

const std::string& process_name() {
  return name_storage();
}

const std::string& host_name() {
  static const std::string name = [] {
    std::array<char, 256> buffer{};
    if (gethostname(buffer.data(), buffer.size() - 1) != 0)
      return std::string{"localhost"};
    return std::string{buffer.data()};
  }();
  return name;
}

} // namespace troupe
