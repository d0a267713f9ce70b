#include "troupe/model/stage_group.hpp"

#include "stage_pipeline.hpp"

#include <chrono>
#include <thread>

#include <catch2/catch.hpp>

using namespace troupe;
using namespace troupe::model;
using test::layout;
using test::same_bits;
using test::stage_pipeline;

namespace {

const std::string references = TROUPE_SOURCE_DIR "/tests/data/reference/";
const std::string mini_model = TROUPE_SOURCE_DIR "/configs/models/troupe-mini";

/// Operations of `size` ranks that compute together.
class ranks {
public:
  explicit ranks(std::int32_t size, kernels::numerics mode = kernels::numerics::exact) {
    const auto group = kernels::make_cpu_rank_group(size);
    for (std::int32_t rank = 0; rank < size; ++rank) {
      owned_.push_back(kernels::make_cpu_ops(1, nullptr, mode, group, rank));
      all.push_back(owned_.back().get());
    }
  }

  std::vector<kernels::ops*> all;

private:
  std::vector<std::unique_ptr<kernels::ops>> owned_;
};

/// Golden values of a model whose stages are computed by so many ranks; the same bits however
/// prompts are cut and on one stage or more.
void check_ranks(const std::string& directory, std::int32_t num_ranks,
                 const std::vector<std::int32_t>& stage_ends, std::size_t num_prompts) {
  ranks group(num_ranks);
  const auto expected = test::load_golden(directory);
  stage_pipeline reference(directory, {{stage_ends.back()}, 0}, 1, 512, group.all);
  stage_pipeline staged(directory, {stage_ends, 0}, 1, 512, group.all);
  std::vector<double> deviations;
  for (std::size_t i = 0; i < std::min(num_prompts, expected.size()); ++i) {
    INFO(directory << ", " << num_ranks << " ranks, prompt " << i);
    const auto tokens = expected[i].all_tokens();
    const auto logits = reference.score(tokens, 512);
    test::add_deviations(expected[i], logits, reference.vocab_size(), deviations);
    CHECK(same_bits(staged.score(tokens, 7), logits));
  }
  CHECK(test::quantile(deviations, 1.0) < 5e-4);
}

} // namespace

TEST_CASE("stages on two devices: golden log-probabilities, same bits however they are cut") {
  check_ranks(references + "deepseek_v3", 2, {2, 4}, 3);
  check_ranks(references + "deepseek_v3_fp8", 2, {1, 4}, 3);
  check_ranks(references + "deepseek_v2", 2, {2, 4}, 3);
  check_ranks(references + "deepseek_v2_lite", 2, {2, 4}, 3);
  check_ranks(references + "llama", 2, {2, 4}, 3);
  check_ranks(references + "qwen2", 2, {2, 4}, 3);
  check_ranks(mini_model, 2, {3, 6}, 3);
}

TEST_CASE("stages on four devices: golden log-probabilities of troupe-mini") {
  check_ranks(mini_model, 4, {2, 6}, 2);
}

TEST_CASE("stages on two devices with fast numerics: troupe-mini keeps its golden tokens") {
  ranks group(2, kernels::numerics::fast);
  stage_pipeline pipeline(mini_model, {{6}, 0}, 1, 512, group.all);
  for (const auto& one : test::load_golden(mini_model)) {
    const auto logits = pipeline.score(one.all_tokens(), 512);
    const auto vocab = pipeline.vocab_size();
    for (std::size_t i = 0; i < one.tokens.size(); ++i) {
      const auto* at = logits.data() + (one.prompt.size() - 1 + i) * vocab;
      if (one.min_margin > 6e-2)
        CHECK(std::max_element(at, at + vocab) - at == one.tokens[i]);
    }
  }
}

TEST_CASE("an error of a micro-batch is the same on all devices, and the next one is computed") {
  ranks group(2);
  stage_pipeline pipeline(mini_model, {{6}, 0}, 1, 64, group.all);
  const auto good = pipeline.score({5, 6, 7}, 512);
  const auto refused = pipeline.forward({{0, 0, {5, 99999}}});
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == error_code::invalid_request);
  CHECK(same_bits(pipeline.score({5, 6, 7}, 512), good));
}

TEST_CASE("ranks that look out for the next micro-batch compute the same, whenever it comes") {
  using namespace std::chrono_literals;
  ranks group(2);
  const auto tokens = test::load_golden(mini_model).front().all_tokens();
  stage_pipeline asleep(mini_model, {{6}, 0}, 1, 512, group.all);
  const auto expected = asleep.score(tokens, 512);
  for (const auto late : {0us, 100us, 400us, 1000us}) {
    layout how{{6}, 0};
    how.alert = 400us;
    stage_pipeline alert(mini_model, how, 1, 512, group.all);
    std::this_thread::sleep_for(late);
    CHECK(same_bits(alert.score(tokens, 512), expected));
    std::this_thread::sleep_for(late);
    CHECK(same_bits(alert.score(tokens, 3), expected));
    REQUIRE_FALSE(alert.forward({{0, 0, {5, 99999}}}));
    std::this_thread::sleep_for(late); // before it ends
  }
}
