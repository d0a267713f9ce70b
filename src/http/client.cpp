#include "troupe/http/client.hpp"

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <limits>
#include <optional>
#include <utility>

#include <boost/asio/buffer.hpp>
#include <boost/beast/http/error.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>
#include <fmt/format.h>

#include "troupe/http/client_socket.hpp"

namespace troupe::http {

namespace beast = boost::beast;

namespace {

using clock = client_socket::clock;

constexpr std::size_t max_body_bytes = std::size_t{64} << 20;
constexpr std::uint32_t max_header_bytes = 256 << 10;

// Keeps deadlines within the clock's range.
constexpr std::chrono::milliseconds longest_wait = std::chrono::hours{24 * 365};

struct parsed_url {
  std::string host;
  std::string port = "80";
  std::string target;
};

expected<parsed_url> parse_url(const std::string& url) {
  const auto wrong = [&url](std::string_view why) {
    return fail(error_code::invalid_request, fmt::format("not a usable URL: \"{}\": {}", url, why),
                "give it as http://HOST:PORT/PATH");
  };
  constexpr std::string_view scheme = "http://";
  std::string_view rest = url;
  if (!rest.starts_with(scheme))
    return wrong("it does not begin with http://");
  if (std::any_of(rest.begin(), rest.end(), [](unsigned char c) { return c <= ' ' || c == 0x7F; }))
    return wrong("it contains a space or a control character");
  rest.remove_prefix(scheme.size());
  parsed_url result;
  const auto path = rest.find_first_of("/?#");
  auto authority = rest.substr(0, path);
  auto target = path == rest.npos ? std::string_view{} : rest.substr(path);
  target = target.substr(0, target.find('#'));
  result.target = target.starts_with('/') ? std::string{target} : "/" + std::string{target};
  const auto bracket = authority.starts_with('[') ? authority.find(']') : 0;
  if (bracket == authority.npos)
    return wrong("']' is missing");
  const auto colon = authority.find(':', bracket);
  result.host =
    authority.starts_with('[') ? authority.substr(1, bracket - 1) : authority.substr(0, colon);
  if (result.host.empty())
    return wrong("the host is missing");
  if (colon != authority.npos) {
    const auto port = authority.substr(colon + 1);
    std::uint16_t number = 0;
    const auto [end, ec] = std::from_chars(port.data(), port.data() + port.size(), number);
    if (ec != std::errc{} || end != port.data() + port.size() || number == 0)
      return wrong(fmt::format("\"{}\" is not a port", port));
    result.port = port;
  }
  return result;
}

std::string request_head(const client_request& what, const parsed_url& url) {
  const bool brackets = url.host.find(':') != url.host.npos;
  auto head = fmt::format("{} {} HTTP/1.1\r\nHost: {}{}{}:{}\r\nConnection: close\r\n", what.method,
                          url.target, brackets ? "[" : "", url.host, brackets ? "]" : "", url.port);
  if (!what.body.empty() || what.method == "POST" || what.method == "PUT")
    head += fmt::format("Content-Length: {}\r\n", what.body.size());
  for (const auto& field : what.headers)
    head += fmt::format("{}: {}\r\n", field.name, field.value);
  return head + "\r\n";
}

std::string_view view(beast::string_view text) {
  return {text.data(), text.size()};
}

/// Takes the bytes of one answer and sorts them into head and body.
class answer_reader {
public:
  answer_reader(bool is_head, const piece_handler* on_piece)
    : is_head_(is_head), on_piece_(on_piece) {
    begin();
  }

  /// Takes received bytes; an error is what is wrong with them.
  expected<void> feed(std::string_view bytes) {
    in_.append(bytes);
    while (!done_ && !in_.empty()) {
      boost::system::error_code ec;
      const auto num_used = parser_->put(boost::asio::buffer(in_), ec);
      in_.erase(0, num_used);
      if (ec && ec != beast::http::error::need_more)
        return fail(error_code::peer_lost, fmt::format("not an HTTP answer: {}", ec.message()));
      if (auto kept = keep(); !kept)
        return kept;
      if (ec)
        break;
    }
    return {};
  }

  /// Takes the end of the stream; false when the answer is not complete.
  bool end_of_stream() {
    if (done_)
      return true;
    if (!parser_->is_header_done())
      return false;
    boost::system::error_code ec;
    parser_->put_eof(ec);
    done_ = !ec && parser_->is_done();
    return done_;
  }

  /// Offers the callback a chance to give up; false if it did.
  bool ask() { return !on_piece_ || (*on_piece_)({}); }

  bool has_header() const { return has_header_; }
  bool done() const { return done_; }
  client_response& result() { return result_; }

private:
  void begin() {
    parser_.emplace();
    parser_->header_limit(max_header_bytes);
    parser_->body_limit(boost::none);
    parser_->eager(true);
    parser_->skip(is_head_);
  }

  expected<void> keep() {
    if (!parser_->is_header_done())
      return {};
    const auto& message = parser_->get();
    if (!has_header_) {
      if (message.result_int() / 100 == 1) { // interim: the real answer follows
        begin();
        return {};
      }
      has_header_ = true;
      result_.status = static_cast<int>(message.result_int());
      for (const auto& field : message)
        result_.headers.push_back(
          {std::string{view(field.name_string())}, std::string{view(field.value())}});
    }
    auto& body = parser_->get().body();
    if (on_piece_ && result_.status / 100 == 2) {
      if (!body.empty() && !(*on_piece_)(body)) {
        result_.complete = false;
        done_ = true;
      }
    } else {
      result_.body += body;
      if (result_.body.size() > max_body_bytes)
        return fail(error_code::too_large,
                    fmt::format("the body is larger than {} bytes", max_body_bytes));
    }
    body.clear();
    done_ = done_ || parser_->is_done();
    return {};
  }

  bool is_head_;
  const piece_handler* on_piece_;
  std::string in_;
  std::optional<beast::http::response_parser<beast::http::string_body>> parser_;
  client_response result_;
  bool has_header_ = false;
  bool done_ = false;
};

struct limits {
  clock::time_point connect;
  clock::time_point total;
  std::chrono::milliseconds silence;
};

expected<client_response> run(const client_request& what, const limits& until,
                              const piece_handler* on_piece) {
  const auto url = parse_url(what.url);
  if (!url)
    return tl::unexpected{url.error()};
  auto socket = client_socket::connect(url->host, url->port, until.connect);
  if (!socket)
    return tl::unexpected{socket.error()};
  const auto& where = socket->where();

  answer_reader reader{what.method == "HEAD", on_piece};
  const auto head = request_head(what, *url);
  std::string_view unsent_head = head;
  std::string_view unsent_body = what.body;
  std::size_t num_received = 0;
  const auto lost = [&](std::string_view how) {
    return fail(error_code::peer_lost,
                fmt::format("{} {} the connection after {} bytes of its answer to {} {}", where,
                            how, num_received, what.method, url->target),
                "see the server's log; try again");
  };
  std::string buffer(64 << 10, '\0');
  auto quiet_until = clock::now() + until.silence;
  while (!reader.done()) {
    // A server may answer, for instance that the body is too large, before it has
    // read everything: from then on only its answer matters.
    auto& unsent = unsent_head.empty() ? unsent_body : unsent_head;
    const bool sending = !unsent.empty() && !reader.has_header();
    const auto event = socket->wait(sending, std::min(quiet_until, until.total));
    if (!event)
      return tl::unexpected{event.error()};
    if (*event == client_socket::event::timed_out)
      return fail(error_code::deadline_exceeded,
                  fmt::format("{} did not {} {} {} in time ({} bytes received)", where,
                              reader.has_header() ? "complete its answer to" : "answer",
                              what.method, url->target, num_received),
                  "check the server's load and health, or allow more time");
    if (*event == client_socket::event::interrupted) {
      if (!reader.ask()) {
        reader.result().complete = false;
        break;
      }
      continue;
    }
    const auto got = socket->read_some(buffer.data(), buffer.size());
    if (got.result == client_socket::status::reset)
      return lost("reset");
    if (got.result == client_socket::status::closed) {
      if (!reader.end_of_stream())
        return lost("closed");
      break;
    }
    if (got.result == client_socket::status::moved) {
      num_received += got.num_bytes;
      quiet_until = clock::now() + until.silence;
      if (auto fed = reader.feed({buffer.data(), got.num_bytes}); !fed) {
        fed.error().cause = fmt::format("{}: {}", where, fed.error().cause);
        return tl::unexpected{std::move(fed.error())};
      }
      continue;
    }
    if (!sending)
      continue;
    const auto put = socket->write_some(unsent);
    if (put.result == client_socket::status::closed) {
      unsent_head = unsent_body = {};
    } else if (put.num_bytes > 0) {
      unsent.remove_prefix(put.num_bytes);
      quiet_until = clock::now() + until.silence;
    }
  }
  return std::move(reader.result());
}

} // namespace

std::optional<std::string_view> client_response::header(std::string_view name) const {
  return find_header(headers, name);
}

expected<client_response> fetch(const client_request& what, std::chrono::milliseconds deadline) {
  const auto bounded = std::min(deadline, longest_wait);
  const auto end = clock::now() + bounded;
  return run(what, {end, end, bounded}, nullptr);
}

expected<client_response> fetch_stream(const client_request& what, client_timeouts timeouts,
                                       const piece_handler& on_piece) {
  return run(what,
             {clock::now() + std::min(timeouts.connect, longest_wait), clock::time_point::max(),
              std::min(timeouts.silence, longest_wait)},
             &on_piece);
}

} // namespace troupe::http
