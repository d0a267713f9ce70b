#include "troupe/telemetry/gpu_monitor.hpp"
#include "troupe/telemetry/gpu_sampler.hpp"

#include "telemetry/fake_machine.hpp"

#include <catch2/catch.hpp>

#include <future>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <fmt/format.h>
#include <unistd.h>

using namespace troupe;
using namespace std::chrono_literals;
using telemetry::gpu_monitor;
using telemetry::gpu_sampler;
using telemetry::watched_gpu;
using testing::fake_machine;
using testing::thread_keeper;

namespace {

watched_gpu gpu(std::uint32_t index) {
  return {fmt::format("cuda:{}", index), fmt::format("node-0/keeper-{}", index),
          memory::keeper_address(static_cast<std::uint32_t>(::getpid()), index)};
}

gpu_sampler::options on(const char* library, telemetry::cuda_environment environment = {}) {
  return {library, std::move(environment), 2000ms};
}

/// Waits until it listens.
memory::keeper_client user_of(const watched_gpu& gpu) {
  auto user = memory::keeper_client::connect(gpu.keeper_address, 5s);
  REQUIRE(user);
  return std::move(*user);
}

} // namespace

TEST_CASE("before its keeper answers, a GPU is the one that the environment says") {
  gpu_sampler sampler("node-0", {gpu(0), gpu(1), gpu(2)}, on(FAKE_NVML_FULL, {"2,GPU-aa", {}}));
  const auto report = sampler.sample();
  CHECK(report.node() == "node-0");
  REQUIRE(report.gpus_size() == 2); // cuda:2 does not exist
  CHECK(report.gpus(0).device() == "cuda:0");
  CHECK(report.gpus(0).uuid().starts_with("GPU-c333"));
  CHECK(report.gpus(1).device() == "cuda:1");
  CHECK(report.gpus(1).uuid().starts_with("GPU-aa11"));
  REQUIRE(report.keepers_size() == 3);
  CHECK(report.keepers(1).ShortDebugString() == "name: \"node-0/keeper-1\" device: \"cuda:1\"");
}

TEST_CASE("a keeper says what it keeps and where its GPU is, whatever the environment says") {
  gpu_sampler sampler("node-0", {gpu(0)}, on(FAKE_NVML_FULL));
  CHECK(sampler.sample().gpus(0).uuid().starts_with("GPU-aa11"));
  const thread_keeper keeper(gpu(0).keeper_address, "0000:43:00.0");
  auto user = user_of(gpu(0));
  REQUIRE(user.open("a", "x", 300));
  REQUIRE(user.open("b", "x", 40));
  const auto report = sampler.sample();
  CHECK(report.gpus(0).uuid().starts_with("GPU-ab22"));
  CHECK(report.keepers(0).ShortDebugString()
        == "name: \"node-0/keeper-0\" device: \"cuda:0\" kept_bytes: 340 num_blocks: 2");
}

TEST_CASE("a keeper that is busy is not waited for, and asked again later") {
  auto let_go = std::make_shared<std::promise<void>>();
  auto held = std::make_shared<std::promise<void>>();
  const thread_keeper keeper(gpu(0).keeper_address, "0000:43:00.0",
                             [held, let_go, wait = let_go->get_future().share()] {
                               held->set_value();
                               wait.wait();
                             });
  auto user = user_of(gpu(0));
  std::thread busy([&] { CHECK(user.open("a", "x", 300)); });
  held->get_future().wait();
  auto options = on(FAKE_NVML_FULL);
  options.keeper_time = 20ms;
  gpu_sampler sampler("node-0", {gpu(0)}, options);
  for (int i = 0; i < 3; ++i) {
    const auto report = sampler.sample();
    CHECK_FALSE(report.keepers(0).has_kept_bytes());
    CHECK(report.gpus_size() == 1);
  }
  let_go->set_value();
  busy.join();
  const auto end = std::chrono::steady_clock::now() + 10s;
  auto report = sampler.sample();
  while (!report.keepers(0).has_kept_bytes() && std::chrono::steady_clock::now() < end)
    report = sampler.sample();
  CHECK(report.keepers(0).kept_bytes() == 300);
}

TEST_CASE("a keeper that ended and one in its place are noticed") {
  gpu_sampler sampler("node-0", {gpu(0)}, on(FAKE_NVML_FULL));
  for (const char* bus_id : {"0000:43:00.0", "0000:52:00.0"}) {
    const thread_keeper keeper(gpu(0).keeper_address, bus_id);
    user_of(gpu(0));
    auto report = sampler.sample(); // finds out that the first one has gone
    if (!report.keepers(0).has_kept_bytes())
      report = sampler.sample();
    CHECK(report.keepers(0).has_kept_bytes());
    CHECK(report.gpus(0).uuid().starts_with(bus_id[5] == '4' ? "GPU-ab22" : "GPU-c333"));
  }
}

TEST_CASE("without the driver's library keepers are asked all the same") {
  const thread_keeper keeper(gpu(0).keeper_address, "0000:43:00.0");
  user_of(gpu(0));
  gpu_sampler sampler("node-0", {gpu(0)}, on("libnothing-of-that-name.so.1"));
  const auto report = sampler.sample();
  CHECK(report.gpus_size() == 0);
  REQUIRE(report.keepers_size() == 1);
  CHECK(report.keepers(0).kept_bytes() == 0);
  CHECK(report.keepers(0).has_kept_bytes());
}

TEST_CASE("a GPU of which nothing can be read is named all the same") {
  const fake_machine mute("mute");
  gpu_sampler sampler("node-0", {gpu(1)}, on(FAKE_NVML_FULL));
  const auto report = sampler.sample();
  REQUIRE(report.gpus_size() == 1);
  CHECK(report.gpus(0).device() == "cuda:1");
  CHECK(report.gpus(0).uuid().starts_with("GPU-ab22"));
  CHECK_FALSE(report.gpus(0).has_memory_used_bytes());
}

namespace {

std::optional<proto::DeviceReport> next_of(gpu_monitor& monitor) {
  const auto end = std::chrono::steady_clock::now() + 10s;
  auto report = monitor.take();
  while (!report && std::chrono::steady_clock::now() < end) {
    std::this_thread::yield();
    report = monitor.take();
  }
  return report;
}

} // namespace

TEST_CASE("a monitor gives each report once, and ends without waiting for the next one") {
  gpu_monitor monitor("node-0", {gpu(0)}, on(FAKE_NVML_FULL), 1h);
  const auto report = next_of(monitor);
  REQUIRE(report);
  CHECK(report->gpus_size() == 1);
  CHECK_FALSE(monitor.take());
}

TEST_CASE("a monitor looks again and again") {
  gpu_monitor monitor("node-0", {gpu(0)}, on(FAKE_NVML_FULL), 1ms);
  for (int i = 0; i < 5; ++i)
    REQUIRE(next_of(monitor));
}

TEST_CASE("a driver that never answers blocks neither reports nor the end") {
  int asked[2];
  REQUIRE(::pipe(asked) == 0);
  ::setenv("FAKE_NVML_FD", std::to_string(asked[1]).c_str(), 1);
  const fake_machine stuck("stuck");
  auto monitor =
    std::make_unique<gpu_monitor>("node-0", std::vector{gpu(0)}, on(FAKE_NVML_FULL), 1ms);
  char byte = 0;
  REQUIRE(::read(asked[0], &byte, 1) == 1);
  CHECK_FALSE(monitor->take());
  const auto begin = std::chrono::steady_clock::now();
  monitor.reset();
  const auto waited = std::chrono::steady_clock::now() - begin;
  CHECK(waited > 500ms); // it might have answered yet
  CHECK(waited < 10s);
  ::close(asked[0]);
  ::close(asked[1]);
}
