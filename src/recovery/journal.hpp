#pragma once

#include "troupe/base/error.hpp"
#include "troupe/base/unique_fd.hpp"

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace troupe::recovery {

/// An append-only file of records that survives the death of its writer at any byte: each
/// record is a frame of length, checksum (XXH3 over length and content) and content, behind a
/// header that names format and version. Reading ends at the first frame that is not whole; what
/// lies behind it is cut off when writing goes on.
///
/// Written without fsync: the page cache outlives the process, which is what it is for.
/// For one thread.
class journal {
public:
  static constexpr std::size_t max_record_bytes = std::size_t{64} << 20;

  /// Opens or creates the file and reads the records that are whole into `records` (cleared
  /// first). Fails with io_failed. A file that is not a journal of this version at all is moved
  /// aside
  /// (".damaged") and begun anew.
  static expected<journal> open(const std::filesystem::path& file,
                                std::vector<std::string>& records);

  /// Appends a record, whole or not at all: after a failure the file is as before (a short write is
  /// cut off; if even that fails, the next append tries again first). Fails with io_failed, naming
  /// errno, or with too_large. One write, no allocation once the buffer has grown.
  expected<void> append(std::string_view record);

  /// Replaces the content by these records, atomically (a new file, renamed over the old). After
  /// a failure the journal is as before.
  expected<void> rewrite(std::span<const std::string> records);

  /// Bytes of the file.
  std::uint64_t size() const { return size_; }
  const std::filesystem::path& path() const { return path_; }

private:
  journal(std::filesystem::path path, unique_fd fd, std::uint64_t size, bool has_rest);

  /// Cuts off what lies behind the last whole record.
  expected<void> repair();

  std::filesystem::path path_;
  std::string name_; ///< of the file, as the peer of the fault point
  unique_fd fd_;
  std::uint64_t size_ = 0; ///< of what is known to be whole
  bool has_rest_ = false;  ///< more lies behind it
  std::string buffer_;     ///< of the frame being written
};

} // namespace troupe::recovery
