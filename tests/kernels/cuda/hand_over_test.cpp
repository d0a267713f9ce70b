#include "gpu.hpp"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <limits>
#include <thread>

namespace kernel_tests {

using troupe::kernels::cuda::fetched_rows;
using troupe::kernels::cuda::make_cuda_ops;

namespace {

constexpr std::size_t kOffset = 256;

struct shape {
  int rows, cols, stride;
};

/// Another object on the same GPU, as a worker in another process is.
std::unique_ptr<gpu_ops> another() {
  std::string error;
  auto result = make_cuda_ops(0, error);
  REQUIRE(result != nullptr);
  return result;
}

/// All zeros, as a keeper gives it.
std::shared_ptr<void> new_block(std::size_t elements) {
  auto block = gpu()->allocate(kOffset + elements * 2);
  gpu()->synchronise();
  return block;
}

} // namespace

TEST_CASE("rows that were left are fetched as they were, until they are said to be gone") {
  if (gpu() == nullptr) {
    return;
  }
  const auto taker = another();
  std::mt19937 random(3);
  constexpr std::uint64_t kTicket = (std::uint64_t{7} << 40) + 5;
  for (const shape& s : {shape{1, 8, 8}, shape{3, 7, 9}, shape{2, 16, 24}, shape{5, 24, 28},
                         shape{33, 576, 576}, shape{1, 7168, 7168}, shape{2048, 1024, 1024}}) {
    CAPTURE(s.rows, s.cols, s.stride);
    const auto rows = random_rows(s.rows, s.cols, random);
    const auto others = random_rows(s.rows, s.cols, random);
    const gpu_rows from(rows, s.stride);
    const gpu_rows from_others(others, s.stride);
    const auto room = (rows.data.size() * 2 + 255) / 256 * 256;
    const auto block = new_block(room);
    const gpu_rows to(s.rows, s.cols, s.stride + 8);
    const gpu_rows dense(s.rows, s.cols);
    gpu()->synchronise();
    CHECK(taker->fetch_rows(block.get(), kOffset, kTicket, dense.view())
          == fetched_rows::gone); // a new block
    gpu()->leave_rows(from.view(), kTicket, block.get(), kOffset);
    gpu()->leave_rows(from_others.view(), kTicket, block.get(), kOffset + room);
    CHECK(taker->fetch_rows(block.get(), kOffset, kTicket, to.view()) == fetched_rows::whole);
    CHECK(to.read().data == rows.data);
    CHECK(taker->fetch_rows(block.get(), kOffset, kTicket, dense.view()) == fetched_rows::whole);
    CHECK(dense.read().data == rows.data);
    CHECK(taker->fetch_rows(block.get(), kOffset + room, kTicket + 1, to.view())
          == fetched_rows::whole);
    CHECK(to.read().data == others.data);
    CHECK(taker->fetch_rows(block.get(), kOffset, kTicket - 1, dense.view()) == fetched_rows::gone);
    // A way to the host needs nothing else.
    std::vector<std::uint16_t> copied(rows.data.size());
    gpu()->copy_to_host({static_cast<std::byte*>(block.get()) + kOffset, s.rows, s.cols, s.cols},
                        copied.data());
    for (std::size_t i = 0; i < copied.size(); ++i) {
      REQUIRE(bf16_value(copied[i]) == rows.data[i]);
    }
    gpu()->leave_rows(from_others.view(), kTicket + 1, block.get(), kOffset);
    CHECK(taker->fetch_rows(block.get(), kOffset, kTicket, dense.view()) == fetched_rows::gone);
    CHECK(taker->fetch_rows(block.get(), kOffset + room, kTicket + 1, dense.view())
          == fetched_rows::whole);
    CHECK(taker->fetch_rows(block.get(), kOffset, kTicket + 2, dense.view())
          == fetched_rows::whole);
    CHECK(dense.read().data == others.data);
  }
  CHECK(taker->failure().empty());
}

TEST_CASE("a value that is not finite is found on its way, wherever it is") {
  if (gpu() == nullptr) {
    return;
  }
  std::mt19937 random(5);
  for (const shape& s : {shape{1, 8, 8}, shape{3, 7, 9}, shape{300, 1024, 1024}}) {
    const auto block = new_block(std::size_t(s.rows) * s.cols);
    const gpu_rows to(s.rows, s.cols);
    const auto good = random_rows(s.rows, s.cols, random);
    for (const float value :
         {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
          std::numeric_limits<float>::quiet_NaN()}) {
      for (int i = 0; i < 12; ++i) {
        auto bad = good;
        bad.data[i < 8 ? i * (bad.data.size() - 1) / 7 : random() % bad.data.size()] = value;
        const gpu_rows from(bad, s.stride);
        gpu()->leave_rows(from.view(), 1, block.get(), kOffset);
        CHECK(gpu()->fetch_rows(block.get(), kOffset, 1, to.view()) == fetched_rows::not_finite);
        CHECK(gpu()->fetch_rows(block.get(), kOffset, 0, to.view()) == fetched_rows::gone);
      }
    }
    auto large = good;
    large.data.back() = -3.38e38F; // the largest that bf16 has
    const gpu_rows from(rounded(large), s.stride);
    gpu()->leave_rows(from.view(), 1, block.get(), kOffset);
    CHECK(gpu()->fetch_rows(block.get(), kOffset, 1, to.view()) == fetched_rows::whole);
  }
}

TEST_CASE("rows that make room for others while they are read are never taken for what they were",
          "[together]") {
  if (gpu() == nullptr) {
    return;
  }
  constexpr int kRows = 256, kCols = 1024;
  const auto taker = another();
  const auto owner = another();
  const auto block = new_block(std::size_t{kRows} * kCols);
  std::vector<gpu_rows> contents;
  for (int i = 0; i < 4; ++i) {
    matrix rows(kRows, kCols);
    std::fill(rows.data.begin(), rows.data.end(), static_cast<float>(i));
    contents.emplace_back(rows);
  }
  const gpu_rows to(kRows, kCols);
  gpu()->synchronise();
  owner->leave_rows(contents[1].view(), 1, block.get(), kOffset);
  std::atomic<std::uint64_t> newest{1};
  std::atomic<int> pause{4000};
  std::atomic<bool> stop{false};
  std::thread writing([&] {
    for (std::uint64_t ticket = 2; !stop; ++ticket) {
      owner->leave_rows(contents[ticket % 4].view(), ticket, block.get(), kOffset);
      newest = ticket;
      for (volatile int wait = 0; wait < static_cast<int>(ticket % 8) * pause;) {
        wait = wait + 1;
      }
    }
  });
  int num_whole = 0;
  int num_gone = 0;
  std::vector<std::uint16_t> bits(std::size_t{kRows} * kCols);
  for (int i = 0; i < 3000; ++i) {
    const std::uint64_t ticket = newest;
    if (taker->fetch_rows(block.get(), kOffset, ticket, to.view()) == fetched_rows::gone) {
      ++num_gone;
      if (num_whole == 0 && num_gone % 100 == 0) {
        pause = std::min(2 * pause, 100'000'000); // reading takes longer than usual
      }
      continue;
    }
    ++num_whole;
    taker->copy_to_host(to.view(), bits.data());
    const auto right = to_bf16(static_cast<float>(ticket % 4));
    if (std::count(bits.begin(), bits.end(), right) != kRows * kCols) {
      stop = true;
      writing.join();
      FAIL("rows of two tickets in one, ticket " << ticket);
    }
  }
  stop = true;
  writing.join();
  CHECK(num_whole > 0);
  CHECK(num_gone > 0);
  CHECK(owner->failure().empty());
  CHECK(taker->failure().empty());
}

} // namespace kernel_tests
