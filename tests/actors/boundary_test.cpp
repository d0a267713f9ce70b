#include "troupe/actors/boundary.hpp"

#include "fake_boundary.hpp"

#include <catch2/catch.hpp>

#include <numeric>
#include <vector>

using namespace troupe;
using namespace troupe::actors;

namespace {

proto::WorkerPlan worker(const std::string& node, const std::string& device) {
  proto::WorkerPlan plan;
  plan.set_node(node);
  plan.set_device(device);
  return plan;
}

} // namespace

TEST_CASE("stages meet on devices when both are on GPUs of one node") {
  const std::vector<std::string> nodes{"a", "b"};
  const std::vector<std::string> devices{"", "cpu", "cpu:0", "cuda:0", "cuda:1", "cuda:0,cuda:1"};
  for (const auto& node : nodes)
    for (const auto& device : devices)
      for (const auto& next_node : nodes)
        for (const auto& next_device : devices) {
          CAPTURE(node, device, next_node, next_device);
          bool both_on_gpus = device.find("cuda") == 0 && next_device.find("cuda") == 0;
          bool next_is_one = next_device.find(',') == std::string::npos;
          CHECK(meet_on_devices(worker(node, device), worker(next_node, next_device))
                == (node == next_node && both_on_gpus && next_is_one));
        }
}

TEST_CASE("an outbox has room for all steps in flight, or for two of the largest") {
  constexpr std::size_t mib = std::size_t{1} << 20;
  // DeepSeek-R1's rows on 4 stages, by the largest micro-batch.
  CHECK(outbox_bytes(4, 64, 14336) == 256 + 7 * 64 * 14336);
  CHECK(outbox_bytes(4, 1024, 14336) == 256 + 64 * mib);
  CHECK(outbox_bytes(4, 8192, 14336) == 256 + 2 * 8192 * 14336);
  CHECK(outbox_bytes(2, 1, 6) == 256 + 5 * 256);
}

TEST_CASE("tickets ascend within a process and from one to the next") {
  auto blocks = std::make_shared<test::fake_blocks>();
  auto device =
    std::make_shared<test::fake_boundary>(blocks, "stage/boundary", 1, [] { return false; });
  proto::DevicePlace block;
  block.set_keeper("keeper");
  block.set_block("stage/boundary");
  block.set_block_bytes(256 + 2 * 256);
  std::vector<unsigned char> rows(300);
  std::iota(rows.begin(), rows.end(), static_cast<unsigned char>(0));
  auto view = [&](std::int32_t count) { return kernels::rows_view{rows.data(), count, 1, 1}; };
  auto taken = [&](const left_rows& from) {
    std::vector<unsigned char> to(static_cast<std::size_t>(from.num_rows));
    return bool(device->fetch(from.place, {to.data(), from.num_rows, 1, 1}))
           && std::equal(to.begin(), to.end(), rows.begin());
  };
  std::uint64_t last = 0;
  left_rows of_predecessor;
  for (std::uint64_t incarnation : {1U, 2U, 100'001U}) {
    auto outbox = std::make_shared<boundary_outbox>(device, block, incarnation, 1);
    if (incarnation > 1)
      CHECK(taken(of_predecessor)); // until the successor leaves something
    for (int i = 0; i < 5; ++i) {
      auto small = outbox->leave(view(7));
      REQUIRE(small);
      CHECK(small->place.ticket() > last);
      last = small->place.ticket();
      CHECK(small->place.keeper() == "keeper");
      CHECK(small->place.block_bytes() == 768);
      auto large = outbox->leave(view(257)); // two units
      CHECK_FALSE(large);
      auto other = outbox->leave(view(256));
      REQUIRE(other);
      CHECK(taken(*small));
      CHECK(taken(*other));
      CHECK(outbox->num_left() == 2);
      auto place = *small;
      small = nullptr;
      CHECK(taken(place)); // nothing has taken its place yet
      other = nullptr;
      CHECK(outbox->num_left() == 0);
      large = outbox->leave(view(257));
      REQUIRE(large);
      CHECK(taken(*large));
      CHECK_FALSE(taken(place));
      last = large->place.ticket();
      of_predecessor = *large;
    }
    if (incarnation > 1) {
      std::vector<unsigned char> back(257);
      outbox->read_back(of_predecessor, back.data());
      CHECK(std::equal(back.begin(), back.end(), rows.begin()));
    }
  }
}

TEST_CASE("rows outlive the outbox that they were left in") {
  auto blocks = std::make_shared<test::fake_blocks>();
  proto::DevicePlace block;
  block.set_block("stage/boundary");
  block.set_block_bytes(1024);
  auto outbox = std::make_shared<boundary_outbox>(
    std::make_shared<test::fake_boundary>(blocks, "stage/boundary", 1, [] { return false; }), block,
    1, 1);
  unsigned char row = 7;
  auto left = outbox->leave({&row, 1, 1, 1});
  outbox = nullptr;
  REQUIRE(left);
  left = nullptr; // gives its room back
}
