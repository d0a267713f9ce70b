#include "stage_pipeline.hpp"
#include "temporary_directory.hpp"
#include "tiny_checkpoint.hpp"

#include "troupe/model/expert_group_model.hpp"

using namespace troupe;
using namespace troupe::model;

namespace {

const std::vector<std::int32_t> kTokens{3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5};

/// A made-up model, DeepSeek's or Llama's.
std::string model_in(const testing::temporary_directory& directory, bool latent) {
  auto text = test::tiny_config();
  if (latent)
    text["num_nextn_predict_layers"] = 1;
  else
    text = nlohmann::json::parse(R"({"model_type": "llama", "vocab_size": 48, "hidden_size": 32,
      "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
      "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "eos_token_id": 1})");
  const auto file = directory.path() / "config.json";
  test::write_file(file, text.dump());
  return "random:" + file.string();
}

} // namespace

TEST_CASE("what was rehearsed leaves no trace in what is computed") {
  static const auto ops = kernels::make_cpu_ops(1);
  const testing::temporary_directory directory;
  const bool latent = GENERATE(true, false);
  const auto model = model_in(directory, latent);
  const test::layout layouts[] = {{{2}, 0}, {{1, 2}, 0}, {{1, 2}, 2}};
  for (auto how : layouts) {
    if (!latent && how.num_groups > 0)
      continue;
    CAPTURE(latent, how.stage_ends.size(), how.num_groups);
    const std::int32_t max_rows = 70;
    const std::int32_t max_drafts = latent ? 2 : 0;
    test::stage_pipeline plain(model, how, 1, 64, *ops, max_rows, max_drafts);
    how.rehearses = true;
    test::stage_pipeline rehearsed(model, how, 1, 64, *ops, max_rows, max_drafts);
    CHECK(rehearsed.score(kTokens, 4) == plain.score(kTokens, 4));
  }
}

TEST_CASE("ranks rehearse one by one, and add up together afterwards") {
  const auto group = kernels::make_cpu_rank_group(2);
  const auto first = kernels::make_cpu_ops(1, nullptr, kernels::numerics::exact, group, 0);
  const auto second = kernels::make_cpu_ops(1, nullptr, kernels::numerics::exact, group, 1);
  const std::vector<kernels::ops*> ranks{first.get(), second.get()};
  const testing::temporary_directory directory;
  const auto model = model_in(directory, false);
  test::stage_pipeline plain(model, {{2}, 0}, 1, 64, ranks, 70);
  test::stage_pipeline rehearsed(model, {{2}, 0, true}, 1, 64, ranks, 70);
  CHECK(rehearsed.score(kTokens, 4) == plain.score(kTokens, 4));
  CHECK(first->failure().empty());
  CHECK(second->failure().empty());
}

TEST_CASE("a stage that has rehearsed waits for its KV memory") {
  static const auto ops = kernels::make_cpu_ops(1);
  const testing::temporary_directory directory;
  test::stage_pipeline pipeline(model_in(directory, true), {{2}, 0}, 1, 64, *ops, 16);
  REQUIRE(pipeline.last().rehearse(4, 16));
  auto computed = pipeline.forward({{0, 0, {3, 1}}});
  REQUIRE_FALSE(computed);
  CHECK_THAT(computed.error().cause, Catch::Contains("KV memory"));
  auto logits = pipeline.last().logits(std::vector<std::int32_t>{0});
  CHECK_FALSE(logits);
}

TEST_CASE("an expert group rehearses with every expert that it has") {
  static const auto ops = kernels::make_cpu_ops(1);
  const testing::temporary_directory directory;
  const auto model = model_in(directory, true);
  auto config = load_model_config(model);
  REQUIRE(config);
  auto source = open_weights(model);
  REQUIRE(source);
  for (const expert_range range : {expert_range{0, config->num_experts}, expert_range{1, 2}}) {
    auto group = expert_group_model::load(*source, *config, range, *ops);
    REQUIRE(group);
    CHECK((*group)->rehearse(33, config->num_experts_per_token));
    CHECK((*group)->rehearse(1, 1));
  }
}
