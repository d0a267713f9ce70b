#include "troupe/memory/kept_blocks.hpp"

#include <fmt/format.h>

namespace troupe::memory {

expected<kept_blocks::grant> kept_blocks::open(user who, const std::string& name,
                                               const std::string& content, std::size_t bytes) {
  auto found = blocks_.find(name);
  if (found != blocks_.end()
      && (found->second.content != content || found->second.bytes != bytes)) {
    // Memory that a process still maps must not go back to the device under it.
    if (!found->second.users.empty())
      replaced_.push_back(std::move(found->second));
    blocks_.erase(found);
    found = blocks_.end();
  }
  if (found == blocks_.end()) {
    auto made = allocate_(bytes);
    while (!made && made.error().code == error_code::resource_exhausted && give_up_oldest())
      made = allocate_(bytes);
    if (!made) {
      auto why = std::move(made.error());
      why.cause = fmt::format("no {} bytes for {}: {}; {} blocks of {} bytes in all are in use",
                              bytes, name, why.cause, num_blocks(), this->bytes());
      return tl::unexpected(std::move(why));
    }
    block fresh;
    fresh.memory = std::move(*made);
    fresh.content = content;
    fresh.bytes = bytes;
    found = blocks_.emplace(name, std::move(fresh)).first;
  }
  auto& b = found->second;
  b.users.insert(who);
  return grant{b.memory.handle, b.is_sealed};
}

expected<void> kept_blocks::seal(user who, const std::string& name) {
  auto found = blocks_.find(name);
  if (found == blocks_.end() || found->second.users.count(who) == 0)
    return fail(error_code::invalid_request,
                fmt::format("{} is to be sealed by somebody who does not use it", name));
  found->second.is_sealed = true;
  return {};
}

void kept_blocks::close(user who) {
  ++clock_;
  for (auto& [name, b] : blocks_)
    if (b.users.erase(who) > 0)
      b.last_used = clock_;
  for (auto& b : replaced_)
    b.users.erase(who);
  std::erase_if(replaced_, [](const block& b) { return b.users.empty(); });
}

bool kept_blocks::give_up_oldest() {
  auto oldest = blocks_.end();
  for (auto b = blocks_.begin(); b != blocks_.end(); ++b)
    if (b->second.users.empty()
        && (oldest == blocks_.end() || b->second.last_used < oldest->second.last_used))
      oldest = b;
  if (oldest == blocks_.end())
    return false;
  blocks_.erase(oldest);
  return true;
}

std::size_t kept_blocks::bytes() const {
  std::size_t sum = 0;
  for (const auto& [name, b] : blocks_)
    sum += b.bytes;
  for (const auto& b : replaced_)
    sum += b.bytes;
  return sum;
}

} // namespace troupe::memory
