#include "troupe/telemetry/gpu_totals.hpp"

#include "telemetry/fake_machine.hpp"

#include <catch2/catch.hpp>

using namespace troupe;
using namespace std::chrono_literals;
using telemetry::gpu_totals;
using testing::fake_machine;

namespace {

constexpr std::uint64_t gib = std::uint64_t{1} << 30;
using totals = std::vector<std::optional<std::uint64_t>>;

} // namespace

TEST_CASE("the memory of every GPU that CUDA sees, by CUDA's numbers") {
  CHECK(gpu_totals(5s, FAKE_NVML_FULL, {}) == totals{80 * gib, 80 * gib, 80 * gib});
  CHECK(gpu_totals(5s, FAKE_NVML_FULL, {"GPU-ab", {}}) == totals{80 * gib});
  CHECK(gpu_totals(5s, FAKE_NVML_FULL, {"", {}}).empty());
}

TEST_CASE("GPUs that do not tell, and machines without a driver") {
  {
    const fake_machine mute("mute");
    for (const auto& total : gpu_totals(5s, FAKE_NVML_FULL, {}))
      CHECK_FALSE(total);
  }
  CHECK(gpu_totals(5s, "libnothing-of-that-name.so.1", {}).empty());
  const fake_machine no_driver("no-driver");
  CHECK(gpu_totals(5s, FAKE_NVML_FULL, {}).empty());
}
