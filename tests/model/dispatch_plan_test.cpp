#include "troupe/model/dispatch_plan.hpp"

#include <algorithm>
#include <numeric>
#include <random>
#include <set>

#include <catch2/catch.hpp>

using namespace troupe;
using namespace troupe::model;

namespace {

std::vector<std::int32_t> random_experts(std::mt19937& random, std::int32_t num_experts,
                                         std::int32_t rows, std::int32_t top_k) {
  std::vector<std::int32_t> all(num_experts);
  std::iota(all.begin(), all.end(), 0);
  std::vector<std::int32_t> result;
  for (std::int32_t row = 0; row < rows; ++row) {
    std::shuffle(all.begin(), all.end(), random);
    std::sort(all.begin(), all.begin() + top_k);
    result.insert(result.end(), all.begin(), all.begin() + top_k);
  }
  return result;
}

} // namespace

TEST_CASE("a small plan is the one worked out by hand") {
  const std::vector<expert_range> groups{{0, 2}, {2, 4}};
  auto plan = dispatch_plan::make(groups, 4, 8, 2);
  REQUIRE(plan);
  // Row 0 goes to experts 1 and 3, row 1 to 2 and 3, row 2 to 0 and 1.
  REQUIRE(plan->build(std::vector<std::int32_t>{1, 3, 2, 3, 0, 1}));
  const auto a = plan->work(0);
  CHECK(std::vector<std::int32_t>(a.rows.begin(), a.rows.end()) == std::vector<std::int32_t>{0, 2});
  REQUIRE(a.tasks.size() == 3);
  CHECK((a.tasks[0].expert == 0 && a.tasks[0].row == 1));
  CHECK((a.tasks[1].expert == 1 && a.tasks[1].row == 0));
  CHECK((a.tasks[2].expert == 1 && a.tasks[2].row == 1));
  CHECK(a.first_output == 0);
  const auto b = plan->work(1);
  CHECK(std::vector<std::int32_t>(b.rows.begin(), b.rows.end()) == std::vector<std::int32_t>{0, 1});
  REQUIRE(b.tasks.size() == 3);
  CHECK((b.tasks[0].expert == 2 && b.tasks[0].row == 1));
  CHECK((b.tasks[1].expert == 3 && b.tasks[1].row == 0));
  CHECK((b.tasks[2].expert == 3 && b.tasks[2].row == 1));
  CHECK(b.first_output == 3);
  const auto rows = plan->expert_rows();
  CHECK(std::vector<std::int32_t>(rows.begin(), rows.end())
        == std::vector<std::int32_t>{1, 4, 3, 5, 0, 2});
}

TEST_CASE("every (row, k) is computed once, by the group that has its expert") {
  std::mt19937 random(7);
  for (int round = 0; round < 200; ++round) {
    const auto num_experts = static_cast<std::int32_t>(2 + random() % 40);
    const auto top_k = static_cast<std::int32_t>(1 + random() % std::min(num_experts, 8));
    std::vector<expert_range> groups;
    for (std::int32_t next = 0; next < num_experts;) {
      const auto end = std::min<std::int32_t>(num_experts, next + 1 + random() % 10);
      groups.push_back({next, end});
      next = end;
    }
    auto plan = dispatch_plan::make(groups, num_experts, 64, top_k);
    REQUIRE(plan);
    for (int build = 0; build < 3; ++build) { // a plan is used again and again
      const auto num_rows = static_cast<std::int32_t>(random() % 65);
      const auto experts = random_experts(random, num_experts, num_rows, top_k);
      REQUIRE(plan->build(experts));
      std::vector<std::pair<std::int32_t, std::int32_t>> outputs(experts.size(), {-1, -1});
      for (std::size_t g = 0; g < plan->num_groups(); ++g) {
        const auto work = plan->work(g);
        REQUIRE(std::is_sorted(work.rows.begin(), work.rows.end()));
        REQUIRE(std::set(work.rows.begin(), work.rows.end()).size() == work.rows.size());
        std::set<std::int32_t> used;
        for (std::size_t i = 0; i < work.tasks.size(); ++i) {
          const auto& task = work.tasks[i];
          REQUIRE((task.expert >= groups[g].first && task.expert < groups[g].end));
          REQUIRE((i == 0 || work.tasks[i - 1].expert <= task.expert));
          outputs[work.first_output + i] = {work.rows[task.row], task.expert};
          used.insert(task.row);
        }
        REQUIRE(used.size() == work.rows.size());
      }
      REQUIRE(plan->expert_rows().size() == experts.size());
      for (std::size_t i = 0; i < experts.size(); ++i)
        REQUIRE(outputs[plan->expert_rows()[i]]
                == std::pair{static_cast<std::int32_t>(i / top_k), experts[i]});
    }
  }
}

TEST_CASE("groups that do not cover the experts in order are refused") {
  using ranges = std::vector<expert_range>;
  for (const auto& groups : {ranges{}, ranges{{0, 3}}, ranges{{0, 2}, {3, 4}}, ranges{{0, 5}},
                             ranges{{2, 4}, {0, 2}}, ranges{{0, 2}, {2, 2}, {2, 4}}}) {
    auto plan = dispatch_plan::make(groups, 4, 8, 2);
    REQUIRE_FALSE(plan);
    CHECK(plan.error().code == error_code::invalid_config);
  }
}

TEST_CASE("experts out of range and too many rows are errors, and the plan goes on") {
  const std::vector<expert_range> groups{{0, 4}};
  auto plan = dispatch_plan::make(groups, 4, 2, 2);
  REQUIRE(plan);
  CHECK_FALSE(plan->build(std::vector<std::int32_t>{0, 4}));
  CHECK_FALSE(plan->build(std::vector<std::int32_t>{-1, 2}));
  CHECK_FALSE(plan->build(std::vector<std::int32_t>{0, 1, 0, 1, 0, 1}));
  CHECK_FALSE(plan->build(std::vector<std::int32_t>{0, 1, 0}));
  CHECK(plan->work(0).tasks.empty());
  CHECK(plan->build(std::vector<std::int32_t>{0, 1, 2, 3}));
  CHECK(plan->work(0).tasks.size() == 4);
}
