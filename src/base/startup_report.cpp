#include "troupe/base/startup_report.hpp"

#include <cerrno>
#include <cstring>
#include <string>
#include <vector>

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <unistd.h>

namespace troupe {

namespace {

/// Fields are separated by a byte that is in no text.
constexpr char separator = '\0';

void write_all(int fd, const std::string& text) {
  std::size_t done = 0;
  while (done < text.size()) {
    auto n = ::write(fd, text.data() + done, text.size() - done);
    if (n < 0 && errno == EINTR)
      continue;
    if (n <= 0)
      break; // the parent is gone, and so is this process soon
    done += static_cast<std::size_t>(n);
  }
  ::close(fd);
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> fields(1);
  for (char c : text) {
    if (c == separator)
      fields.emplace_back();
    else
      fields.back() += c;
  }
  return fields;
}

} // namespace

expected<startup_pipe> startup_pipe::open() {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0)
    return fail(error_code::resource_exhausted, fmt::format("pipe: {}", std::strerror(errno)));
  startup_pipe result;
  result.read_end_ = unique_fd(ends[0]);
  result.write_end_ = unique_fd(ends[1]);
  return result;
}

expected<std::uint16_t> startup_pipe::wait(std::chrono::milliseconds patience) {
  write_end_.reset();
  auto deadline = std::chrono::steady_clock::now() + patience;
  std::string text;
  for (;;) {
    auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
      deadline - std::chrono::steady_clock::now());
    pollfd waiting{read_end_.get(), POLLIN, 0};
    if (left.count() <= 0 || ::poll(&waiting, 1, static_cast<int>(left.count())) == 0)
      return fail(error_code::deadline_exceeded,
                  fmt::format("the process did not report in {} ms", patience.count()),
                  "see its log");
    char buffer[4096];
    auto n = ::read(read_end_.get(), buffer, sizeof(buffer));
    if (n < 0 && errno == EINTR)
      continue;
    if (n <= 0)
      break;
    text.append(buffer, static_cast<std::size_t>(n));
  }
  auto fields = split(text);
  if (fields.size() == 2 && fields[0] == "started")
    return static_cast<std::uint16_t>(std::stoul(fields[1]));
  if (fields.size() == 5 && fields[0] == "error")
    return tl::unexpected(
      error{static_cast<error_code>(std::stoul(fields[1])), fields[2], fields[3], fields[4]});
  return fail(error_code::unavailable, "the process ended before it had started", "see its log");
}

void report_started(int fd, std::uint16_t port) {
  if (fd >= 0)
    write_all(fd, fmt::format("started{}{}", separator, port));
}

void report_not_started(int fd, const error& why) {
  if (fd >= 0)
    write_all(fd, fmt::format("error{0}{1}{0}{2}{0}{3}{0}{4}", separator,
                              static_cast<int>(why.code), why.cause, why.cure, why.origin));
}

} // namespace troupe
