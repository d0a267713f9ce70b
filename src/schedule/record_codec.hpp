#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

namespace troupe::schedule {

/// Appends values to a record: integers as LEB128 (7 bits a byte, lowest first), signed ones
/// zigzag-coded before that, texts behind their length.
class record_writer {
public:
  explicit record_writer(std::string& out) : out_(out) {}

  void put_byte(std::uint8_t value) { out_ += static_cast<char>(value); }

  void put(std::uint64_t value) {
    for (; value >= 0x80; value >>= 7U)
      put_byte(static_cast<std::uint8_t>(value | 0x80U));
    put_byte(static_cast<std::uint8_t>(value));
  }

  void put_signed(std::int64_t value) {
    put((static_cast<std::uint64_t>(value) << 1U) ^ static_cast<std::uint64_t>(value >> 63));
  }

  void put_float(float value) {
    char bytes[sizeof(value)];
    std::memcpy(bytes, &value, sizeof(value));
    out_.append(bytes, sizeof(value));
  }

  void put_text(std::string_view text) {
    put(text.size());
    out_.append(text);
  }

private:
  std::string& out_;
};

/// Reads what a record_writer wrote. Past the end, or where a value cannot be, everything reads
/// as zero and `ok` turns false for good.
class record_reader {
public:
  explicit record_reader(std::string_view bytes) : rest_(bytes) {}

  bool ok() const { return ok_; }
  bool at_end() const { return rest_.empty(); }
  std::size_t num_left() const { return rest_.size(); }

  std::uint8_t byte() {
    if (rest_.empty()) {
      ok_ = false;
      return 0;
    }
    const auto value = static_cast<std::uint8_t>(rest_.front());
    rest_.remove_prefix(1);
    return value;
  }

  std::uint64_t integer() {
    std::uint64_t value = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
      const auto b = byte();
      value |= static_cast<std::uint64_t>(b & 0x7fU) << shift;
      if ((b & 0x80U) == 0)
        return value;
    }
    ok_ = false;
    return 0;
  }

  std::int64_t signed_integer() {
    const auto value = integer();
    return static_cast<std::int64_t>((value >> 1U) ^ (~(value & 1U) + 1));
  }

  float real() {
    float value = 0;
    const auto bytes = take(sizeof(value));
    if (bytes.size() == sizeof(value))
      std::memcpy(&value, bytes.data(), sizeof(value));
    return value;
  }

  std::string_view text() { return take(integer()); }

private:
  std::string_view take(std::uint64_t size) {
    if (size > rest_.size()) {
      ok_ = false;
      rest_ = {};
      return {};
    }
    const auto part = rest_.substr(0, size);
    rest_.remove_prefix(size);
    return part;
  }

  std::string_view rest_;
  bool ok_ = true;
};

} // namespace troupe::schedule
