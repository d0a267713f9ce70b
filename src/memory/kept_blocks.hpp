#pragma once

#include "troupe/base/error.hpp"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace troupe::memory {

/// Memory of a device that other processes of the host can map.
struct device_block {
  std::shared_ptr<void> memory; ///< goes back to the device with the last copy
  std::string handle;           ///< by which others map it
};

/// New device memory. Fails with resource_exhausted when there is not that much.
using device_allocator = std::function<expected<device_block>(std::size_t bytes)>;

/// Which blocks of device memory exist, and for whom: the keeper's decisions. A block is known by
/// its name and by what is in it. Its memory is kept when its users end, for their successors,
/// until somebody else needs it.
///
///   asked for ──▶ open ──sealed──▶ open, whole ──last user ends──▶ kept ──memory runs out──▶ gone
///
/// Used by one thread.
class kept_blocks {
public:
  using user = std::uint64_t; ///< one connection

  explicit kept_blocks(device_allocator allocate) : allocate_(std::move(allocate)) {}

  /// What a user gets.
  struct grant {
    std::string handle;
    bool is_sealed = false;
  };

  /// The block of this name and content, new if there is none, and from now on in use by `who`. A
  /// block of that name that holds something else, or is of another size, is given up with its last
  /// user. When memory
  /// runs out, blocks that nobody uses are given up, the longest unused first.
  /// Errors: resource_exhausted, with numbers.
  expected<grant> open(user who, const std::string& name, const std::string& content,
                       std::size_t bytes);

  /// The content of a block is whole. Fails with invalid_request for one that `who` does not use.
  expected<void> seal(user who, const std::string& name);

  /// A user has ended, however.
  void close(user who);

  std::size_t num_blocks() const { return blocks_.size(); }
  std::size_t bytes() const;

private:
  struct block {
    device_block memory;
    std::string content;
    std::size_t bytes = 0;
    bool is_sealed = false;
    std::set<user> users;
    std::uint64_t last_used = 0; ///< when its last user ended
  };

  bool give_up_oldest();

  device_allocator allocate_;
  std::map<std::string, block> blocks_;
  std::vector<block> replaced_; ///< by others of their name, and still in use
  std::uint64_t clock_ = 0;     ///< counts ends of users
};

} // namespace troupe::memory
