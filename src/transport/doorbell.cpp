#include "troupe/transport/doorbell.hpp"

#include <atomic>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <random>
#include <string>
#include <utility>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

namespace troupe::transport {

namespace {

struct bell_memory {
  std::uint64_t mark;
  std::atomic<std::uint32_t> who;
};
static_assert(std::atomic<std::uint32_t>::is_always_lock_free);

bell_memory& memory_of(const memory::segment& mapped) {
  return *reinterpret_cast<bell_memory*>(mapped.bytes().data());
}

/// Of which kernel, since when, and of which of its tables of processes.
std::string host() {
  std::string boot;
  std::ifstream{"/proc/sys/kernel/random/boot_id"} >> boot;
  struct stat table {};
  if (boot.empty() || ::stat("/proc/self/ns/pid", &table) != 0)
    return {};
  return fmt::format("{}/{}", boot, table.st_ino);
}

std::size_t index_of(listener who) {
  return who == listener::foreground ? 1 : 0;
}

} // namespace

expected<doorbell> doorbell::open() {
  auto made = memory::segment::create_mapped("troupe-doorbell", sizeof(bell_memory));
  if (!made)
    return tl::unexpected(std::move(made).error());
  doorbell result{std::move(*made)};
  for (std::size_t i = 0; i < result.read_ends_.size(); ++i) {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0)
      return fail(error_code::resource_exhausted,
                  fmt::format("creating a pipe: {}", std::strerror(errno)),
                  "raise the limit of open files");
    result.read_ends_[i] = unique_fd{ends[0]};
    result.write_ends_[i] = unique_fd{ends[1]};
  }
  auto& place = result.place_;
  place.set_host(host());
  place.set_pid(static_cast<std::uint32_t>(::getpid()));
  place.set_doorbell(static_cast<std::uint32_t>(result.memory_.fd()));
  place.set_background_bell(static_cast<std::uint32_t>(result.read_ends_[0].get()));
  place.set_foreground_bell(static_cast<std::uint32_t>(result.read_ends_[1].get()));
  std::random_device random;
  place.set_mark(std::uint64_t{random()} << 32U | random());
  memory_of(result.memory_).mark = place.mark();
  return result;
}

int doorbell::fd(listener who) const {
  return read_ends_[index_of(who)].get();
}

void doorbell::listen(listener who) {
  memory_of(memory_).who.store(static_cast<std::uint32_t>(who), std::memory_order_seq_cst);
}

expected<neighbour> neighbour::open(const proto::HostPlace& place) {
  const auto refuse = [&](const std::string& why) {
    return fail(error_code::not_found,
                fmt::format("process {} is no neighbour: {}", place.pid(), why));
  };
  if (place.host().empty() || place.host() != host())
    return refuse("it runs elsewhere");
  auto mapped = memory::segment::attach_from(place.pid(), static_cast<int>(place.doorbell()),
                                             sizeof(bell_memory));
  if (!mapped)
    return refuse(mapped.error().cause);
  if (memory_of(*mapped).mark != place.mark())
    return refuse("another process has its id now");
  neighbour result{std::move(*mapped)};
  result.pid_ = place.pid();
  const std::array fds = {place.background_bell(), place.foreground_bell()};
  for (std::size_t i = 0; i < fds.size(); ++i) {
    const auto path = fmt::format("/proc/{}/fd/{}", place.pid(), fds[i]);
    // Of anything else than a pipe, opening may have effects.
    struct stat info {};
    if (::stat(path.c_str(), &info) != 0 || !S_ISFIFO(info.st_mode))
      return refuse(fmt::format("{} is no pipe", path));
    // A pipe that one reads as well sends no SIGPIPE when the other end goes.
    result.bells_[i] = unique_fd{::open(path.c_str(), O_RDWR | O_NONBLOCK | O_CLOEXEC)};
    if (!result.bells_[i])
      return refuse(fmt::format("{}: {}", path, std::strerror(errno)));
  }
  return result;
}

void neighbour::ring() {
  auto& who = memory_of(memory_).who;
  if (who.load(std::memory_order_seq_cst) == 0)
    return;
  const auto listening = static_cast<listener>(who.exchange(0));
  if (listening != listener::background && listening != listener::foreground)
    return;
  const std::byte ring{1};
  // A full pipe wakes as well, and a process that is gone is heard of by UCX.
  [[maybe_unused]] const auto size = ::write(bells_[index_of(listening)].get(), &ring, 1);
}

} // namespace troupe::transport
