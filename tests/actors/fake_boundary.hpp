#pragma once

#include "troupe/actors/stage.hpp"

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <catch2/catch.hpp>

/// Stages whose hidden rows stay "on the device", for tests whose computing threads are made up:
/// host memory plays the blocks of a node's keepers, the outboxes are real.
namespace troupe::test {

/// What the keepers of a node keep, and what came of it.
struct fake_blocks {
  struct block {
    std::uint64_t oldest = 0;
    std::vector<std::byte> bytes;
  };
  std::map<std::string, block> at;
  bool are_damaged = false; ///< from now on
  int num_fetched = 0;
  int num_gone = 0;
};

class fake_boundary final : public actors::boundary_device {
public:
  /// `cannot_map` says, when rows are fetched, whether this process is unable to.
  fake_boundary(std::shared_ptr<fake_blocks> blocks, std::string own, std::size_t element_bytes,
                std::function<bool()> cannot_map)
    : blocks_(std::move(blocks)),
      own_(std::move(own)),
      element_bytes_(element_bytes),
      cannot_map_(std::move(cannot_map)) {}

  void leave(std::size_t offset, std::uint64_t oldest, const kernels::rows_view& rows) override {
    auto& block = blocks_->at[own_];
    REQUIRE(block.oldest <= oldest);
    block.oldest = oldest;
    auto size = bytes_of(rows);
    if (block.bytes.size() < offset + size)
      block.bytes.resize(offset + size);
    std::memcpy(block.bytes.data() + offset, rows.data, size);
  }

  void read_back(std::size_t offset, std::int32_t num_rows, std::int32_t num_cols,
                 void* to) override {
    auto size = static_cast<std::size_t>(num_rows * num_cols) * element_bytes_;
    std::memcpy(to, blocks_->at.at(own_).bytes.data() + offset, size);
  }

  expected<void> fetch(const proto::DevicePlace& from, const kernels::rows_view& to) override {
    if (cannot_map_())
      return fail(error_code::unavailable, "no such memory here");
    const auto& block = blocks_->at[from.block()];
    auto size = bytes_of(to);
    if (block.oldest == 0 || block.oldest > from.ticket()) {
      ++blocks_->num_gone;
      return fail(error_code::stale_epoch, "the rows are gone");
    }
    if (blocks_->are_damaged)
      return fail(error_code::internal, "a NaN came");
    REQUIRE(from.offset() + size <= block.bytes.size());
    std::memcpy(to.data, block.bytes.data() + from.offset(), size);
    ++blocks_->num_fetched;
    return {};
  }

private:
  std::size_t bytes_of(const kernels::rows_view& rows) const {
    return static_cast<std::size_t>(rows.num_rows * rows.num_cols) * element_bytes_;
  }

  std::shared_ptr<fake_blocks> blocks_;
  std::string own_;
  std::size_t element_bytes_;
  std::function<bool()> cannot_map_;
};

/// What the computing thread of a process does before and after it computes, where the computation
/// itself knows nothing but payloads and buffers. Rows have one column.
class fake_hand_over {
public:
  /// Room for `num_rows` in steps of a few rows.
  fake_hand_over(std::shared_ptr<fake_blocks> blocks, const std::string& actor,
                 std::uint64_t incarnation, std::size_t element_bytes, std::size_t room,
                 std::function<bool()> cannot_map)
    : element_bytes_(element_bytes) {
    proto::DevicePlace block;
    block.set_keeper("a keeper");
    block.set_block(actor + "/boundary");
    block.set_block_bytes(room);
    device_ = std::make_shared<fake_boundary>(std::move(blocks), block.block(), element_bytes,
                                              std::move(cannot_map));
    outbox_ = std::make_shared<actors::boundary_outbox>(device_, block, incarnation, element_bytes);
  }

  /// `compute` as stage_compute would: with rows from wherever they lie.
  actors::stage_result
  work(actors::stage_work work,
       const std::function<actors::stage_result(const actors::stage_work&)>& compute) {
    actors::stage_result result;
    result.step = work.batch->step();
    if (work.left) {
      result.is_copy = true;
      result.output = new_buffer(static_cast<std::size_t>(work.left->num_rows));
      outbox_->read_back(*work.left, result.output->data());
      return result;
    }
    if (work.input && work.input->header.has_place()) {
      REQUIRE(work.input->payload.empty());
      auto num_rows = static_cast<std::int32_t>(work.input->header.num_rows());
      auto rows = std::make_shared<transport::frame>();
      rows->header = work.input->header;
      rows->payload = std::move(*new_buffer(static_cast<std::size_t>(num_rows)));
      auto fetched =
        device_->fetch(work.input->header.place(), {rows->payload.data(), num_rows, 1, 1});
      if (!fetched) {
        result.failure = std::make_shared<error>(fetched.error());
        result.input_is_lost = true;
        return result;
      }
      work.input = std::move(rows);
    }
    result = compute(work);
    if (!result.output || !work.stays_on_device)
      return result;
    auto num_rows = static_cast<std::int32_t>(result.output->size() / element_bytes_);
    result.left = outbox_->leave({result.output->data(), num_rows, 1, 1});
    if (result.left)
      result.output = nullptr;
    return result;
  }

  std::size_t num_left() const { return outbox_->num_left(); }

private:
  std::shared_ptr<transport::buffer> new_buffer(std::size_t num_rows) {
    transport::buffer_pool pool(1 << 20);
    return std::make_shared<transport::buffer>(std::move(*pool.take(num_rows * element_bytes_)));
  }

  std::size_t element_bytes_;
  std::shared_ptr<fake_boundary> device_;
  std::shared_ptr<actors::boundary_outbox> outbox_;
};

} // namespace troupe::test
