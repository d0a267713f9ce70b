#pragma once

#include "troupe/base/error.hpp"
#include "troupe/base/unique_fd.hpp"
#include "troupe/model/conversion_plan.hpp"

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace troupe::model {

/// What a finished file holds.
struct file_seal {
  std::uint64_t num_bytes = 0;
  std::string checksum; ///< XXH3, 64 bits, seed 0, as 16 hexadecimal digits

  bool operator==(const file_seal&) const = default;
};

/// Writes one file under a temporary name and gives it its own when it is whole and on the disk, so
/// that a file that has its name is complete. For one thread. What is not finished is removed with
/// the object, or overwritten by the next writer of that name.
/// Errors: io_failed naming the file, with what to do where the disk is full.
class file_writer {
public:
  static expected<file_writer> create(const std::filesystem::path& file);

  file_writer(file_writer&&) noexcept;
  file_writer& operator=(file_writer&&) = delete;
  ~file_writer();

  expected<void> write(std::span<const std::byte> bytes);
  expected<file_seal> finish();

private:
  struct hash_state;

  explicit file_writer(std::filesystem::path file);
  tl::unexpected<error> failed(const char* what, int reason) const;

  std::filesystem::path file_;
  std::filesystem::path temporary_;
  unique_fd descriptor_;
  std::unique_ptr<hash_state> hash_;
  std::uint64_t num_bytes_ = 0;
};

/// Writes a whole file in this way.
expected<file_seal> write_whole_file(const std::filesystem::path& file, std::string_view text);

/// Reads a file to the end. Errors: io_failed.
expected<file_seal> seal_of(const std::filesystem::path& file);

/// The checksum of bytes in memory, as in a seal.
std::string checksum_of(std::span<const std::byte> bytes);

/// The header of a safetensors file (format: huggingface/safetensors, README "Format") with these
/// tensors one behind the other: eight bytes of length, then JSON, padded to a multiple of eight.
std::string safetensors_header(std::span<const stored_tensor> tensors);

} // namespace troupe::model
