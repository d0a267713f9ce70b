#include "troupe/memory/keeper.hpp"

#include <catch2/catch.hpp>

#include <atomic>
#include <csignal>
#include <cstddef>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <fmt/format.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

using namespace troupe;
using namespace std::chrono_literals;
using memory::device_block;
using memory::keeper_client;
using memory::kept_blocks;

namespace {

/// A device of so many bytes, whose blocks have their number as handle.
class pretended_device {
public:
  explicit pretended_device(std::size_t size) : size_(size), used_(std::make_shared<counter>(0)) {}

  expected<device_block> allocate(std::size_t bytes) {
    if (bytes > size_ - *used_)
      return fail(error_code::resource_exhausted, "the device is full");
    *used_ += bytes;
    device_block result;
    result.memory = std::shared_ptr<void>(
      new char, [used = used_, bytes](void* at) { *used -= bytes, delete static_cast<char*>(at); });
    result.handle = fmt::format("block {}", ++num_made_);
    return result;
  }

  memory::device_allocator allocator() {
    return [this](std::size_t bytes) { return allocate(bytes); };
  }
  std::size_t used() const { return *used_; }

private:
  using counter = std::atomic<std::size_t>;
  std::size_t size_;
  std::shared_ptr<counter> used_;
  int num_made_ = 0;
};

std::string open(kept_blocks& blocks, kept_blocks::user who, const std::string& name,
                 const std::string& content, std::size_t bytes) {
  auto granted = blocks.open(who, name, content, bytes);
  if (!granted)
    return granted.error().cause;
  return granted->handle + (granted->is_sealed ? ", sealed" : "");
}

/// A keeper in a thread of its own.
class running_keeper {
public:
  explicit running_keeper(std::size_t size) : device_(size) {
    REQUIRE(::pipe(stop_) == 0);
    thread_ = std::thread([this] {
      auto ended = memory::serve_kept_blocks(address(), kept_blocks(device_.allocator()), stop_[0],
                                             "0000:1b:00.0");
      ended_well_ = ended.has_value();
    });
  }
  ~running_keeper() {
    stop();
    ::close(stop_[0]);
    ::close(stop_[1]);
  }

  void stop() {
    if (!thread_.joinable())
      return;
    CHECK(::write(stop_[1], "x", 1) == 1);
    thread_.join();
    CHECK(ended_well_);
  }
  static std::string address() {
    return memory::keeper_address(static_cast<std::uint32_t>(::getpid()), 7);
  }
  std::size_t used() const { return device_.used(); }

private:
  pretended_device device_;
  int stop_[2]{};
  bool ended_well_ = false;
  std::thread thread_;
};

} // namespace

TEST_CASE("a block outlives its users, and its successor finds it as it was") {
  pretended_device device(100);
  kept_blocks blocks(device.allocator());
  CHECK(open(blocks, 1, "a", "x", 40) == "block 1");
  CHECK(open(blocks, 2, "a", "x", 40) == "block 1"); // a standby maps it beside the worker
  CHECK(blocks.seal(1, "a"));
  CHECK(blocks.seal(3, "a").error().code == error_code::invalid_request);
  CHECK(blocks.seal(1, "b").error().code == error_code::invalid_request);
  blocks.close(1);
  blocks.close(2);
  CHECK(open(blocks, 3, "a", "x", 40) == "block 1, sealed");
  CHECK(blocks.bytes() == 40);
}

TEST_CASE("a block that died half filled is not taken for whole") {
  pretended_device device(100);
  kept_blocks blocks(device.allocator());
  CHECK(open(blocks, 1, "a", "x", 40) == "block 1");
  blocks.close(1);
  CHECK(open(blocks, 2, "a", "x", 40) == "block 1");
}

TEST_CASE("a block of other content or size is a new one, and the old memory comes back") {
  pretended_device device(100);
  kept_blocks blocks(device.allocator());
  CHECK(open(blocks, 1, "a", "x", 60) == "block 1");
  CHECK(blocks.seal(1, "a"));
  CHECK(open(blocks, 2, "a", "y", 30) == "block 2");
  CHECK(blocks.bytes() == 90);
  CHECK(device.used() == 90); // the first user still maps its own
  blocks.close(1);
  CHECK(device.used() == 30);
  blocks.close(2);
  CHECK(open(blocks, 3, "a", "y", 70) == "block 3");
  CHECK(device.used() == 70);
}

TEST_CASE("when memory runs out, what nobody uses goes, the longest unused first") {
  pretended_device device(100);
  kept_blocks blocks(device.allocator());
  CHECK(open(blocks, 1, "a", "x", 40) == "block 1");
  CHECK(open(blocks, 2, "b", "x", 30) == "block 2");
  CHECK(open(blocks, 3, "c", "x", 30) == "block 3");
  const auto refused = open(blocks, 4, "d", "x", 30);
  CHECK(refused.find("no 30 bytes for d") == 0);
  CHECK(refused.find("3 blocks of 100 bytes") != std::string::npos);
  blocks.close(2);
  blocks.close(1);
  CHECK(open(blocks, 4, "d", "x", 30) == "block 4"); // in place of b, which was left first
  CHECK(open(blocks, 5, "a", "x", 40) == "block 1");
  CHECK(open(blocks, 5, "e", "x", 60).find("no 60 bytes") == 0);
  CHECK(blocks.num_blocks() == 3);
}

TEST_CASE("any sequence of users: what is in use stays, and memory adds up") {
  std::mt19937 random(5);
  for (int round = 0; round < 300; ++round) {
    pretended_device device(200);
    kept_blocks blocks(device.allocator());
    std::map<kept_blocks::user, std::map<std::string, std::string>> in_use;
    for (int step = 0; step < 60; ++step) {
      const kept_blocks::user who = random() % 4;
      if (random() % 4 == 0) {
        blocks.close(who);
        in_use.erase(who);
        continue;
      }
      const auto name = std::string(1, static_cast<char>('a' + random() % 5));
      const std::size_t bytes = 10 * (name[0] - 'a' + 3);
      auto granted = blocks.open(who, name, "x", bytes);
      if (!granted) {
        REQUIRE(granted.error().code == error_code::resource_exhausted);
        REQUIRE(device.used() + bytes > 200);
        continue;
      }
      for (const auto& [other, handles] : in_use)
        if (auto same = handles.find(name); same != handles.end())
          REQUIRE(same->second == granted->handle);
      in_use[who][name] = granted->handle;
      REQUIRE(device.used() == blocks.bytes());
      REQUIRE(device.used() <= 200);
    }
  }
}

TEST_CASE("a keeper answers over its socket, and knows when a process has ended") {
  running_keeper keeper(100);
  auto first = keeper_client::connect(keeper.address(), 5s);
  REQUIRE(first);
  auto granted = first->open("replica-0/stage-0/kv", "x", 80);
  REQUIRE(granted);
  CHECK(granted->handle == "block 1");
  CHECK_FALSE(granted->is_sealed);
  CHECK(first->seal("replica-0/stage-0/kv"));
  CHECK(first->seal("other").error().code == error_code::invalid_request);
  auto refused = first->open("more", "x", 30);
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == error_code::resource_exhausted);

  // A process that maps the block as well and is killed.
  int told[2];
  REQUIRE(::pipe(told) == 0);
  const auto address = keeper.address();
  const auto pid = ::fork();
  if (pid == 0) {
    auto mine = keeper_client::connect(address, 5s);
    auto same = mine ? mine->open("replica-0/stage-0/kv", "x", 80)
                     : expected<kept_blocks::grant>(tl::unexpected(mine.error()));
    const char said = same && same->is_sealed && same->handle == "block 1" ? 'y' : 'n';
    if (::write(told[1], &said, 1) == 1)
      ::pause();
    ::_exit(1);
  }
  char said = 0;
  REQUIRE(::read(told[0], &said, 1) == 1);
  CHECK(said == 'y');
  first = tl::unexpected(error{}); // ends the connection
  auto third = keeper_client::connect(keeper.address(), 5s);
  REQUIRE(third);
  CHECK_FALSE(third->open("more", "x", 30)); // the child still has the block
  ::kill(pid, SIGKILL);
  ::waitpid(pid, nullptr, 0);
  const auto end = std::chrono::steady_clock::now() + 5s;
  auto more = third->open("more", "x", 30);
  while (!more && std::chrono::steady_clock::now() < end)
    more = third->open("more", "x", 30);
  CHECK(more);
  ::close(told[0]);
  ::close(told[1]);
}

TEST_CASE("a keeper reports what it keeps, in use or not, and a report holds nothing") {
  running_keeper keeper(100);
  auto reader = keeper_client::connect(keeper.address(), 5s);
  REQUIRE(reader);
  const auto at_first = reader->report();
  REQUIRE(at_first);
  CHECK(at_first->kept_bytes == 0);
  CHECK(at_first->pci_bus_id == "0000:1b:00.0");
  {
    auto user = keeper_client::connect(keeper.address(), 5s);
    REQUIRE(user);
    REQUIRE(user->open("a", "x", 60));
    REQUIRE(user->open("b", "x", 30));
  }
  const auto kept = reader->report();
  REQUIRE(kept);
  CHECK(kept->kept_bytes == 90);
  CHECK(kept->num_blocks == 2);
  auto other = keeper_client::connect(keeper.address(), 5s);
  REQUIRE(other);
  const auto end = std::chrono::steady_clock::now() + 5s;
  auto granted = other->open("c", "x", 100); // as soon as the user's end is known
  while (!granted && std::chrono::steady_clock::now() < end)
    granted = other->open("c", "x", 100);
  CHECK(granted);
  CHECK(reader->report()->num_blocks == 1);
}

TEST_CASE("who asks a keeper that does not answer is told so in the time that it gives") {
  const auto address = memory::keeper_address(static_cast<std::uint32_t>(::getpid()), 8);
  sockaddr_un at{};
  at.sun_family = AF_UNIX;
  std::copy(address.begin(), address.end(), at.sun_path + 1);
  const unique_fd door(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  REQUIRE(::bind(door.get(), reinterpret_cast<const sockaddr*>(&at),
                 static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + address.size()))
          == 0);
  REQUIRE(::listen(door.get(), 1) == 0);
  auto client = keeper_client::connect(address, 1s, 20ms);
  REQUIRE(client);
  const auto silent = client->report();
  REQUIRE_FALSE(silent);
  CHECK(silent.error().code == error_code::deadline_exceeded);
  // Also where so many wait that no more are let in.
  std::vector<expected<keeper_client>> waiting;
  for (int i = 0; i < 4; ++i)
    waiting.push_back(keeper_client::connect(address, 0ms, 20ms));
  REQUIRE_FALSE(waiting.back());
  CHECK(waiting.back().error().code == error_code::unavailable);
}

TEST_CASE("who asks a keeper that is not there, or goes away, is told so") {
  const auto nobody = keeper_client::connect("troupe-keeper/nobody", 30ms);
  REQUIRE_FALSE(nobody);
  CHECK(nobody.error().code == error_code::unavailable);
  running_keeper keeper(100);
  auto client = keeper_client::connect(keeper.address(), 5s);
  REQUIRE(client);
  keeper.stop();
  const auto lost = client->open("a", "x", 1);
  REQUIRE_FALSE(lost);
  CHECK(lost.error().code == error_code::peer_lost);
}

TEST_CASE("bytes that are no request end the connection and harm nobody else") {
  running_keeper keeper(100);
  auto good = keeper_client::connect(keeper.address(), 5s);
  REQUIRE(good);
  std::mt19937 random(3);
  for (int i = 0; i < 200; ++i) {
    const unique_fd bad(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    sockaddr_un to{};
    to.sun_family = AF_UNIX;
    const auto name = keeper.address();
    std::copy(name.begin(), name.end(), to.sun_path + 1);
    REQUIRE(::connect(bad.get(), reinterpret_cast<const sockaddr*>(&to),
                      static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size()))
            == 0);
    std::string bytes(random() % 200 + 1, '\0');
    for (auto& byte : bytes)
      byte = static_cast<char>(random());
    ::send(bad.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
  }
  CHECK(good->open("a", "x", 10));
}
