#include <array>
#include <chrono>
#include <cstdint>
#include <exception>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <boost/asio/buffer.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/http/error.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/status.hpp>
#include <boost/beast/http/string_body.hpp>
#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include "troupe/http/server_exchange.hpp"
#include "troupe/http/server_shard.hpp"

namespace troupe::http {

namespace asio = boost::asio;
namespace beast = boost::beast;
using asio::ip::tcp;
using boost::system::error_code;

namespace {

constexpr auto never = clock::time_point::max();

// After the last answer the peer may still be sending. Closing then would reset
// the connection and could destroy the answer on its way, so what still comes
// is read and thrown away, within these bounds.
constexpr std::chrono::milliseconds linger_timeout{2'000};
constexpr std::chrono::milliseconds linger_timeout_draining{100};
constexpr std::size_t linger_limit = std::size_t{64} << 20;

// Buffers above this size are given back when they are empty.
constexpr std::size_t kept_capacity = 16 << 10;

void trim(std::string& buffer) {
  buffer.clear();
  if (buffer.capacity() > kept_capacity)
    std::string{}.swap(buffer);
}

std::string_view view(beast::string_view text) {
  return {text.data(), text.size()};
}

bool clean(std::string_view text) {
  return text.find_first_of(std::string_view{"\r\n\0", 3}) == text.npos;
}

/// An answer of the server itself to a request that no handler sees.
struct refusal {
  int status;
  std::string_view code;
  std::string message;
};

refusal refusal_for(const error_code& ec, const server_options& options) {
  using beast::http::error;
  if (ec == error::header_limit)
    return {431, "header_too_large",
            fmt::format("the request header is larger than {} bytes", options.header_limit)};
  if (ec == error::body_limit)
    return {413, "body_too_large",
            fmt::format("the request body is larger than {} bytes", options.body_limit)};
  if (ec == error::bad_version)
    return {505, "version_not_supported", "this server speaks HTTP/1.1 and HTTP/1.0"};
  return {400, "malformed_request", fmt::format("not a valid HTTP request: {}", ec.message())};
}

/// One client. Everything runs on the thread of its shard, except `wake`.
///
///   idle --first byte--> header --> body --> responding --answer written--> idle
///                                                    or --must close--> lingering --> closed
///   any state --peer gone, deadline, too slow--> closed
class connection final : public exchange_owner,
                         public shard_member,
                         public std::enable_shared_from_this<connection> {
public:
  connection(shard& owner, tcp::socket socket) : owner_(owner), socket_(std::move(socket)) {}

  void start(bool refused);

  void wake() override {
    asio::post(socket_.get_executor(), [self = shared_from_this()] { self->pump(); });
  }
  void check_deadline(clock::time_point now) override;
  void drain() override;
  void close() override;

private:
  enum class phase { idle, header, body, responding, lingering, closed };
  using parser = beast::http::request_parser<beast::http::string_body>;

  // Reading.
  void arm_read();
  void on_readable(const error_code& ec);
  void received(std::string_view bytes);
  void peer_closed();
  void parse();
  bool begin_request();
  bool on_header();
  void send_continue();
  void dispatch();

  // Writing.
  void pump();
  void refuse(const refusal& why);
  void append_head(const response_head& head, std::size_t content_length);
  void write_batch(bool last);
  void on_written(const error_code& ec, bool last);
  void answer_complete();
  void linger();
  void abort();

  void set_deadline(clock::duration from_now) { deadline_ = clock::now() + from_now; }

  shard& owner_;
  tcp::socket socket_;
  std::string peer_;
  phase phase_ = phase::idle;
  clock::time_point deadline_ = never;

  std::string in_; // received, not yet parsed
  std::optional<parser> parser_;
  std::size_t discarded_ = 0;

  std::shared_ptr<exchange> exchange_;
  std::string head_;
  std::string data_;
  std::string tail_;
  bool writing_ = false;
  bool keep_alive_ = false;
  bool peer_closed_ = false; // its sending side
  bool is_http_1_0_ = false;
  bool no_body_ = false; // the answer must not have one
  bool chunked_ = false;
  bool streaming_ = false;
};

// A host that vanishes sends no end of its connections: probes find out while
// nothing is being sent, the user timeout while something is (tcp(7)).
void watch_peer(int fd, std::chrono::milliseconds write_timeout) {
  const auto set = [fd](int level, int name, int value) {
    if (setsockopt(fd, level, name, &value, sizeof value) != 0)
      spdlog::debug("http: socket option {}/{} cannot be set", level, name);
  };
  set(SOL_SOCKET, SO_KEEPALIVE, 1);
  set(IPPROTO_TCP, TCP_KEEPIDLE, 15);
  set(IPPROTO_TCP, TCP_KEEPINTVL, 5);
  set(IPPROTO_TCP, TCP_KEEPCNT, 3);
  set(IPPROTO_TCP, TCP_USER_TIMEOUT, static_cast<int>(write_timeout.count()));
}

void connection::start(bool refused) {
  error_code ec;
  socket_.set_option(tcp::no_delay(true), ec);
  if (!ec)
    socket_.non_blocking(true, ec);
  watch_peer(socket_.native_handle(), owner_.options().write_timeout);
  const auto endpoint = socket_.remote_endpoint(ec);
  if (ec)
    return; // the client left while it was being accepted
  peer_ = host_port(endpoint.address().to_string(), endpoint.port());
  owner_.add(shared_from_this());
  set_deadline(owner_.options().header_timeout);
  arm_read();
  if (owner_.draining())
    drain();
  else if (refused)
    refuse({503, "too_many_connections",
            fmt::format("the server has {} connections open and takes no more",
                        owner_.options().max_connections)});
}

// Reading is armed at all times, also while an answer is pending: that is how
// a client that leaves is noticed. Waiting without a buffer costs no memory for
// the many connections that stay silent.
void connection::arm_read() {
  socket_.async_wait(tcp::socket::wait_read,
                     [self = shared_from_this()](const error_code& ec) { self->on_readable(ec); });
}

void connection::on_readable(const error_code& ec) {
  if (phase_ == phase::closed)
    return;
  if (ec)
    return close();
  auto& scratch = owner_.scratch();
  error_code read_error;
  const auto num_bytes = socket_.read_some(asio::buffer(scratch), read_error);
  if (read_error == asio::error::eof)
    return peer_closed();
  if (read_error && read_error != asio::error::would_block
      && read_error != asio::error::interrupted)
    return close();
  if (num_bytes > 0)
    received({scratch.data(), num_bytes});
  if (phase_ != phase::closed)
    arm_read();
}

void connection::peer_closed() {
  peer_closed_ = true;
  // A complete answer may still reach a client that only closed its sending side.
  const bool answered = exchange_ ? exchange_->ended() : writing_;
  if (phase_ != phase::responding || !answered)
    close();
}

void connection::received(std::string_view bytes) {
  switch (phase_) {
  case phase::lingering:
    discarded_ += bytes.size();
    if (discarded_ > linger_limit)
      abort();
    return;
  case phase::responding:
    if (!keep_alive_)
      return; // nothing after the last request is of interest
    if (in_.size() + bytes.size() > owner_.options().header_limit + owner_.options().body_limit) {
      spdlog::debug("http: {} sends requests faster than it is answered; closed", peer_);
      return abort();
    }
    in_.append(bytes);
    return;
  default: in_.append(bytes); return parse();
  }
}

void connection::parse() {
  if (phase_ == phase::idle && !begin_request())
    return;
  while (phase_ == phase::header || phase_ == phase::body) {
    error_code ec;
    const auto num_used = parser_->put(asio::buffer(in_), ec);
    in_.erase(0, num_used);
    const bool starved = ec == beast::http::error::need_more;
    if (ec && !starved)
      return refuse(refusal_for(ec, owner_.options()));
    if (phase_ == phase::header && parser_->is_header_done() && !on_header())
      return;
    if (parser_->is_done())
      return dispatch();
    if (starved || in_.empty())
      break;
  }
  // The parser hands on body bytes as they come; what it may keep is one line
  // of a chunk header or the trailer.
  if (phase_ == phase::body && in_.size() > owner_.options().header_limit)
    refuse({400, "malformed_request", "not a valid HTTP request: a chunk header is too long"});
}

bool connection::begin_request() {
  // Empty lines before a request are to be ignored (RFC 9112, section 2.2).
  in_.erase(0, in_.find_first_not_of("\r\n"));
  if (in_.empty())
    return false;
  parser_.emplace();
  parser_->header_limit(static_cast<std::uint32_t>(owner_.options().header_limit));
  parser_->body_limit(owner_.options().body_limit);
  phase_ = phase::header;
  keep_alive_ = false;
  is_http_1_0_ = false;
  no_body_ = false;
  set_deadline(owner_.options().header_timeout);
  return true;
}

// Checks what the parser lets through. False if the request was refused.
bool connection::on_header() {
  const auto& message = parser_->get();
  is_http_1_0_ = message.version() == 10;
  no_body_ = message.method() == beast::http::verb::head;
  const auto wrong = [this](int status, std::string_view code, std::string text) {
    refuse({status, code, std::move(text)});
    return false;
  };
  if (!is_http_1_0_ && message.count(beast::http::field::host) != 1)
    return wrong(400, "malformed_request", "an HTTP/1.1 request must have one Host header");
  const auto target = view(message.target());
  if (target != "*" && !target.starts_with('/') && !target.starts_with("http://")
      && !target.starts_with("https://"))
    return wrong(400, "malformed_request", fmt::format("not a request target: {}", target));
  if (const auto coding = message.find(beast::http::field::transfer_encoding);
      coding != message.end() && !beast::iequals(coding->value(), "chunked"))
    return wrong(501, "transfer_coding_not_supported",
                 fmt::format("transfer coding {} is not supported", view(coding->value())));
  const auto expect = message.find(beast::http::field::expect);
  if (expect != message.end() && !beast::iequals(expect->value(), "100-continue"))
    return wrong(417, "expectation_failed",
                 fmt::format("the expectation {} cannot be met", view(expect->value())));
  phase_ = phase::body;
  parser_->eager(true);
  set_deadline(owner_.options().body_timeout);
  if (expect != message.end() && !is_http_1_0_ && in_.empty() && !parser_->is_done())
    send_continue();
  return phase_ == phase::body;
}

// Nothing else is being written between two answers, so these bytes fit into the
// socket's buffer unless the client stopped reading.
void connection::send_continue() {
  constexpr std::string_view text = "HTTP/1.1 100 Continue\r\n\r\n";
  error_code ec;
  if (socket_.write_some(asio::buffer(text), ec) != text.size())
    abort();
}

void connection::dispatch() {
  phase_ = phase::responding;
  deadline_ = never;
  keep_alive_ = parser_->keep_alive() && !owner_.draining();
  auto message = parser_->release();
  parser_.reset();
  if (in_.empty())
    trim(in_);

  request incoming;
  incoming.method = view(message.method_string());
  incoming.target = view(message.target());
  incoming.peer = peer_;
  incoming.body = std::move(message.body());
  for (const auto& field : message)
    incoming.headers.push_back(
      {std::string{view(field.name_string())}, std::string{view(field.value())}});
  std::string_view path = incoming.target;
  if (const auto scheme = path.find("://"); !path.starts_with('/') && scheme != path.npos) {
    const auto slash = path.find('/', scheme + 3);
    path = slash == path.npos ? std::string_view{"/"} : path.substr(slash);
  }
  const auto question = path.find('?');
  if (question != path.npos)
    incoming.query = path.substr(question + 1);
  incoming.path = percent_decode(path.substr(0, question));

  exchange_ = std::make_shared<exchange>(shared_from_this(), owner_.options().max_queued_chunks);
  auto answer = std::make_shared<response>(exchange_);
  try {
    owner_.handler()(std::move(incoming), std::move(answer));
  } catch (const std::exception& e) {
    spdlog::error("http: the request handler threw: {}", e.what());
  }
}

void connection::pump() {
  if (phase_ != phase::responding || !exchange_)
    return;
  if (exchange_->overflowed()) {
    spdlog::warn("http: {} reads its stream too slowly ({} pieces wait); closed", peer_,
                 owner_.options().max_queued_chunks);
    return abort();
  }
  if (writing_)
    return;
  auto batch = exchange_->take(data_);
  head_.clear();
  tail_.clear();
  if (batch.head) {
    const auto status = batch.head->status;
    no_body_ |= status == 204 || status == 304;
    streaming_ = batch.head->streamed;
    chunked_ = streaming_ && !is_http_1_0_ && !no_body_;
    keep_alive_ &= !owner_.draining() && (!streaming_ || chunked_ || no_body_);
    append_head(*batch.head, data_.size());
  }
  if (no_body_) {
    data_.clear();
  } else if (chunked_) {
    // All pieces that waited become one chunk.
    if (!data_.empty()) {
      fmt::format_to(std::back_inserter(head_), "{:x}\r\n", data_.size());
      tail_ = "\r\n";
    }
    if (batch.end)
      tail_ += "0\r\n\r\n";
  }
  keep_alive_ &= !batch.broken;
  const bool last = batch.end || batch.broken;
  if (!head_.empty() || !data_.empty() || !tail_.empty())
    write_batch(last);
  else if (last)
    answer_complete();
}

// Answers without a handler and closes afterwards.
void connection::refuse(const refusal& why) {
  spdlog::debug("http: {} is refused with {}: {}", peer_, why.status, why.message);
  phase_ = phase::responding;
  keep_alive_ = false;
  streaming_ = false;
  parser_.reset();
  trim(in_);
  data_ =
    error_json(why.message, why.status < 500 ? "invalid_request_error" : "server_error", why.code);
  response_head head{why.status, "application/json", {}, false};
  if (why.status == 503)
    head.extra.push_back({"Retry-After", "1"});
  head_.clear();
  tail_.clear();
  append_head(head, data_.size());
  if (no_body_)
    data_.clear();
  write_batch(true);
}

void connection::append_head(const response_head& head, std::size_t content_length) {
  const auto out = std::back_inserter(head_);
  const auto reason =
    beast::http::obsolete_reason(beast::http::int_to_status(static_cast<unsigned>(head.status)));
  fmt::format_to(out, "HTTP/1.1 {} {}\r\nDate: {}\r\n", head.status, view(reason), owner_.date());
  const auto add = [&](std::string_view name, std::string_view value) {
    // A line end inside a field would let its author write the rest of the answer.
    if (clean(name) && clean(value))
      fmt::format_to(out, "{}: {}\r\n", name, value);
    else
      spdlog::error("http: a response header with a line end in it is left out");
  };
  if (!head.content_type.empty())
    add("Content-Type", head.content_type);
  if (head.streamed) {
    if (chunked_)
      add("Transfer-Encoding", "chunked");
  } else if (head.status != 204) {
    fmt::format_to(out, "Content-Length: {}\r\n", content_length);
  }
  if (!keep_alive_)
    add("Connection", "close");
  else if (is_http_1_0_)
    add("Connection", "keep-alive");
  for (const auto& field : head.extra)
    add(field.name, field.value);
  head_ += "\r\n";
}

void connection::write_batch(bool last) {
  writing_ = true;
  const auto timeout = owner_.options().write_timeout;
  set_deadline(timeout);
  const std::array<asio::const_buffer, 3> buffers{asio::buffer(head_), asio::buffer(data_),
                                                  asio::buffer(tail_)};
  // Called before each write to the socket: any progress moves the deadline.
  const auto proceed = [this, timeout](const error_code& ec, std::size_t) -> std::size_t {
    set_deadline(timeout);
    return ec ? 0 : std::size_t{256} << 10;
  };
  asio::async_write(socket_, buffers, proceed,
                    [self = shared_from_this(), last](const error_code& ec, std::size_t) {
                      self->on_written(ec, last);
                    });
}

void connection::on_written(const error_code& ec, bool last) {
  writing_ = false;
  if (phase_ == phase::closed)
    return;
  if (ec)
    return close();
  deadline_ = never;
  trim(data_);
  if (last)
    answer_complete();
  else
    pump();
}

void connection::answer_complete() {
  if (exchange_) {
    exchange_->finish();
    exchange_.reset();
  }
  if (peer_closed_)
    return close();
  if (!keep_alive_ || owner_.draining())
    return linger();
  phase_ = phase::idle;
  set_deadline(owner_.options().idle_timeout);
  parse();
}

void connection::linger() {
  error_code ec;
  socket_.shutdown(tcp::socket::shutdown_send, ec);
  if (ec)
    return close();
  phase_ = phase::lingering;
  trim(in_);
  set_deadline(owner_.draining() ? linger_timeout_draining : linger_timeout);
}

void connection::check_deadline(clock::time_point now) {
  if (now < deadline_)
    return;
  switch (phase_) {
  case phase::header:
    return refuse({408, "request_timeout",
                   fmt::format("the request header did not arrive within {} ms",
                               owner_.options().header_timeout.count())});
  case phase::body:
    return refuse({408, "request_timeout",
                   fmt::format("the request body did not arrive within {} ms",
                               owner_.options().body_timeout.count())});
  case phase::responding:
    spdlog::warn("http: {} took nothing of its answer for {} ms; closed", peer_,
                 owner_.options().write_timeout.count());
    return abort();
  default: return close();
  }
}

void connection::drain() {
  switch (phase_) {
  case phase::idle: return close();
  case phase::header:
  case phase::body: return refuse({503, "stopping", "the server is stopping"});
  case phase::lingering: set_deadline(linger_timeout_draining); return;
  default: keep_alive_ = false; // closes after the answer
  }
}

// Closes without delivering what the kernel still holds.
void connection::abort() {
  error_code ec;
  socket_.set_option(tcp::socket::linger(true, 0), ec);
  close();
}

void connection::close() {
  if (std::exchange(phase_, phase::closed) == phase::closed)
    return;
  const auto self = shared_from_this(); // the shard's reference may be the last
  error_code ec;
  socket_.close(ec);
  parser_.reset();
  owner_.remove(self);
  if (const auto left = std::exchange(exchange_, nullptr))
    left->client_gone();
}

} // namespace

void serve(shard& owner, tcp::socket socket, bool refuse) {
  std::make_shared<connection>(owner, std::move(socket))->start(refuse);
}

} // namespace troupe::http
