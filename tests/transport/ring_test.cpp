#include "support.hpp"

#include "troupe/transport/address.hpp"
#include "troupe/transport/doorbell.hpp"
#include "troupe/transport/frame_stream.hpp"

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <thread>

#include <sys/mman.h>
#include <unistd.h>

namespace troupe::transport::testing {

namespace {

std::uint32_t own_pid() {
  return static_cast<std::uint32_t>(::getpid());
}

/// Both ends of a ring.
struct ring {
  ring_writer writer;
  ring_reader reader;

  static ring make() {
    auto writer = ring_writer::create("test");
    REQUIRE(writer);
    CHECK_FALSE(writer->is_attached());
    auto reader = ring_reader::attach(own_pid(), writer->fd());
    REQUIRE(reader);
    CHECK(writer->is_attached());
    return {std::move(*writer), std::move(*reader)};
  }
};

/// An inbox that keeps what it is given.
struct kept_frames {
  buffer_pool pool{std::size_t{64} << 20};
  std::vector<frame> frames;
  std::vector<error> drops;
  inbox in{{std::size_t{8} << 20, true, [this](frame each) { frames.push_back(std::move(each)); },
            [this](const proto::FrameHeader&, const error& why) { drops.push_back(why); }},
           pool};
};

std::unique_ptr<send_operation> operation(std::uint64_t step, const tensor& content,
                                          int& num_done) {
  auto header = testing::header(step);
  header.set_sender("writer");
  auto result = std::make_unique<send_operation>();
  result->header = header.SerializeAsString();
  result->payload = content.view();
  result->done = [&num_done](const expected<void>& sent) { num_done += sent ? 1 : 1000; };
  return result;
}

/// The descriptor of this process's memory whose name ends so; -1: there is none.
int memory_named(const std::string& end) {
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code gone;
    const auto target = std::filesystem::read_symlink(entry.path(), gone).string();
    if (target.find("memfd:" + end + " ") != std::string::npos)
      return std::stoi(entry.path().filename());
  }
  return -1;
}

} // namespace

TEST_CASE("bytes pass a ring in order, whatever the pieces, and nobody waits in vain") {
  auto [writer, reader] = ring::make();
  const tensor content{std::size_t{5} << 20, 3};
  const auto& bytes = *content.memory;
  std::atomic<int> num_wakes{0};
  std::atomic<bool> is_full{false};
  std::thread writing([&, &to = writer] {
    std::mt19937_64 random{1};
    std::size_t done = 0;
    while (done < bytes.size()) {
      const std::size_t wanted = std::min<std::size_t>(random() % 200000 + 1, bytes.size() - done);
      const auto put = to.put(std::span{bytes}.subspan(done, wanted));
      to.publish();
      done += put;
      if (put < wanted) {
        const int before = num_wakes;
        if (!to.ask_for_room()) {
          is_full = true;
          while (num_wakes == before)
            std::this_thread::yield();
        }
      }
    }
  });
  while (!is_full)
    std::this_thread::yield();
  std::mt19937_64 random{2};
  std::vector<std::byte> heard;
  while (heard.size() < bytes.size()) {
    const auto next = reader.next();
    const auto part = next.first(std::min<std::size_t>(next.size(), random() % 100000));
    heard.insert(heard.end(), part.begin(), part.end());
    reader.take(part.size());
    if (reader.release())
      ++num_wakes;
  }
  writing.join();
  CHECK(heard == bytes);
  CHECK_FALSE(reader.is_ready());
  CHECK(num_wakes > 0);
}

TEST_CASE("frames larger than the ring and empty ones pass it, a piece at a time") {
  auto [writer, reader] = ring::make();
  frame_writer out{std::move(writer)};
  kept_frames kept;
  frame_reader in{std::move(reader), kept.in};
  int num_done = 0;
  std::vector<tensor> sent;
  for (const std::size_t size : {std::size_t{0}, std::size_t{1}, ring_capacity - 40, ring_capacity,
                                 5 * ring_capacity / 2, std::size_t{0}, std::size_t{70000}})
    sent.emplace_back(size, size + 1);
  for (std::size_t step = 0; step < sent.size(); ++step)
    out.take(operation(step, sent[step], num_done));
  int rounds = 0;
  while (kept.frames.size() < sent.size() && rounds < 100) {
    const bool has_written = out.push();
    const auto outcome = in.poll();
    CHECK(outcome.has_read == has_written);
    CHECK(outcome.writer_waits == !out.is_idle());
    CHECK(out.can_push() == !out.is_idle()); // there is room again
    ++rounds;
  }
  REQUIRE(kept.frames.size() == sent.size());
  for (std::size_t step = 0; step < sent.size(); ++step) {
    CHECK(kept.frames[step].header.step() == step);
    CHECK(sent[step].equals(kept.frames[step].payload));
  }
  CHECK(rounds < 10);
  CHECK(num_done == static_cast<int>(sent.size()));
  CHECK_FALSE(out.push());
}

TEST_CASE("a frame that is not taken is skipped, however long") {
  auto [writer, reader] = ring::make();
  frame_writer out{std::move(writer)};
  kept_frames kept;
  frame_reader in{std::move(reader), kept.in};
  int num_done = 0;
  const tensor too_large{std::size_t{9} << 20, 1}, small{100, 2};
  out.take(operation(1, too_large, num_done));
  out.take(operation(2, small, num_done));
  auto nameless = operation(3, small, num_done);
  nameless->header = "no header";
  out.take(std::move(nameless));
  out.take(operation(4, small, num_done));
  while (!out.is_idle()) {
    out.push();
    in.poll();
  }
  REQUIRE(kept.frames.size() == 2);
  CHECK(kept.frames[0].header.step() == 2);
  CHECK(kept.frames[1].header.step() == 4);
  REQUIRE(kept.drops.size() == 2);
  CHECK(kept.drops[0].code == error_code::too_large);
  CHECK(kept.drops[1].code == error_code::invalid_request);
}

TEST_CASE("random bytes in a ring are dropped or end it, and touch nothing else") {
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    auto [writer, reader] = ring::make();
    kept_frames kept;
    frame_reader in{std::move(reader), kept.in};
    tensor garbage{seed % 2 == 0 ? 4000U : 60U, seed};
    if (seed % 3 == 0) // lengths that make sense, and nothing else
      for (const std::size_t i : {1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15})
        (*garbage.memory)[i] = std::byte{0};
    writer.put(*garbage.memory);
    writer.publish();
    in.poll();
    CHECK(kept.frames.empty());
    CHECK((in.is_damaged() || seed % 3 == 0));
  }
}

TEST_CASE("frames waiting for room fail with their peer") {
  auto [writer, reader] = ring::make();
  frame_writer out{std::move(writer)};
  int num_done = 0;
  const tensor large{3 * ring_capacity, 1};
  out.take(operation(1, large, num_done));
  out.take(operation(2, large, num_done));
  CHECK(out.can_push());
  CHECK(out.push());
  CHECK_FALSE(out.can_push());
  CHECK(num_done == 0);
  out.fail_all(fail(error_code::peer_lost, "a test").value());
  CHECK(num_done == 2000);
  CHECK(out.is_idle());
}

TEST_CASE("a neighbour rings once, for who listens") {
  auto bell = doorbell::open();
  REQUIRE(bell);
  auto other = neighbour::open(bell->place());
  REQUIRE(other);
  const auto rings = [&](listener who) {
    std::byte heard[8];
    return std::max<ssize_t>(0, ::read(bell->fd(who), heard, sizeof heard));
  };
  other->ring();
  CHECK(rings(listener::background) + rings(listener::foreground) == 0);
  bell->listen(listener::foreground);
  other->ring();
  other->ring();
  CHECK(rings(listener::background) == 0);
  CHECK(rings(listener::foreground) == 1);
  bell->listen(listener::background);
  other->ring();
  CHECK(rings(listener::background) == 1);
  bell->listen(listener::background);
  bell->hush();
  other->ring();
  CHECK(rings(listener::background) + rings(listener::foreground) == 0);
}

TEST_CASE("who is no neighbour is known before anything is offered") {
  auto bell = doorbell::open();
  REQUIRE(bell);
  auto place = bell->place();
  SECTION("another host") {
    place.set_host("elsewhere/1");
  }
  SECTION("another process with the same id") {
    place.set_mark(place.mark() + 1);
  }
  SECTION("a process that is gone") {
    place.set_pid(0x7fffffff);
  }
  SECTION("a descriptor that is no memory") {
    place.set_doorbell(place.background_bell());
  }
  SECTION("a descriptor that is no pipe") {
    place.set_foreground_bell(place.doorbell());
  }
  const auto opened = neighbour::open(place);
  REQUIRE_FALSE(opened);
  CHECK(opened.error().code == error_code::not_found);
}

TEST_CASE("processes of a host send through rings, unless one of them has none") {
  const bool both_have = GENERATE(true, false);
  party a{"first"};
  auto options = party::with_name("second");
  options.rings = both_have;
  party b{options};
  connect_both(a, b);
  a.send(b, 1, tensor{100000, 1});
  b.send(a, 1, tensor{100000, 1});
  REQUIRE(a.heard.wait_frames(1));
  REQUIRE(b.heard.wait_frames(1));
  CHECK((memory_named("troupe-ring-to-first") >= 0) == both_have);
  CHECK((memory_named("troupe-ring-to-second") >= 0) == both_have);
}

TEST_CASE("frames go by UCX after a while where nobody attaches a ring") {
  party a{"a"};
  party decoy{"decoy"};
  auto options = party::with_name("b");
  options.rings = false;
  party b{options};
  auto address = read_address(b.end->address());
  const auto elsewhere = read_address(decoy.end->address());
  REQUIRE(address);
  REQUIRE(elsewhere);
  *address->mutable_place() = elsewhere->place();
  a.end->connect("b", 1, write_address(*address));
  b.connect(a);
  for (std::uint64_t step = 0; step < 3; ++step)
    a.send(b, step, tensor{1000, step});
  REQUIRE(b.heard.wait_frames(3));
  for (std::uint64_t step = 0; step < 3; ++step)
    CHECK(b.heard.frames[step].header.step() == step);
}

TEST_CASE("a neighbour that writes nonsense into its ring is lost, and nobody else") {
  party a{"a"};
  party b{"b"};
  party c{"c"};
  connect_both(a, b);
  connect_both(c, b);
  a.send(b, 1, tensor{100, 1});
  REQUIRE(b.heard.wait_frames(1));
  const int fd = memory_named("troupe-ring-to-b");
  REQUIRE(fd >= 0);
  // a's or c's: both send nonsense to b in turn.
  void* memory = ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  REQUIRE(memory != MAP_FAILED);
  std::memset(memory, 0xff, 8); // how much was written: more than a ring holds
  ::munmap(memory, 4096);
  REQUIRE(b.heard.wait_losses(1));
  CHECK(b.heard.losses[0].why.code == error_code::io_failed);
  party& well = b.heard.losses[0].name == "a" ? c : a;
  well.send(b, 2, tensor{100, 2});
  REQUIRE(b.heard.wait_frames(2));
  CHECK(b.heard.frames[1].header.step() == 2);
}

} // namespace troupe::transport::testing
