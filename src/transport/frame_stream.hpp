#pragma once

#include "troupe/transport/inbox.hpp"
#include "troupe/transport/ring.hpp"
#include "troupe/transport/send_operation.hpp"

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <utility>

namespace troupe::transport {

/// Frames through a ring: for each the bytes of its header and of its payload as two numbers of 64
/// bit, then both. A frame may be larger than the ring.
class frame_writer {
public:
  explicit frame_writer(ring_writer into) : ring_(std::move(into)) {}

  const ring_writer& ring() const { return ring_; }

  /// No frame waits for room.
  bool is_idle() const { return waiting_.empty(); }

  /// A frame waits and there is room for more of it. Who goes to sleep asks once more: the reader
  /// has made room before it could see that somebody sleeps.
  bool can_push() const { return !is_idle() && ring_.has_room(); }

  /// Takes a frame behind those that wait. `push` writes it.
  void take(std::unique_ptr<send_operation> operation) { waiting_.push_back(std::move(operation)); }

  /// Writes what there is room for and ends the operations of frames that are written. True if
  /// anything was written: the reader is to be woken. What then still waits needs a wake-up of the
  /// reader.
  bool push();

  /// Ends the operations of frames that wait.
  void fail_all(const error& why);

private:
  bool write_front();

  ring_writer ring_;
  std::deque<std::unique_ptr<send_operation>> waiting_;
  std::size_t written_ = 0; ///< bytes of the first that waits
};

class frame_reader {
public:
  frame_reader(ring_reader from, inbox& into) : ring_(std::move(from)), inbox_(&into) {}

  bool is_ready() const { return ring_.is_ready(); }

  struct outcome {
    bool has_read = false;
    bool writer_waits = false; ///< and is to be woken
  };

  /// Hands the frames that are there to the inbox; at most what the ring holds.
  outcome poll();

  /// What comes makes no sense: nothing more will be read.
  bool is_damaged() const { return is_damaged_ || ring_.is_damaged(); }

private:
  enum class part : std::uint8_t { lengths, header, payload };

  void read(std::span<const std::byte> bytes);
  void keep(std::span<const std::byte> bytes);
  std::uint64_t part_bytes() const;
  void end_part();

  ring_reader ring_;
  inbox* inbox_;
  part part_ = part::lengths;     ///< which comes next
  std::uint64_t done_ = 0;        ///< bytes of it that have been read
  std::uint64_t lengths_[2] = {}; ///< of header and payload
  std::string header_;
  std::optional<frame> content_; ///< none: its payload is skipped
  bool is_damaged_ = false;
};

} // namespace troupe::transport
