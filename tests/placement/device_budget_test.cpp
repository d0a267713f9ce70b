#include "troupe/placement/device_budget.hpp"

#include <catch2/catch.hpp>

using namespace troupe;
using placement::check_device;
using placement::device_need;

namespace {

constexpr std::uint64_t giga = 1'000'000'000;

const device_need kNeed{60 * giga, 10 * giga, 2 * giga, giga / 4, giga};

} // namespace

TEST_CASE("a GPU that is just large enough is taken, and one byte less is refused with numbers") {
  CHECK(kNeed.total() == 73 * giga + giga / 4);
  CHECK(check_device("cuda:1 of node-0", kNeed, kNeed.total(), 65536));
  const auto refused = check_device("cuda:1 of node-0", kNeed, kNeed.total() - 1, 65536);
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == error_code::invalid_config);
  CHECK(is_permanent(refused.error().code));
  CHECK(refused.error().cause
        == "cuda:1 of node-0 needs 73.2 GB (weights 60.0 GB, KV pages 10.0 GB, scratch 2.00 GB, "
           "recorded steps 0.25 GB, contexts 1.00 GB) and has 73.2 GB");
}

TEST_CASE("the cure names the tokens for which there is room") {
  auto refused = check_device("cuda:0", kNeed, 68 * giga, 65536);
  REQUIRE_FALSE(refused);
  // 4.75 of 10 GB: 31129 tokens, in whole thousands of 1024.
  CHECK_THAT(refused.error().cure, Catch::StartsWith("write serving.kv_tokens: 30720 or less (it "
                                                     "is 65536), or use more GPUs"));
  CHECK_THAT(refused.error().cure, !Catch::Contains("max_batch_tokens"));
  auto need = kNeed;
  need.kv_pages = 10 * giga * 30720 / 65536;
  CHECK(check_device("cuda:0", need, 68 * giga, 30720));
}

TEST_CASE("where the rest alone is too much, no number of tokens helps") {
  for (const std::uint64_t available : {std::uint64_t{0}, 40 * giga, kNeed.total() - 10 * giga}) {
    const auto refused = check_device("cuda:0", kNeed, available, 65536);
    REQUIRE_FALSE(refused);
    CHECK_THAT(refused.error().cure, !Catch::Contains("kv_tokens"));
    CHECK_THAT(refused.error().cure, Catch::Contains("more GPUs"));
  }
  auto need = kNeed;
  need.kv_pages = 0;
  const auto refused = check_device("cuda:0", need, 10 * giga, 0);
  REQUIRE_FALSE(refused);
  CHECK_THAT(refused.error().cure, !Catch::Contains("kv_tokens"));
  CHECK_THAT(refused.error().cause, !Catch::Contains("KV pages"));
  CHECK_THAT(refused.error().cure, Catch::Contains("max_batch_tokens"));
}

TEST_CASE("needs add up by kind") {
  auto sum = kNeed;
  sum += device_need{1, 2, 3, 4, 5};
  CHECK(sum == device_need{60 * giga + 1, 10 * giga + 2, 2 * giga + 3, giga / 4 + 4, giga + 5});
  CHECK(placement::graph_bytes(8) > placement::graph_bytes(1));
}
