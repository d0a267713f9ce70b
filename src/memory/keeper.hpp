#pragma once

#include "troupe/base/error.hpp"
#include "troupe/base/unique_fd.hpp"
#include "troupe/memory/kept_blocks.hpp"

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>

/// The keeper of a GPU's memory is a process that owns weights and KV pages and computes nothing:
/// what it owns survives the death of those who compute, a sticky CUDA error of theirs included.
/// They ask for their blocks over a Unix socket in the abstract namespace, which leaves nothing in
/// the file system, and map them by handle. Only processes of the same user are answered.
namespace troupe::memory {

/// Where the keeper of device `index` listens that belongs to the node process `node_pid`.
std::string keeper_address(std::uint32_t node_pid, std::uint32_t index);

/// The keeper's life: listens at `address` and answers until `stop_fd` can be read. Blocks of a
/// process stay in use as long as its connection. `pci_bus_id`, where the device is, is for who
/// asks. Fails with io_failed when it cannot listen.
expected<void> serve_kept_blocks(const std::string& address, kept_blocks blocks, int stop_fd,
                                 const std::string& pci_bus_id = {});

/// How a keeper is.
struct keeper_report {
  std::uint64_t kept_bytes = 0;
  std::uint32_t num_blocks = 0;
  std::string pci_bus_id; ///< of its GPU: "0000:1b:00.0"
};

/// A connection to a keeper. Calls block, each with a deadline. Used by one thread.
class keeper_client {
public:
  /// What a keeper gets to answer: allocating tens of gigabytes takes a while.
  static constexpr std::chrono::milliseconds usual_answer_time{30'000};

  /// Waits until the keeper listens: the node starts it together with its workers. Fails with
  /// unavailable after `patience`.
  static expected<keeper_client> connect(const std::string& address,
                                         std::chrono::milliseconds patience,
                                         std::chrono::milliseconds answer_time = usual_answer_time);

  /// See kept_blocks. Further errors: peer_lost when the keeper is gone, deadline_exceeded.
  expected<kept_blocks::grant> open(const std::string& block, const std::string& content,
                                    std::size_t bytes);
  expected<void> seal(const std::string& block);

  /// What is kept, whoever uses it. After deadline_exceeded the connection is of no use any more.
  expected<keeper_report> report();

private:
  keeper_client(unique_fd socket, std::chrono::milliseconds answer_time)
    : socket_(std::move(socket)), answer_time_(answer_time) {}

  unique_fd socket_;
  std::chrono::milliseconds answer_time_;
};

} // namespace troupe::memory
