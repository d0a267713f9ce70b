#include "gpu.hpp"

#include <algorithm>
#include <cmath>
#include <random>
#include <span>

namespace kernel_tests {

using troupe::kernels::expert_task;
using troupe::kernels::expert_weights;
using troupe::kernels::group_rank;
using troupe::kernels::mixture_scratch;
using troupe::kernels::mixture_weights;
using troupe::kernels::router_params;
using troupe::kernels::router_score;
using troupe::kernels::weight_use;

namespace {

/// Most rows that a GPU mixes without its host.
constexpr int kMixedRows = 64;

struct mixture_case {
  const char* name;
  element_type type;
  int hidden, inner;
  router_params params;
  int shared = 0;          ///< width of the shared expert; 0: none
  int crowded = 0;         ///< so many experts are wanted far more than the others
  bool is_strided = false; ///< rows begin at odd places
};

constexpr auto kSigmoid = router_score::sigmoid;
constexpr auto kSoftmax = router_score::softmax;
constexpr auto kBestTwo = group_rank::best_two;
constexpr auto kBest = group_rank::best;

/// A mixture on the GPU, and the way by the host to compare it with.
class mixture_on_gpu {
public:
  mixture_on_gpu(const mixture_case& c, std::mt19937& random) : case_(c) {
    const auto num_experts = c.params.num_experts;
    for (int e = 0; e < num_experts; ++e) {
      experts_.push_back(expert(c.inner, random));
    }
    if (c.shared > 0) {
      shared_ = expert(c.shared, random);
    }
    router_ = random_weight(element_type::bf16, num_experts, c.hidden, random);
    auto bias = random_matrix(1, num_experts, random, 0.3F).data;
    for (int e = 0; e < c.crowded; ++e) {
      bias[e] += 10.0F;
    }
    weights_.router = gpu()->place(router_.view, weight_use::stored);
    weights_.bias = c.params.score == kSigmoid ? gpu_vector(bias) : nullptr;
    weights_.experts = experts_;
    weights_.shared = c.shared > 0 ? &shared_ : nullptr;
  }

  /// What `mixture` adds to `base`; nothing where it does not know how.
  bool mix(const matrix& x, const matrix& base, matrix& out) const {
    const auto count = x.num_rows;
    const gpu_rows input(x, stride()), sum(base, stride());
    const gpu_rows gate(count, std::max(case_.shared, 1)), up(count, std::max(case_.shared, 1));
    const gpu_rows shared(count, case_.hidden), rows(count * top_k(), case_.hidden, stride());
    mixture_scratch scratch{gate.view(), up.view(), shared.view(), rows.view()};
    const bool done = gpu()->mixture(input.view(), weights_, case_.params, scratch, sum.view());
    out = sum.read();
    return done;
  }

  matrix by_the_host(const matrix& x, const matrix& base) const {
    const auto count = x.num_rows;
    const gpu_rows input(x, stride()), sum(base, stride());
    const auto size = static_cast<std::size_t>(count) * top_k();
    std::vector<std::int32_t> chosen(size), places(size);
    std::vector<float> factors(size);
    gpu()->route(input.view(), weights_.router, weights_.bias, case_.params, chosen, factors);
    std::vector<std::size_t> order(size);
    std::iota(order.begin(), order.end(), 0U);
    std::stable_sort(order.begin(), order.end(),
                     [&](auto a, auto b) { return chosen[a] < chosen[b]; });
    std::vector<expert_task> tasks;
    for (const auto at : order) {
      places[at] = static_cast<std::int32_t>(tasks.size());
      tasks.push_back({static_cast<std::int32_t>(at / top_k()), chosen[at]});
    }
    const gpu_rows rows(static_cast<int>(size), case_.hidden);
    gpu()->experts(input.view(), tasks, experts_, rows.view());
    const gpu_rows gate(count, std::max(case_.shared, 1)), up(count, std::max(case_.shared, 1));
    const gpu_rows shared(count, case_.hidden);
    if (weights_.shared != nullptr) {
      gpu()->mlp(input.view(), shared_, gate.view(), up.view(), shared.view());
    }
    gpu()->combine(rows.view(), places, factors, top_k(),
                   weights_.shared != nullptr ? shared.view() : rows_view{}, sum.view());
    return sum.read();
  }

private:
  int stride() const { return case_.is_strided ? case_.hidden + 3 : 0; }
  int top_k() const { return case_.params.top_k; }

  weight_matrix place(int rows, int cols, std::mt19937& random) {
    const auto type = case_.type;
    const bool is_i8 = type == element_type::i8;
    kept_.push_back(type == element_type::i4
                      ? random_i4(rows, cols, 128, random)
                      : random_weight(type, rows, cols, random, type != element_type::bf16,
                                      is_i8 ? 1 : 128, 128));
    return gpu()->place(kept_.back().view);
  }

  expert_weights expert(int inner, std::mt19937& random) {
    const auto gate = place(inner, case_.hidden, random);
    const auto up = place(inner, case_.hidden, random);
    return {gate, up, place(case_.hidden, inner, random)};
  }

  mixture_case case_;
  std::vector<test_weight> kept_;
  std::vector<expert_weights> experts_;
  expert_weights shared_;
  test_weight router_;
  mixture_weights weights_;
};

std::vector<int> first(int count) {
  std::vector<int> result(count);
  std::iota(result.begin(), result.end(), 0);
  return result;
}

const mixture_case kCases[] = {
  {"few experts, tiles of many rows",
   element_type::f8_e4m3,
   256,
   128,
   {16, 4, 2, 4, 2.5F, true, kSigmoid, kBestTwo},
   128},
  {"ragged widths, another shared expert",
   element_type::f8_e4m3,
   192,
   80,
   {6, 1, 1, 2, 1.0F, false, kSoftmax, kBest},
   160},
  {"rows at odd places",
   element_type::bf16,
   128,
   72,
   {24, 4, 2, 5, 1.5F, true, kSigmoid, kBestTwo},
   72,
   0,
   true},
  {"4 bit", element_type::i4, 256, 128, {20, 1, 1, 3, 1.0F, false, kSoftmax, kBest}, 128},
  {"8 bit", element_type::i8, 1024, 128, {40, 8, 3, 6, 16.0F, false, kSoftmax, kBest}, 256},
  {"every expert for every row",
   element_type::bf16,
   128,
   64,
   {4, 1, 1, 4, 1.0F, true, kSoftmax, kBest},
   64}};

const mixture_case kLargeCases[] = {{"as many as R1",
                                     element_type::f8_e4m3,
                                     256,
                                     128,
                                     {256, 8, 4, 8, 2.5F, true, kSigmoid, kBestTwo},
                                     128},
                                    {"all rows want the same experts",
                                     element_type::f8_e4m3,
                                     256,
                                     128,
                                     {256, 8, 4, 8, 2.5F, true, kSigmoid, kBestTwo},
                                     0,
                                     8},
                                    {"most rows want the same experts",
                                     element_type::bf16,
                                     128,
                                     128,
                                     {300, 4, 3, 6, 1.0F, true, kSigmoid, kBestTwo},
                                     128,
                                     5}};

void check_bits(std::span<const mixture_case> cases) {
  std::mt19937 random(31);
  for (const auto& c : cases) {
    const mixture_on_gpu mixture(c, random);
    const auto x = random_rows(300, c.hidden, random, 0.3F);
    const auto base = random_rows(300, c.hidden, random);
    for (const int count : {1, 3, 7, 8, 9, 32, 33, 64, 65, 300}) {
      INFO(c.name << ", " << count << " rows");
      const auto some = select_rows(x, first(count));
      const auto before = select_rows(base, first(count));
      matrix got(count, c.hidden);
      if (count > kMixedRows) {
        CHECK_FALSE(mixture.mix(some, before, got));
        CHECK(same_bits(got, before));
        continue;
      }
      REQUIRE(mixture.mix(some, before, got));
      const auto expected = mixture.by_the_host(some, before);
      CHECK(same_bits(got, expected));
      CHECK(
        std::all_of(got.data.begin(), got.data.end(), [](float v) { return std::isfinite(v); }));
      CHECK_FALSE(same_bits(got, before));
    }
  }
  CHECK(gpu()->failure().empty());
}

void check_company(std::span<const mixture_case> cases) {
  std::mt19937 random(32);
  for (const auto& c : cases) {
    const mixture_on_gpu mixture(c, random);
    auto x = random_rows(kMixedRows, c.hidden, random, 0.3F);
    const auto base = random_rows(kMixedRows, c.hidden, random);
    matrix whole(kMixedRows, c.hidden);
    REQUIRE(mixture.mix(x, base, whole));
    for (const int count : {1, 2, 5, 13, 40}) {
      auto order = shuffled(kMixedRows, random);
      order.resize(count);
      matrix got(count, c.hidden);
      REQUIRE(mixture.mix(select_rows(x, order), select_rows(base, order), got));
      INFO(c.name << ", " << count << " rows");
      CHECK(same_bits(got, select_rows(whole, order)));
    }
    // Values that are not finite stay in their row.
    x.at(17, 3) = std::nanf("");
    matrix damaged(kMixedRows, c.hidden);
    REQUIRE(mixture.mix(x, base, damaged));
    CHECK(std::isnan(damaged.at(17, 0)));
    std::copy_n(&whole.data[std::size_t(17) * c.hidden], c.hidden,
                &damaged.data[std::size_t(17) * c.hidden]);
    CHECK(same_bits(damaged, whole));
  }
  CHECK(gpu()->failure().empty());
}

} // namespace

TEST_CASE("a mixture on the device has the bits of the way by the host") {
  if (gpu() != nullptr) {
    check_bits(kCases);
  }
}

TEST_CASE("a mixture of many experts has the bits of the way by the host", "[large]") {
  if (gpu() != nullptr) {
    check_bits(kLargeCases);
  }
}

TEST_CASE("a row of a mixture has the same bits in any company") {
  if (gpu() != nullptr) {
    check_company(kCases);
  }
}

TEST_CASE("a row of a mixture of many experts has the same bits in any company", "[large]") {
  if (gpu() != nullptr) {
    check_company(kLargeCases);
  }
}

TEST_CASE("experts of several shapes are left to the host") {
  if (gpu() == nullptr) {
    return;
  }
  std::mt19937 random(33);
  std::vector<test_weight> kept;
  std::vector<expert_weights> experts;
  for (int e = 0; e < 4; ++e) {
    const auto one = [&](int rows, int cols) {
      kept.push_back(random_weight(element_type::f8_e4m3, rows, cols, random, true));
      if (e == 2) {
        (*kept.back().data)[7] = 0x7F; // NaN, which only bfloat16 can say
      }
      return gpu()->place(kept.back().view);
    };
    const auto gate = one(128, 256);
    const auto up = one(128, 256);
    experts.push_back({gate, up, one(256, 128)});
  }
  const auto router = random_weight(element_type::bf16, 4, 256, random);
  mixture_weights w;
  w.router = gpu()->place(router.view, weight_use::stored);
  w.experts = experts;
  const gpu_rows x(random_rows(3, 256, random)), out(random_rows(3, 256, random));
  const gpu_rows rows(6, 256);
  mixture_scratch scratch;
  scratch.expert_out = rows.view();
  const router_params params{4, 1, 1, 2, 1.0F, true, kSoftmax, kBest};
  const auto before = out.read();
  for (int again = 0; again < 2; ++again) {
    CHECK_FALSE(gpu()->mixture(x.view(), w, params, scratch, out.view()));
    CHECK(same_bits(out.read(), before));
  }
  CHECK(gpu()->failure().empty());
}

} // namespace kernel_tests
