#pragma once

#include "troupe/memory/keeper.hpp"

#include <catch2/catch.hpp>

#include <cstddef>
#include <cstdlib>
#include <functional>
#include <string>
#include <thread>
#include <utility>

#include <unistd.h>

namespace troupe::testing {

/// What kind of machine fake_nvml.cpp pretends to be on, for a while.
class fake_machine {
public:
  explicit fake_machine(const char* kind) { ::setenv("FAKE_NVML", kind, 1); }
  ~fake_machine() { ::unsetenv("FAKE_NVML"); }
  fake_machine(const fake_machine&) = delete;
  fake_machine& operator=(const fake_machine&) = delete;
};

/// A keeper in a thread of its own, of a device with room for anything.
class thread_keeper {
public:
  /// `before` is called before every allocation.
  thread_keeper(
    std::string address, std::string bus_id, std::function<void()> before = [] {}) {
    REQUIRE(::pipe(stop_) == 0);
    thread_ = std::thread(
      [this, address = std::move(address), bus_id = std::move(bus_id), before = std::move(before)] {
        auto allocate = [before](std::size_t) -> expected<memory::device_block> {
          before();
          return memory::device_block{std::make_shared<char>(), "handle"};
        };
        ended_well_ =
          memory::serve_kept_blocks(address, memory::kept_blocks(allocate), stop_[0], bus_id)
            .has_value();
      });
  }
  ~thread_keeper() {
    CHECK(::write(stop_[1], "x", 1) == 1);
    thread_.join();
    CHECK(ended_well_);
    ::close(stop_[0]);
    ::close(stop_[1]);
  }
  thread_keeper(const thread_keeper&) = delete;
  thread_keeper& operator=(const thread_keeper&) = delete;

private:
  int stop_[2]{};
  bool ended_well_ = false;
  std::thread thread_;
};

} // namespace troupe::testing
