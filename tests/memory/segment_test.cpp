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
  pid_t writer = ::fork();
  if (writer == 0) {
    auto mine = segment::attach(::dup(owner->fd()), 1 << 20);
    std::memcpy(mine->bytes().data() + 4096, "kept", 4);
    ::kill(::getpid(), SIGKILL);
  }
  ::waitpid(writer, nullptr, 0);
  auto reader = segment::attach(::dup(owner->fd()), 1 << 20);
  REQUIRE(reader);
  CHECK(std::memcmp(reader->bytes().data() + 4096, "kept", 4) == 0);
  CHECK(reader->bytes()[0] == std::byte{0});
}

TEST_CASE("memory of another size than expected is refused") {
  auto owner = segment::create("troupe-test", 4096);
  REQUIRE(owner);
  auto wrong = segment::attach(::dup(owner->fd()), 8192);
  REQUIRE_FALSE(wrong);
  CHECK(wrong.error().cause.find("4096") != std::string::npos);
  CHECK(wrong.error().cause.find("8192") != std::string::npos);
  CHECK_FALSE(segment::attach(-1, 4096));
}
