#include "gpu.hpp"

#include <algorithm>
#include <cmath>
#include <random>

namespace kernel_tests {

using troupe::kernels::group_rank;
using troupe::kernels::kMaxLogprobs;
using troupe::kernels::router_params;
using troupe::kernels::router_score;
using troupe::kernels::sampled_token;
using troupe::kernels::sampling_params;
using troupe::kernels::weight_use;

TEST_CASE("the router chooses as the reference does") {
  if (gpu() == nullptr) {
    return;
  }
  std::mt19937 random(11);
  struct router_case {
    router_params params;
    bool biased;
    element_type type;
  };
  const std::vector<router_case> cases{
    {{256, 8, 4, 8, 2.5F, true, router_score::sigmoid, group_rank::best_two},
     true,
     element_type::bf16},
    {{24, 4, 2, 5, 1.5F, true, router_score::sigmoid, group_rank::best_two},
     true,
     element_type::f32},
    {{64, 1, 1, 6, 1.0F, false, router_score::softmax, group_rank::best},
     false,
     element_type::bf16},
    {{160, 8, 3, 6, 16.0F, false, router_score::softmax, group_rank::best},
     false,
     element_type::bf16},
    {{16, 16, 4, 4, 1.0F, true, router_score::sigmoid, group_rank::best_two},
     true,
     element_type::bf16}};
  for (const auto& c : cases) {
    const auto& p = c.params;
    INFO(p.num_experts << " experts in " << p.num_groups << " groups");
    const auto w = random_weight(c.type, p.num_experts, 192, random);
    const auto placed = gpu()->place(w.view, weight_use::stored);
    auto bias = random_matrix(1, p.num_experts, random, 0.3F).data;
    const float* on_gpu = c.biased ? gpu_vector(bias) : nullptr;
    auto x = random_rows(200, 192, random, 0.3F);
    const auto size = std::size_t(200) * p.top_k;
    std::vector<std::int32_t> experts(size), expected(size);
    std::vector<float> weights(size), expected_weights(size);
    reference().route(x.view(), w.view, c.biased ? bias.data() : nullptr, p, expected,
                      expected_weights);
    const gpu_rows input(x);
    gpu()->route(input.view(), placed, on_gpu, p, experts, weights);
    int differing = 0;
    for (int row = 0; row < 200; ++row) {
      const auto at = row * p.top_k;
      if (!std::equal(&experts[at], &experts[at] + p.top_k, &expected[at])) {
        ++differing; // sums in another order decide what is almost a tie
        continue;
      }
      for (int k = 0; k < p.top_k; ++k) {
        CHECK(weights[at + k] == Approx(expected_weights[at + k]).epsilon(1e-4));
      }
    }
    CHECK(differing <= 1);
    std::vector<std::int32_t> alone(p.top_k);
    std::vector<float> alone_weights(p.top_k);
    gpu()->route(input.first_rows(1), placed, on_gpu, p, alone, alone_weights);
    CHECK(std::equal(alone.begin(), alone.end(), experts.begin()));
    CHECK(std::equal(alone_weights.begin(), alone_weights.end(), weights.begin()));
  }
}

TEST_CASE("equal scores go to the lower experts, NaN to nobody") {
  if (gpu() == nullptr) {
    return;
  }
  const std::vector<float> zeros(16 * 32, 0.0F);
  const weight_matrix w{zeros.data(), element_type::f32, 16, 32};
  const auto placed = gpu()->place(w, weight_use::stored);
  router_params params{16, 4, 2, 4, 1.0F, true, router_score::sigmoid, group_rank::best_two};
  matrix x(2, 32);
  x.at(1, 3) = std::nanf("");
  std::vector<std::int32_t> experts(8), expected(8);
  std::vector<float> weights(8), expected_weights(8);
  reference().route(x.view(), w, nullptr, params, expected, expected_weights);
  gpu()->route(gpu_rows(x).view(), placed, nullptr, params, experts, weights);
  CHECK(experts == expected);
  CHECK(weights[0] == 0.25F);
}

namespace {

std::vector<sampled_token> draw(const matrix& logits, const std::vector<sampling_params>& params,
                                ops& device) {
  std::vector<sampled_token> result(params.size());
  if (&device == gpu()) {
    device.sample(gpu_floats(logits).view(), params, result);
  } else {
    auto copy = logits;
    device.sample(copy.view(), params, result);
  }
  return result;
}

void check_tokens(std::initializer_list<int> vocabularies, int rows) {
  std::mt19937 random(12);
  const std::vector<std::int32_t> banned{3, 50, 9999999, -1};
  for (const int vocabulary : vocabularies) {
    auto logits = random_matrix(rows, vocabulary, random, 3.0F);
    std::vector<sampling_params> params(rows);
    for (int m = 0; m < rows; ++m) {
      auto& p = params[m];
      p.temperature = m % 5 == 0 ? 0.0F : 0.3F + 0.2F * float(m % 7);
      p.top_k = m % 3 == 0 ? 1 + int(random() % 50) : 0;
      p.top_p = m % 4 == 0 ? 0.8F : 1.0F;
      p.min_p = m % 6 == 1 ? 0.05F : 0.0F;
      p.seed = random();
      p.position = m;
      p.num_logprobs = m % kMaxLogprobs;
      p.target = m % 11 == 10 ? m % vocabulary : -1;
      if (m % 7 == 3) {
        p.banned = banned;
      }
      if (m % 13 == 5) { // many equal logits
        for (int t = 0; t < vocabulary; ++t) {
          logits.at(m, t) = std::round(logits.at(m, t));
        }
      }
      if (m % 17 == 6) {
        std::fill_n(&logits.at(m, 0), vocabulary, 1.5F);
      }
    }
    const auto got = draw(logits, params, *gpu());
    const auto expected = draw(logits, params, reference());
    for (int m = 0; m < rows; ++m) {
      INFO("row " << m << " of " << vocabulary);
      CHECK(got[m].token == expected[m].token);
      CHECK(got[m].logprob == Approx(expected[m].logprob).epsilon(1e-5).margin(1e-5));
      REQUIRE(got[m].num_top == expected[m].num_top);
      for (int i = 0; i < got[m].num_top; ++i) {
        CHECK(got[m].top_tokens[i] == expected[m].top_tokens[i]);
        CHECK(got[m].top_logprobs[i] == Approx(expected[m].top_logprobs[i]).margin(1e-4));
      }
    }
    const auto alone = draw(select_rows(logits, {rows - 1}), {params.back()}, *gpu());
    CHECK(alone[0].token == got.back().token);
    CHECK(alone[0].logprob == got.back().logprob);
  }
}

} // namespace

/// Few enough for racecheck, which takes its time for every access to shared memory.
TEST_CASE("tokens of a small vocabulary are drawn as the reference draws them", "[drawn]") {
  if (gpu() != nullptr) {
    check_tokens({257}, 6);
  }
}

TEST_CASE("tokens are drawn as the reference draws them", "[large]") {
  if (gpu() != nullptr) {
    check_tokens({1003}, 18);
  }
}

TEST_CASE("tokens of R1's vocabulary are drawn as the reference draws them", "[large]") {
  if (gpu() != nullptr) {
    check_tokens({8, 1003}, 150);
    check_tokens({129280}, 24);
  }
}

TEST_CASE("tokens of a vocabulary beyond shared memory are drawn as the reference draws them",
          "[large]") {
  if (gpu() != nullptr) {
    check_tokens({500003}, 6);
  }
}

TEST_CASE("where nothing may be drawn, nothing is") {
  if (gpu() == nullptr) {
    return;
  }
  const float never = -std::numeric_limits<float>::infinity();
  matrix logits(3, 40);
  std::fill_n(&logits.at(1, 0), 40, never);
  std::fill_n(&logits.at(2, 0), 40, never);
  logits.at(2, 17) = -3.0F;
  std::vector<std::int32_t> everything(40);
  std::iota(everything.begin(), everything.end(), 0);
  std::vector<sampling_params> params(3);
  params[0].banned = everything;
  params[2].temperature = 0.8F;
  const auto got = draw(logits, params, *gpu());
  CHECK(got[0].token == -1);
  CHECK(got[0].logprob == never);
  CHECK(got[1].token == -1);
  CHECK(got[2].token == 17);
  CHECK(gpu()->failure().empty());
}

} // namespace kernel_tests
