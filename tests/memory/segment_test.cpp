#include "troupe/memory/segment.hpp"

#include <catch2/catch.hpp>

#include <csignal>
#include <cstring>

#include <sys/wait.h>
#include <unistd.h>

using troupe::memory::segment;

TEST_CASE("what one process wrote is there for the next, however the first ended") {
  auto owner = segment::create("troupe-test", 1 << 20);
  REQUIRE(owner);
  CHECK(owner->bytes().empty());
  auto self = static_cast<std::uint32_t>(::getpid());
  pid_t writer = ::fork();
  if (writer == 0) {
    auto mine = segment::attach_from(self, owner->fd(), 1 << 20);
    std::memcpy(mine->bytes().data() + 4096, "kept", 4);
    ::kill(::getpid(), SIGKILL);
  }
  ::waitpid(writer, nullptr, 0);
  auto reader = segment::attach_from(self, owner->fd(), 1 << 20);
  REQUIRE(reader);
  CHECK(std::memcmp(reader->bytes().data() + 4096, "kept", 4) == 0);
  CHECK(reader->bytes()[0] == std::byte{0});
}

TEST_CASE("memory is opened through the process that owns it, and told from anything else") {
  auto owner = segment::create_mapped("troupe-test", 4096);
  REQUIRE(owner);
  REQUIRE(owner->bytes().size() == 4096);
  owner->bytes()[7] = std::byte{7};
  auto self = static_cast<std::uint32_t>(::getpid());
  auto other = segment::attach_from(self, owner->fd(), 4096);
  REQUIRE(other);
  CHECK(other->bytes()[7] == std::byte{7});

  auto wrong_size = segment::attach_from(self, owner->fd(), 8192);
  REQUIRE_FALSE(wrong_size);
  CHECK(wrong_size.error().cause.find("4096") != std::string::npos);
  CHECK(wrong_size.error().cause.find("8192") != std::string::npos);
  CHECK(wrong_size.error().cause.find(std::to_string(self)) != std::string::npos);
  auto no_such_fd = segment::attach_from(self, 1000000, 4096);
  REQUIRE_FALSE(no_such_fd);
  CHECK(no_such_fd.error().cause.find("/fd/1000000") != std::string::npos);
  int ends[2];
  REQUIRE(::pipe(ends) == 0);
  CHECK_FALSE(segment::attach_from(self, ends[0], 4096));
  ::close(ends[0]);
  ::close(ends[1]);
  pid_t gone = ::fork();
  if (gone == 0)
    ::_exit(0);
  ::waitpid(gone, nullptr, 0);
  CHECK_FALSE(segment::attach_from(static_cast<std::uint32_t>(gone), owner->fd(), 4096));
}
