#include "troupe/recovery/journal.hpp"

#include "troupe/base/fault_point.hpp"

#include <array>
#include <cerrno>
#include <cstring>
#include <optional>

#include <fcntl.h>
#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <sys/stat.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace troupe::recovery {

namespace {

/// Magic, then the version in the last byte.
constexpr std::string_view header{"troupe journal\n\x01", 16};

constexpr std::size_t frame_bytes = sizeof(std::uint32_t) + sizeof(std::uint64_t);

/// How much of a rewritten journal is gathered for one write.
constexpr std::size_t rewrite_chunk = std::size_t{1} << 20;

tl::unexpected<error> io_failure(const std::filesystem::path& file, const char* what, int number) {
  return fail(error_code::io_failed,
              fmt::format("{}: {}: {}", file.string(), what, std::strerror(number)));
}

/// The length is the seed, so that the checksum covers it too.
std::uint64_t checksum(std::string_view content) {
  return XXH3_64bits_withSeed(content.data(), content.size(), content.size());
}

void append_frame(std::string& out, std::string_view content) {
  const auto length = static_cast<std::uint32_t>(content.size());
  const auto sum = checksum(content);
  std::array<char, frame_bytes> head{};
  std::memcpy(head.data(), &length, sizeof(length));
  std::memcpy(head.data() + sizeof(length), &sum, sizeof(sum));
  out.append(head.data(), head.size()).append(content);
}

/// Reads whole frames from `bytes`, which begin with the header; the size up to the first
/// frame that is not whole.
std::size_t read_frames(std::string_view bytes, std::vector<std::string>& records) {
  std::size_t at = header.size();
  while (bytes.size() - at >= frame_bytes) {
    std::uint32_t length = 0;
    std::uint64_t sum = 0;
    std::memcpy(&length, bytes.data() + at, sizeof(length));
    std::memcpy(&sum, bytes.data() + at + sizeof(length), sizeof(sum));
    if (length > journal::max_record_bytes || bytes.size() - at - frame_bytes < length)
      break;
    const auto content = bytes.substr(at + frame_bytes, length);
    if (checksum(content) != sum)
      break;
    records.emplace_back(content);
    at += frame_bytes + length;
  }
  return at;
}

std::optional<std::string> read_all(int fd) {
  struct stat info {};
  if (::fstat(fd, &info) != 0)
    return std::nullopt;
  std::string bytes(static_cast<std::size_t>(info.st_size), '\0');
  std::size_t done = 0;
  while (done < bytes.size()) {
    const auto n = ::pread(fd, bytes.data() + done, bytes.size() - done, static_cast<off_t>(done));
    if (n < 0 && errno == EINTR)
      continue;
    if (n < 0)
      return std::nullopt;
    if (n == 0)
      break;
    done += static_cast<std::size_t>(n);
  }
  bytes.resize(done);
  return bytes;
}

/// Writes all bytes at `offset`; 0, or errno.
int write_all(int fd, std::string_view bytes, std::uint64_t offset, std::string_view name) {
  int injected = 0;
  if (auto f = faults::hit(faults::point::journal_write, name)) [[unlikely]] {
    switch (f->what) {
    case faults::kind::no_space: return ENOSPC;
    case faults::kind::io_error: return EIO;
    case faults::kind::short_write:
      bytes = bytes.substr(0, bytes.size() / 2);
      injected = ENOSPC;
      break;
    default: faults::carry_out(*f);
    }
  }
  while (!bytes.empty()) {
    const auto n = ::pwrite(fd, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR)
      continue;
    if (n < 0)
      return errno;
    bytes.remove_prefix(static_cast<std::size_t>(n));
    offset += static_cast<std::uint64_t>(n);
  }
  return injected;
}

expected<unique_fd> open_file(const std::filesystem::path& file, int flags) {
  unique_fd fd{::open(file.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | flags, 0600)};
  if (!fd)
    return io_failure(file, "cannot be opened", errno);
  return fd;
}

} // namespace

journal::journal(std::filesystem::path path, unique_fd fd, std::uint64_t size, bool has_rest)
  : path_(std::move(path)),
    name_(path_.filename().string()),
    fd_(std::move(fd)),
    size_(size),
    has_rest_(has_rest) {}

expected<journal> journal::open(const std::filesystem::path& file,
                                std::vector<std::string>& records) {
  records.clear();
  auto fd = open_file(file, 0);
  if (!fd)
    return tl::unexpected(fd.error());
  auto bytes = read_all(fd->get());
  if (!bytes)
    return io_failure(file, "cannot be read", errno);
  if (bytes->starts_with(header)) {
    const auto size = read_frames(*bytes, records);
    return journal{file, std::move(*fd), size, size < bytes->size()};
  }
  if (!header.starts_with(*bytes)) {
    auto aside = file;
    aside += ".damaged";
    spdlog::error("{} is not a journal of this version; it is moved to {}", file.string(),
                  aside.string());
    if (::rename(file.c_str(), aside.c_str()) != 0)
      return io_failure(file, "is damaged and cannot be moved aside", errno);
    fd = open_file(file, O_EXCL);
    if (!fd)
      return tl::unexpected(fd.error());
  }
  // New, or its writer died before the header was there.
  if (const int number = write_all(fd->get(), header, 0, file.filename().string()); number != 0)
    return io_failure(file, "cannot be written", number);
  return journal{file, std::move(*fd), header.size(), false};
}

expected<void> journal::repair() {
  if (!has_rest_)
    return {};
  if (::ftruncate(fd_.get(), static_cast<off_t>(size_)) != 0)
    return io_failure(path_, "an incomplete record cannot be cut off", errno);
  has_rest_ = false;
  return {};
}

expected<void> journal::append(std::string_view record) {
  if (record.size() > max_record_bytes)
    return fail(error_code::too_large,
                fmt::format("{}: a record of {} bytes is over the limit of {}", path_.string(),
                            record.size(), max_record_bytes));
  if (auto repaired = repair(); !repaired)
    return repaired;
  buffer_.clear();
  append_frame(buffer_, record);
  if (const int number = write_all(fd_.get(), buffer_, size_, name_); number != 0) {
    has_rest_ = true;
    repair(); // else the next append does
    return io_failure(path_, "cannot be written", number);
  }
  size_ += buffer_.size();
  return {};
}

expected<void> journal::rewrite(std::span<const std::string> records) {
  auto fresh = path_;
  fresh += ".new";
  auto fd = open_file(fresh, O_TRUNC);
  if (!fd)
    return tl::unexpected(fd.error());
  std::uint64_t size = 0;
  int number = 0;
  buffer_ = header;
  auto flush = [&] {
    number = write_all(fd->get(), buffer_, size, name_);
    size += buffer_.size();
    buffer_.clear();
    return number == 0;
  };
  for (const auto& record : records) {
    if (record.size() > max_record_bytes)
      number = EFBIG;
    else
      append_frame(buffer_, record);
    if (number != 0 || (buffer_.size() >= rewrite_chunk && !flush()))
      break;
  }
  if (number == 0)
    flush();
  if (number == 0 && ::rename(fresh.c_str(), path_.c_str()) != 0)
    number = errno;
  if (number != 0) {
    ::unlink(fresh.c_str());
    return io_failure(path_, "cannot be rewritten", number);
  }
  fd_ = std::move(*fd);
  size_ = size;
  has_rest_ = false;
  return {};
}

} // namespace troupe::recovery
