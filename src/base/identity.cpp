#include "troupe/base/identity.hpp"

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include <unistd.h>

namespace troupe {

namespace {

const std::string& first_name() {
  static const auto& name = *new std::string{"troupe"};
  return name;
}

std::atomic<const std::string*> current_name{nullptr};

} // namespace

void set_process_name(std::string name) {
  // Every name stays alive, since somebody may still be reading it; there are few.
  static std::mutex mutex;
  static auto& names = *new std::vector<std::unique_ptr<const std::string>>;
  std::lock_guard lock(mutex);
  names.push_back(std::make_unique<const std::string>(std::move(name)));
  current_name.store(names.back().get(), std::memory_order_release);
}

const std::string& process_name() {
  const auto* name = current_name.load(std::memory_order_acquire);
  return name != nullptr ? *name : first_name();
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

std::uint64_t host_memory_bytes() {
  return static_cast<std::uint64_t>(::sysconf(_SC_PHYS_PAGES))
         * static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
}

} // namespace troupe
