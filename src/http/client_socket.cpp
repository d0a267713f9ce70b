#include "troupe/http/client_socket.hpp"

#include <algorithm>
#include <cerrno>
#include <climits>
#include <memory>
#include <system_error>
#include <utility>

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <fmt/format.h>

#include "troupe/http/message.hpp"

namespace troupe::http {

namespace {

std::string text_of(int code) {
  return std::generic_category().message(code);
}

expected<client_socket::event> wait_for(int fd, short events, const std::string& where,
                                        client_socket::clock::time_point deadline) {
  using std::chrono::milliseconds;
  const auto left = std::chrono::ceil<milliseconds>(deadline - client_socket::clock::now());
  const auto timeout = std::clamp<milliseconds::rep>(left.count(), 0, INT_MAX);
  pollfd entry{fd, events, 0};
  const int found = poll(&entry, 1, static_cast<int>(timeout));
  if (found > 0)
    return client_socket::event::ready;
  if (found == 0)
    return client_socket::event::timed_out;
  if (errno == EINTR)
    return client_socket::event::interrupted;
  return fail(error_code::io_failed, fmt::format("cannot wait for {}: {}", where, text_of(errno)));
}

expected<void> connect_to(int fd, const addrinfo& address, const std::string& where,
                          client_socket::clock::time_point deadline) {
  int failure = 0;
  if (connect(fd, address.ai_addr, address.ai_addrlen) != 0)
    failure = errno;
  if (failure == EINPROGRESS || failure == EINTR) {
    for (;;) {
      const auto found = wait_for(fd, POLLOUT, where, deadline);
      if (!found)
        return tl::unexpected{found.error()};
      if (*found == client_socket::event::timed_out)
        return fail(error_code::deadline_exceeded,
                    fmt::format("{} did not accept the connection in time", where),
                    "check that the host is reachable and not overloaded");
      if (*found == client_socket::event::ready)
        break;
    }
    socklen_t size = sizeof failure;
    if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &failure, &size) != 0)
      failure = errno;
  }
  if (failure == 0)
    return {};
  if (failure == ECONNREFUSED)
    return fail(error_code::unavailable, fmt::format("{} refused the connection", where),
                "check the address, and that the server runs");
  return fail(error_code::unavailable,
              fmt::format("cannot connect to {}: {}", where, text_of(failure)),
              "check the address and the network");
}

} // namespace

expected<client_socket> client_socket::connect(const std::string& host, const std::string& port,
                                               clock::time_point deadline) {
  const auto where = host.find(':') == host.npos ? host + ":" + port : "[" + host + "]:" + port;
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV | AI_ADDRCONFIG;
  addrinfo* found = nullptr;
  if (const int code = getaddrinfo(host.c_str(), port.c_str(), &hints, &found); code != 0)
    return fail(error_code::unavailable,
                fmt::format("cannot resolve {}: {}", where, gai_strerror(code)),
                "check the host name");
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> addresses{found, &freeaddrinfo};
  auto last = error{error_code::unavailable, fmt::format("{} has no address", where), {}, {}};
  for (const addrinfo* address = found; address; address = address->ai_next) {
    const int fd =
      socket(address->ai_family, address->ai_socktype | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) {
      last = fail(error_code::io_failed,
                  fmt::format("cannot open a socket for {}: {}", where, text_of(errno)))
               .value();
      continue;
    }
    client_socket result{fd, where};
    const int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on); // only speed depends on it
    if (auto done = connect_to(fd, *address, where, deadline))
      return result;
    else
      last = std::move(done.error());
  }
  return tl::unexpected{std::move(last)};
}

client_socket::client_socket(client_socket&& other) noexcept
  : fd_(std::exchange(other.fd_, -1)), where_(std::move(other.where_)) {}

client_socket::~client_socket() {
  if (fd_ >= 0)
    close(fd_);
}

expected<client_socket::event> client_socket::wait(bool for_write, clock::time_point deadline) {
  return wait_for(fd_, for_write ? POLLIN | POLLOUT : POLLIN, where_, deadline);
}

client_socket::progress client_socket::write_some(std::string_view bytes) {
  const auto num_bytes = send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
  if (num_bytes >= 0)
    return {status::moved, static_cast<std::size_t>(num_bytes)};
  if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)
    return {status::blocked};
  return {status::closed};
}

client_socket::progress client_socket::read_some(char* data, std::size_t size) {
  const auto num_bytes = recv(fd_, data, size, 0);
  if (num_bytes > 0)
    return {status::moved, static_cast<std::size_t>(num_bytes)};
  if (num_bytes == 0)
    return {status::closed};
  if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)
    return {status::blocked};
  return {status::reset};
}

} // namespace troupe::http
