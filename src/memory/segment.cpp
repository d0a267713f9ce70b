#include "troupe/memory/segment.hpp"

#include "troupe/base/fault_point.hpp"

#include <cerrno>
#include <cstring>
#include <utility>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace troupe::memory {

segment::segment(unique_fd fd, std::size_t size, std::byte* data)
  : fd_(std::move(fd)), size_(size), data_(data) {}

segment::segment(segment&& other) noexcept
  : fd_(std::move(other.fd_)), size_(other.size_), data_(std::exchange(other.data_, nullptr)) {}

segment& segment::operator=(segment&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(size_, other.size_);
  std::swap(data_, other.data_);
  return *this;
}

segment::~segment() {
  if (data_ != nullptr)
    ::munmap(data_, size_);
}

expected<segment> segment::create(const std::string& name, std::size_t bytes) {
  auto fault = faults::hit(faults::point::allocation);
  if (fault && fault->what == faults::kind::fail)
    return fail(
      error_code::resource_exhausted,
      fmt::format("cannot create {} bytes of shared memory for {}: a drill", bytes, name));
  unique_fd fd(::memfd_create(name.c_str(), MFD_CLOEXEC));
  if (!fd || ::ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0)
    return fail(error_code::resource_exhausted,
                fmt::format("cannot create {} bytes of shared memory for {}: {}", bytes, name,
                            std::strerror(errno)),
                "lower serving.kv_tokens or free memory");
  return segment(std::move(fd), bytes, nullptr);
}

expected<segment> segment::map(unique_fd owned, std::size_t bytes) {
  int fd = owned.get();
  struct stat info {};
  if (::fstat(fd, &info) != 0)
    return fail(error_code::io_failed,
                fmt::format("shared memory descriptor {}: {}", fd, std::strerror(errno)));
  if (static_cast<std::size_t>(info.st_size) != bytes)
    return fail(
      error_code::io_failed,
      fmt::format("shared memory of {} bytes where {} are expected", info.st_size, bytes));
  void* data =
    bytes == 0 ? nullptr : ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED)
    return fail(
      error_code::resource_exhausted,
      fmt::format("cannot map {} bytes of shared memory: {}", bytes, std::strerror(errno)));
  return segment(std::move(owned), bytes, static_cast<std::byte*>(data));
}

expected<segment> segment::create_mapped(const std::string& name, std::size_t bytes) {
  auto made = create(name, bytes);
  if (!made)
    return made;
  return map(std::move(made->fd_), bytes);
}

expected<segment> segment::attach_from(std::uint32_t pid, int fd, std::size_t bytes) {
  auto path = fmt::format("/proc/{}/fd/{}", pid, fd);
  auto refuse = [&](const std::string& why) {
    return fail(error_code::io_failed,
                fmt::format("the memory of process {} at {}: {}", pid, path, why),
                "its owner must run, as the same user");
  };
  // Of anything else than memory, opening may have effects.
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0)
    return refuse(std::strerror(errno));
  if (!S_ISREG(info.st_mode))
    return refuse("it is no memory");
  unique_fd opened(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  if (!opened)
    return refuse(std::strerror(errno));
  auto attached = map(std::move(opened), bytes);
  if (!attached)
    return refuse(attached.error().cause);
  return attached;
}

} // namespace troupe::memory
