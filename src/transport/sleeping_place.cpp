#include "troupe/transport/sleeping_place.hpp"

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>

#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

namespace troupe::transport {

namespace {

tl::unexpected<error> system_failure(std::string_view call) {
  return fail(error_code::io_failed, fmt::format("{}: {}", call, std::strerror(errno)),
              "raise the limit of open files");
}

bool control(int poll, int how, int fd, bool wakes) {
  epoll_event event{};
  event.events = wakes ? EPOLLIN : 0U;
  event.data.fd = fd;
  return ::epoll_ctl(poll, how, fd, &event) == 0;
}

} // namespace

sleeping_place::sleeping_place()
  : poll_(::epoll_create1(EPOLL_CLOEXEC)), wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}

expected<void> sleeping_place::open(int network, int bell) {
  if (!poll_ || !wake_)
    return system_failure("creating event descriptors");
  network_ = network;
  bell_ = bell;
  for (const int fd : {network_, wake_.get(), bell_})
    if (fd >= 0 && !control(poll_.get(), EPOLL_CTL_ADD, fd, true))
      return system_failure("watching an event descriptor");
  return {};
}

void sleeping_place::watch_network(bool wakes) {
  if (wakes == watches_network_)
    return;
  watches_network_ = wakes;
  if (!control(poll_.get(), EPOLL_CTL_MOD, network_, wakes))
    spdlog::error("transport: {}", system_failure("watching an event descriptor").value().text());
}

bool sleeping_place::sleep(std::chrono::milliseconds limit) {
  epoll_event events[3];
  const int count = ::epoll_wait(poll_.get(), events, 3,
                                 static_cast<int>(std::max<std::int64_t>(limit.count(), 0)));
  bool network_spoke = count <= 0; // nothing in so long is looked into
  for (int i = 0; i < count; ++i) {
    const int fd = events[i].data.fd;
    network_spoke |= fd == network_;
    // Who woke this thread has done so, however often.
    std::byte rings[64];
    if (fd == wake_.get() || fd == bell_)
      while (::read(fd, rings, sizeof rings) == sizeof rings) {
      }
  }
  return network_spoke;
}

void sleeping_place::wake() {
  ::eventfd_write(wake_.get(), 1);
}

} // namespace troupe::transport
