#include "troupe/http/server.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <mutex>
#include <optional>
#include <system_error>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <sys/resource.h>

#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include "troupe/http/server_shard.hpp"

namespace troupe::http {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;

namespace {

constexpr std::chrono::milliseconds accept_pause{100};

// Connections over the limit that may be told so with 503; more are just closed.
constexpr std::size_t max_refusals = 64;

rlim_t raise_open_file_limit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0)
    return 0;
  if (limit.rlim_cur < limit.rlim_max) {
    const auto before = limit.rlim_cur;
    limit.rlim_cur = limit.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &limit) != 0) {
      spdlog::warn("http: cannot raise the limit of open files from {} to {}: {}", before,
                   limit.rlim_max, std::generic_category().message(errno));
      return before;
    }
  }
  return limit.rlim_cur;
}

// Asio opens sockets without close-on-exec; a child process that inherited one
// would keep the port, and the connections, after this process died.
void close_on_exec(int fd) {
  fcntl(fd, F_SETFD, FD_CLOEXEC);
}

bool out_of_descriptors(const error_code& ec) {
  return ec == asio::error::no_descriptors || ec == asio::error::no_buffer_space
         || ec == asio::error::no_memory
         || ec == boost::system::errc::too_many_files_open_in_system;
}

tl::unexpected<error> cannot_listen(const server_options& options, std::string_view step,
                                    const error_code& ec) {
  const auto where = host_port(options.host, options.port);
  if (ec == asio::error::address_in_use)
    return fail(troupe::error_code::resource_exhausted,
                fmt::format("cannot listen on {}: the port is taken by another process", where),
                fmt::format("find it with `ss -ltnp 'sport = :{}'` and stop it, or listen on "
                            "another port",
                            options.port));
  if (ec == boost::system::errc::address_not_available)
    return fail(
      troupe::error_code::invalid_config,
      fmt::format("cannot listen on {}: {} is not an address of this machine", where, options.host),
      "listen on 127.0.0.1, 0.0.0.0 or an address that `ip address` shows");
  if (ec == asio::error::access_denied)
    return fail(troupe::error_code::io_failed,
                fmt::format("cannot listen on {}: permission denied", where),
                "listen on a port from 1024 on, or grant CAP_NET_BIND_SERVICE");
  return fail(troupe::error_code::io_failed,
              fmt::format("cannot listen on {}: {}: {}", where, step, ec.message()));
}

} // namespace

struct server::state {
  state(server_options given_options, request_handler given_handler)
    : options(std::move(given_options)), handler(std::move(given_handler)) {
    for (unsigned i = 0; i < std::max(1U, options.num_threads); ++i)
      shards.push_back(std::make_unique<shard>(options, handler, num_connections));
    acceptor.emplace(shards[0]->context());
    pause.emplace(shards[0]->context());
  }

  expected<void> listen();
  void accept();
  void accepted(const error_code& ec, std::size_t shard_idx, tcp::socket socket);
  void stop(std::chrono::milliseconds drain);

  server_options options;
  request_handler handler;
  std::atomic<std::size_t> num_connections{0};
  std::uint16_t port = 0;
  std::vector<std::unique_ptr<shard>> shards;
  std::optional<tcp::acceptor> acceptor; // used on the thread of shard 0
  std::optional<asio::steady_timer> pause;
  std::size_t next_shard = 0;
  bool starved = false; // the last accept found no free descriptor
  std::mutex stop_mutex;
  bool stopped = false;
};

expected<void> server::state::listen() {
  error_code ec;
  tcp::endpoint endpoint;
  const auto address = asio::ip::make_address(options.host, ec);
  if (!ec) {
    endpoint = {address, options.port};
  } else {
    tcp::resolver resolver{shards[0]->context()};
    const auto found =
      resolver.resolve(options.host, std::to_string(options.port), tcp::resolver::passive, ec);
    if (ec || found.empty())
      return fail(troupe::error_code::invalid_config,
                  fmt::format("cannot listen on {}: the host name does not resolve: {}",
                              host_port(options.host, options.port), ec.message()),
                  "give an IP address, or a name that `getent hosts` knows");
    endpoint = found.begin()->endpoint();
  }
  if (acceptor->open(endpoint.protocol(), ec))
    return cannot_listen(options, "socket", ec);
  close_on_exec(acceptor->native_handle());
  // Lets a restarted process bind while connections of its predecessor linger in TIME_WAIT.
  if (acceptor->set_option(tcp::acceptor::reuse_address(true), ec))
    return cannot_listen(options, "SO_REUSEADDR", ec);
  if (acceptor->bind(endpoint, ec))
    return cannot_listen(options, "bind", ec);
  if (acceptor->listen(asio::socket_base::max_listen_connections, ec))
    return cannot_listen(options, "listen", ec);
  port = acceptor->local_endpoint(ec).port();
  if (ec)
    return cannot_listen(options, "getsockname", ec);
  return {};
}

void server::state::accept() {
  const auto shard_idx = next_shard++ % shards.size();
  acceptor->async_accept(shards[shard_idx]->context(),
                         [this, shard_idx](const error_code& ec, tcp::socket socket) {
                           accepted(ec, shard_idx, std::move(socket));
                         });
}

void server::state::accepted(const error_code& ec, std::size_t shard_idx, tcp::socket socket) {
  if (!acceptor->is_open())
    return;
  if (out_of_descriptors(ec)) {
    // The waiting connection keeps the listening socket readable: accepting
    // again at once would spin until somebody frees a descriptor.
    if (!std::exchange(starved, true))
      spdlog::error("http: cannot accept connections on {}: {}; {} are open. Raise `ulimit -Hn`",
                    host_port(options.host, port), ec.message(), num_connections.load());
    pause->expires_after(accept_pause);
    pause->async_wait([this](const error_code& cancelled) {
      if (!cancelled && acceptor->is_open())
        accept();
    });
    return;
  }
  if (!ec) {
    starved = false;
    close_on_exec(socket.native_handle());
    const auto open = num_connections.load();
    if (open < options.max_connections + max_refusals) {
      auto& owner = *shards[shard_idx];
      const bool refuse = open >= options.max_connections;
      asio::post(owner.context(), [&owner, refuse, socket = std::move(socket)]() mutable {
        serve(owner, std::move(socket), refuse);
      });
    }
  }
  accept();
}

void server::state::stop(std::chrono::milliseconds drain) {
  const std::lock_guard lock{stop_mutex};
  if (std::exchange(stopped, true))
    return;
  asio::post(shards[0]->context(), [this] {
    error_code ignored; // there is nothing to do about a close that fails
    acceptor->close(ignored);
    pause->cancel();
  });
  const auto deadline = clock::now() + drain;
  for (auto& each : shards)
    each->drain();
  for (auto& each : shards)
    if (!each->wait_until(deadline))
      each->close_all();
  for (auto& each : shards)
    each->join();
}

expected<std::unique_ptr<server>> server::start(server_options options, request_handler handler) {
  if (!handler)
    return fail(troupe::error_code::internal, "http: the server was started without a handler");
  const auto where = host_port(options.host, options.port);
  try {
    const auto max_files = raise_open_file_limit();
    if (max_files < options.max_connections)
      spdlog::warn("http: {} connections are allowed, but only {} files may be open; raise "
                   "`ulimit -Hn`",
                   options.max_connections, max_files);
    auto made = std::make_unique<state>(std::move(options), std::move(handler));
    if (auto listening = made->listen(); !listening)
      return tl::unexpected{std::move(listening.error())};
    std::unique_ptr<server> result{new server{std::move(made)}};
    result->state_->accept();
    for (auto& each : result->state_->shards)
      each->start();
    return result;
  } catch (const std::exception& e) {
    return fail(troupe::error_code::resource_exhausted,
                fmt::format("cannot start the HTTP server on {}: {}", where, e.what()),
                "check the limits of threads and open files (ulimit -u, ulimit -n)");
  }
}

server::server(std::unique_ptr<state> state) : state_(std::move(state)) {}

server::~server() {
  stop(std::chrono::milliseconds{0});
}

std::uint16_t server::port() const {
  return state_->port;
}

std::size_t server::num_connections() const {
  return state_->num_connections;
}

void server::stop(std::chrono::milliseconds drain) {
  state_->stop(drain);
}

} // namespace troupe::http
