#include "troupe/memory/keeper.hpp"

#include "keeper.pb.h"

#include <array>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <map>
#include <thread>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <poll.h>
#include <spdlog/spdlog.h>
#include <sys/socket.h>
#include <sys/un.h>

namespace troupe::memory {

namespace {

using steady = std::chrono::steady_clock;

/// Names, a handle and an error's words fit many times over.
constexpr std::size_t max_datagram = 64 * 1024;

/// What the keeper gives a worker to take an answer.
constexpr timeval taking_time{1, 0};

constexpr auto connect_interval = std::chrono::milliseconds(10);

constexpr int max_waiting = 64;

std::string errno_text() {
  return std::strerror(errno);
}

struct abstract_address {
  sockaddr_un name{};
  socklen_t size = 0;

  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&name); }
};

expected<abstract_address> make_address(const std::string& text) {
  abstract_address result;
  if (text.empty() || text.size() + 1 > sizeof(result.name.sun_path))
    return fail(error_code::internal, fmt::format("\"{}\" is no address of a keeper", text));
  result.name.sun_family = AF_UNIX;
  // A zero in front: a name that no file stands for.
  std::memcpy(result.name.sun_path + 1, text.data(), text.size());
  result.size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + text.size());
  return result;
}

unique_fd new_socket() {
  return unique_fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
}

bool is_own_user(int socket) {
  ucred peer{};
  socklen_t size = sizeof(peer);
  return ::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0
         && peer.uid == ::geteuid();
}

bool send_whole(int socket, const google::protobuf::MessageLite& message) {
  const auto bytes = message.SerializeAsString();
  return ::send(socket, bytes.data(), bytes.size(), MSG_NOSIGNAL)
         == static_cast<ssize_t>(bytes.size());
}

/// The size of the datagram received; 0 at the end of the connection, negative for an error.
ssize_t receive(int socket, std::vector<char>& buffer) {
  buffer.resize(max_datagram);
  ssize_t count = 0;
  do
    count = ::recv(socket, buffer.data(), buffer.size(), 0);
  while (count < 0 && errno == EINTR);
  return count;
}

void put_error(const error& from, proto::KeeperAnswer& to) {
  to.mutable_error()->set_code(static_cast<std::uint32_t>(from.code));
  to.mutable_error()->set_cause(from.cause);
  to.mutable_error()->set_cure(from.cure);
  to.mutable_error()->set_origin(from.origin);
}

proto::KeeperAnswer answer(kept_blocks& blocks, kept_blocks::user who,
                           const proto::KeeperRequest& asked, const std::string& pci_bus_id) {
  proto::KeeperAnswer result;
  if (asked.report()) {
    result.set_kept_bytes(blocks.bytes());
    result.set_num_blocks(static_cast<std::uint32_t>(blocks.num_blocks()));
    result.set_pci_bus_id(pci_bus_id);
    return result;
  }
  if (asked.seal()) {
    if (auto sealed = blocks.seal(who, asked.block()); !sealed)
      put_error(sealed.error(), result);
    result.set_is_sealed(!result.has_error());
    return result;
  }
  auto granted = blocks.open(who, asked.block(), asked.content(), asked.bytes());
  if (!granted) {
    spdlog::error("{}", granted.error().text());
    put_error(granted.error(), result);
    return result;
  }
  result.set_handle(granted->handle);
  result.set_is_sealed(granted->is_sealed);
  return result;
}

/// Answers one request. False: the connection is over.
bool serve_one(int socket, kept_blocks& blocks, kept_blocks::user who, std::vector<char>& buffer,
               const std::string& pci_bus_id) {
  const auto count = receive(socket, buffer);
  proto::KeeperRequest asked;
  if (count <= 0 || !asked.ParseFromArray(buffer.data(), static_cast<int>(count)))
    return false;
  return send_whole(socket, answer(blocks, who, asked, pci_bus_id));
}

timeval to_timeval(std::chrono::milliseconds time) {
  return {time.count() / 1000, time.count() % 1000 * 1000};
}

expected<proto::KeeperAnswer> ask(int socket, std::chrono::milliseconds answer_time,
                                  const proto::KeeperRequest& request) {
  const std::string subject = request.report() ? "itself" : request.block();
  std::vector<char> buffer;
  proto::KeeperAnswer answer;
  if (!send_whole(socket, request))
    return fail(error_code::peer_lost, fmt::format("the keeper is gone: {}", errno_text()));
  const auto count = receive(socket, buffer);
  if (count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
    return fail(
      error_code::deadline_exceeded,
      fmt::format("the keeper did not answer about {} in {} ms", subject, answer_time.count()));
  if (count <= 0 || !answer.ParseFromArray(buffer.data(), static_cast<int>(count)))
    return fail(error_code::peer_lost,
                fmt::format("the keeper went away when asked about {}", subject));
  if (answer.has_error())
    return tl::unexpected(error{static_cast<error_code>(answer.error().code()),
                                answer.error().cause(), answer.error().cure(),
                                answer.error().origin()});
  return answer;
}

} // namespace

std::string keeper_address(std::uint32_t node_pid, std::uint32_t index) {
  return fmt::format("troupe-keeper/{}/cuda:{}", node_pid, index);
}

expected<void> serve_kept_blocks(const std::string& address, kept_blocks blocks, int stop_fd,
                                 const std::string& pci_bus_id) {
  auto where = make_address(address);
  if (!where)
    return tl::unexpected(where.error());
  auto door = new_socket();
  if (!door || ::bind(door.get(), where->get(), where->size) != 0
      || ::listen(door.get(), max_waiting) != 0)
    return fail(error_code::io_failed,
                fmt::format("cannot listen at {}: {}", address, errno_text()));
  std::map<kept_blocks::user, unique_fd> users;
  kept_blocks::user next_user = 1;
  std::vector<char> buffer;
  for (;;) {
    std::vector<pollfd> waiting{{stop_fd, POLLIN, 0}, {door.get(), POLLIN, 0}};
    std::vector<kept_blocks::user> order;
    for (const auto& [who, socket] : users) {
      waiting.push_back({socket.get(), POLLIN, 0});
      order.push_back(who);
    }
    if (::poll(waiting.data(), waiting.size(), -1) < 0) {
      if (errno == EINTR)
        continue;
      return fail(error_code::io_failed, fmt::format("cannot wait for workers: {}", errno_text()));
    }
    if (waiting[0].revents != 0)
      return {};
    for (std::size_t i = 0; i < order.size(); ++i) {
      if (waiting[i + 2].revents == 0
          || serve_one(waiting[i + 2].fd, blocks, order[i], buffer, pci_bus_id))
        continue;
      users.erase(order[i]);
      blocks.close(order[i]);
    }
    if (waiting[1].revents != 0) {
      unique_fd arrived(::accept4(door.get(), nullptr, nullptr, SOCK_CLOEXEC));
      if (!arrived || !is_own_user(arrived.get()))
        continue;
      ::setsockopt(arrived.get(), SOL_SOCKET, SO_SNDTIMEO, &taking_time, sizeof(taking_time));
      users.emplace(next_user++, std::move(arrived));
    }
  }
}

expected<keeper_client> keeper_client::connect(const std::string& address,
                                               std::chrono::milliseconds patience,
                                               std::chrono::milliseconds answer_time) {
  auto where = make_address(address);
  if (!where)
    return tl::unexpected(where.error());
  const auto end = steady::now() + patience;
  for (;;) {
    auto socket = new_socket();
    if (!socket)
      return fail(error_code::resource_exhausted,
                  fmt::format("cannot make a socket: {}", errno_text()));
    // Before it connects: that waits too, where many wait already.
    const auto limit = to_timeval(answer_time);
    ::setsockopt(socket.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    ::setsockopt(socket.get(), SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
    if (::connect(socket.get(), where->get(), where->size) == 0)
      return keeper_client(std::move(socket), answer_time);
    if (steady::now() >= end)
      return fail(error_code::unavailable,
                  fmt::format("no keeper answers at {} within {} ms: {}", address, patience.count(),
                              errno_text()),
                  "the log of the keeper, beside those of the workers, says what it lacks");
    std::this_thread::sleep_for(connect_interval);
  }
}

expected<kept_blocks::grant> keeper_client::open(const std::string& block,
                                                 const std::string& content, std::size_t bytes) {
  proto::KeeperRequest request;
  request.set_block(block);
  request.set_content(content);
  request.set_bytes(bytes);
  auto answer = ask(socket_.get(), answer_time_, request);
  if (!answer)
    return tl::unexpected(answer.error());
  return kept_blocks::grant{answer->handle(), answer->is_sealed()};
}

expected<void> keeper_client::seal(const std::string& block) {
  proto::KeeperRequest request;
  request.set_block(block);
  request.set_seal(true);
  auto answer = ask(socket_.get(), answer_time_, request);
  if (!answer)
    return tl::unexpected(answer.error());
  return {};
}

expected<keeper_report> keeper_client::report() {
  proto::KeeperRequest request;
  request.set_report(true);
  auto answer = ask(socket_.get(), answer_time_, request);
  if (!answer)
    return tl::unexpected(answer.error());
  return keeper_report{answer->kept_bytes(), answer->num_blocks(), answer->pci_bus_id()};
}

} // namespace troupe::memory
