#include "troupe/telemetry/visible_gpus.hpp"

#include <catch2/catch.hpp>

#include <cstdlib>
#include <string>
#include <vector>

using namespace troupe::telemetry;

namespace {

using places = std::vector<std::optional<std::size_t>>;
constexpr auto unknown = std::nullopt;

std::vector<gpu_identity> three_of_a_kind() {
  return {{"GPU-aa11", "H100"}, {"GPU-ab22", "H100"}, {"GPU-c333", "H100"}};
}

std::vector<gpu_identity> two_kinds() {
  return {{"GPU-aa11", "L4"}, {"GPU-ab22", "H100"}, {"GPU-c333", "H100"}};
}

/// What an entry means on a host with three GPUs.
struct word {
  const char* text;
  enum { gpu, part, nothing } kind;
  std::size_t index = 0;
};

const std::vector<word>& vocabulary() {
  static const std::vector<word> words{
    {"0", word::gpu, 0},
    {"1", word::gpu, 1},
    {"2", word::gpu, 2},
    {" 2\t", word::gpu, 2},
    {"3", word::nothing},
    {"-1", word::nothing},
    {"", word::nothing},
    {" ", word::nothing},
    {"1x", word::nothing},
    {"none", word::nothing},
    {"99999999999999999999999", word::nothing},
    {"GPU-aa11", word::gpu, 0},
    {"GPU-ab", word::gpu, 1},
    {"GPU-C333", word::gpu, 2},
    {"GPU-a", word::nothing}, // two begin so
    {"GPU-c3333", word::nothing},
    {"aa11", word::nothing},
    {"MIG-aa11/1/0", word::part},
  };
  return words;
}

/// All before the first entry that means nothing or a GPU again.
places meaning(const std::vector<word>& list) {
  places result;
  std::vector<bool> seen(3);
  for (const auto& entry : list) {
    if (entry.kind == word::nothing || (entry.kind == word::gpu && seen[entry.index]))
      break;
    if (entry.kind == word::gpu)
      seen[entry.index] = true;
    result.push_back(entry.kind == word::gpu ? std::optional(entry.index) : unknown);
  }
  return result;
}

std::string joined(const std::vector<word>& list) {
  std::string text = list.front().text;
  for (std::size_t i = 1; i < list.size(); ++i)
    text += std::string(",") + list[i].text;
  return text;
}

} // namespace

TEST_CASE("every list of up to three entries shows the GPUs that it names, as far as it is valid") {
  const auto gpus = three_of_a_kind();
  const auto& words = vocabulary();
  auto check = [&](const std::vector<word>& list) {
    INFO(joined(list));
    REQUIRE(visible_gpus(gpus, {joined(list), {}}) == meaning(list));
  };
  for (const auto& a : words) {
    check({a});
    for (const auto& b : words) {
      check({a, b});
      for (const auto& c : words)
        check({a, b, c});
    }
  }
}

TEST_CASE("without a list all GPUs are visible, and with an empty one none") {
  CHECK(visible_gpus(three_of_a_kind(), {}) == places{0, 1, 2});
  CHECK(visible_gpus(three_of_a_kind(), {"", {}}).empty());
  CHECK(visible_gpus({}, {}).empty());
  CHECK(visible_gpus({}, {"0", {}}).empty());
  CHECK(visible_gpus({}, {"MIG-x", {}}) == places{unknown});
}

TEST_CASE("what the CUDA guide says of its own examples") {
  CHECK(visible_gpus(three_of_a_kind(), {"2,1", {}}) == places{2, 1});
  CHECK(visible_gpus(three_of_a_kind(), {"0,2,-1,1", {}}) == places{0, 2});
}

TEST_CASE("numbers of GPUs of several kinds mean nothing to NVML, unless CUDA counts by the bus") {
  const auto gpus = two_kinds();
  CHECK(visible_gpus(gpus, {}) == places{unknown, unknown, unknown});
  CHECK(visible_gpus(gpus, {{}, "FASTEST_FIRST"}) == places{unknown, unknown, unknown});
  CHECK(visible_gpus(gpus, {{}, "PCI_BUS_ID"}) == places{0, 1, 2});
  CHECK(visible_gpus(gpus, {"2,0", {}}) == places{unknown, unknown});
  CHECK(visible_gpus(gpus, {"2,2,0", {}}) == places{unknown});
  CHECK(visible_gpus(gpus, {"2,3", {}}) == places{unknown});
  CHECK(visible_gpus(gpus, {"2,0", "PCI_BUS_ID"}) == places{2, 0});
  CHECK(visible_gpus(gpus, {"GPU-c,0,GPU-aa", {}}) == places{2, unknown, 0});
}

TEST_CASE("the number of a device is that of its name") {
  CHECK(cuda_index("cuda:0") == 0U);
  CHECK(cuda_index("cuda:17") == 17U);
  for (const char* other : {"cpu:0", "cuda:", "cuda:x", "cuda:1x", "cuda", "", "cuda:-1"})
    CHECK(cuda_index(other) == std::nullopt);
}

TEST_CASE("the environment is told apart from an empty one") {
  ::unsetenv("CUDA_VISIBLE_DEVICES");
  CHECK(cuda_environment::current().visible_devices == std::nullopt);
  ::setenv("CUDA_VISIBLE_DEVICES", "", 1);
  ::setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID", 1);
  CHECK(cuda_environment::current().visible_devices == "");
  CHECK(cuda_environment::current().device_order == "PCI_BUS_ID");
  ::unsetenv("CUDA_VISIBLE_DEVICES");
  ::unsetenv("CUDA_DEVICE_ORDER");
}
