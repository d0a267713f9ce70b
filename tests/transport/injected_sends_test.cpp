#include "troupe/transport/injected_sends.hpp"

#include "support.hpp"

#include "troupe/transport/checksum.hpp"

#include <cstdlib>
#include <filesystem>

#include <unistd.h>

namespace troupe::transport::testing {

namespace {

using faults::fault;
using kind = faults::kind;
using operation_ptr = injected_sends::operation_ptr;

const auto start = injected_sends::time_point(1000s);

operation_ptr make(std::uint64_t step, const tensor& content, int* num_done = nullptr,
                   const std::string& to = "b") {
  auto result = std::make_unique<send_operation>();
  result->to = to;
  auto head = header(step);
  head.set_epoch(7);
  head.set_checksum(checksum(content.view().bytes));
  result->header = head.SerializeAsString();
  result->payload = content.view();
  result->done = [num_done](const expected<void>&) {
    if (num_done != nullptr)
      ++*num_done;
  };
  return result;
}

proto::FrameHeader header_of(const send_operation& operation) {
  proto::FrameHeader result;
  REQUIRE(result.ParseFromString(operation.header));
  return result;
}

std::vector<std::uint64_t> steps_of(injected_sends& sends) {
  std::vector<std::uint64_t> result;
  for (const auto& each : sends.ready())
    result.push_back(header_of(*each).step());
  sends.ready().clear();
  return result;
}

using steps = std::vector<std::uint64_t>;

/// A board that arms this process until it goes.
struct armed_board {
  std::filesystem::path file =
    std::filesystem::temp_directory_path() / ("troupe-board-" + std::to_string(::getpid()));
  faults::board rules = std::move(*faults::board::create(file));

  armed_board() {
    ::setenv(faults::board::variable, rules.value().c_str(), 1);
    REQUIRE(faults::arm());
  }
  ~armed_board() {
    rules.clear();
    ::unsetenv(faults::board::variable);
    static_cast<void>(faults::arm());
    std::filesystem::remove(file);
  }
};

} // namespace

TEST_CASE("frames without a fault pass at once and in order") {
  injected_sends sends;
  tensor t(100, 1);
  sends.take(make(1, t), std::nullopt, start);
  sends.take(make(2, t), std::nullopt, start);
  CHECK(steps_of(sends) == steps{1, 2});
  CHECK(sends.is_idle());
}

TEST_CASE("a dropped frame counts as sent and never goes out") {
  injected_sends sends;
  int num_done = 0;
  sends.take(make(1, tensor(10, 1), &num_done), fault{kind::drop, 0, 0}, start);
  CHECK(num_done == 1);
  CHECK(sends.ready().empty());
  CHECK(sends.is_idle());
}

TEST_CASE("a delayed frame goes out when it is due") {
  injected_sends sends;
  sends.take(make(1, tensor(10, 1)), fault{kind::delay, 30, 0}, start);
  sends.take(make(2, tensor(10, 1)), std::nullopt, start);
  CHECK(steps_of(sends) == steps{2});
  sends.release_due(start + 29ms);
  CHECK(sends.ready().empty());
  sends.release_due(start + 30ms);
  CHECK(steps_of(sends) == steps{1});
  CHECK(sends.is_idle());
}

TEST_CASE("a duplicated frame goes out twice and completes once") {
  injected_sends sends;
  int num_done = 0;
  tensor t(10, 1);
  sends.take(make(1, t, &num_done), fault{kind::duplicate, 0, 0}, start);
  REQUIRE(sends.ready().size() == 2);
  for (auto& each : sends.ready()) {
    CHECK(each->payload.bytes.data() == t.memory->data());
    each->done({});
  }
  CHECK(num_done == 1);
}

TEST_CASE("a reordered frame goes out behind the next to the same peer, or after a moment") {
  injected_sends sends;
  sends.take(make(1, tensor(10, 1)), fault{kind::reorder, 0, 0}, start);
  sends.take(make(2, tensor(10, 1), nullptr, "c"), std::nullopt, start);
  CHECK(steps_of(sends) == steps{2});
  sends.take(make(3, tensor(10, 1)), std::nullopt, start);
  CHECK(steps_of(sends) == steps{3, 1});
  sends.take(make(4, tensor(10, 1)), fault{kind::reorder, 0, 0}, start);
  sends.release_due(start + injected_sends::longest_hold);
  CHECK(steps_of(sends) == steps{4});
}

TEST_CASE("one bit of a corrupted frame differs, and its check sum tells") {
  for (std::size_t size : {1U, 100U, 0U}) {
    injected_sends sends;
    tensor t(size, 1);
    auto before = *t.memory;
    sends.take(make(1, t), fault{kind::corrupt, 0, 0x123456789ABCDEFU}, start);
    REQUIRE(sends.ready().size() == 1);
    auto& sent = *sends.ready()[0];
    CHECK(sent.payload.bytes.size() == size);
    CHECK(*t.memory == before); // the sender's own memory is as it was
    CHECK(header_of(sent).checksum() != checksum(sent.payload.bytes));
  }
}

TEST_CASE("a truncated frame is shorter, and its check sum tells") {
  injected_sends sends;
  tensor t(100, 1);
  sends.take(make(1, t), fault{kind::truncate, 0, 777}, start);
  auto& sent = *sends.ready().at(0);
  CHECK(sent.payload.bytes.size() == 77);
  CHECK(header_of(sent).checksum() != checksum(sent.payload.bytes));
}

TEST_CASE("a frame of a wrong epoch is of the one before") {
  injected_sends sends;
  sends.take(make(1, tensor(10, 1)), fault{kind::wrong_epoch, 0, 0}, start);
  CHECK(header_of(*sends.ready().at(0)).epoch() == 6);
}

TEST_CASE("an endpoint carries out what the board says, and its peer drops what is damaged") {
  party a{"a"};
  party b{"b"};
  connect_both(a, b);
  tensor t(5000, 1);
  a.send(b, 0, t);
  REQUIRE(b.heard.wait_frames(1));
  armed_board board;
  faults::rule rule;
  rule.process = "*";
  rule.peer = "b";
  rule.count = 3;
  SECTION("corrupt") {
    rule.what = kind::corrupt;
    REQUIRE(board.rules.add(rule));
    for (std::uint64_t step = 1; step <= 5; ++step)
      a.send(b, step, t);
    REQUIRE(b.heard.wait_frames(3));
    REQUIRE(b.heard.wait_drops(3));
    for (const auto& each : b.heard.drops)
      CHECK(each.why.code == error_code::io_failed);
    CHECK(b.heard.frames[1].header.step() == 4);
  }
  SECTION("delay does not hold up the others") {
    rule.what = kind::delay;
    rule.delay_ms = 50;
    rule.count = 1;
    REQUIRE(board.rules.add(rule));
    auto before = std::chrono::steady_clock::now();
    a.send(b, 1, t);
    a.send(b, 2, t);
    REQUIRE(b.heard.wait_frames(3));
    CHECK(std::chrono::steady_clock::now() - before >= 50ms);
    CHECK(b.heard.frames[1].header.step() == 2);
    CHECK(b.heard.frames[2].header.step() == 1);
  }
  SECTION("what comes from a peer that is cut off has never come") {
    REQUIRE(board.rules.cut("a", "*"));
    a.send(b, 1, t);
    REQUIRE(a.heard.wait_outcomes(2));
    CHECK_FALSE(b.heard.wait([&] { return b.heard.frames.size() > 1; }, 100ms));
    board.rules.clear();
    CHECK(b.heard.drops.empty());
    CHECK(b.heard.losses.empty());
    a.send(b, 2, t);
    REQUIRE(b.heard.wait_frames(2));
    CHECK(b.heard.frames[1].header.step() == 2);
  }
  SECTION("memory that runs out is an error value") {
    rule.where = faults::point::allocation;
    rule.what = kind::fail;
    rule.peer = "";
    rule.count = 1;
    REQUIRE(board.rules.add(rule));
    auto none = b.end->pool().take(100);
    REQUIRE_FALSE(none);
    CHECK(none.error().code == error_code::resource_exhausted);
    CHECK(b.end->pool().take(100));
  }
}

} // namespace troupe::transport::testing
