#include "troupe/model/stage_model.hpp"

#include "stage_pipeline.hpp"
#include "temporary_directory.hpp"
#include "tiny_checkpoint.hpp"

#include <cmath>
#include <cstring>

#include <catch2/catch.hpp>

using namespace troupe;
using namespace troupe::model;
using test::layout;
using test::same_bits;
using test::stage_pipeline;

namespace {

const std::string references = TROUPE_SOURCE_DIR "/tests/data/reference/";
const std::string bf16_model = references + "deepseek_v3";
const std::string fp8_model = references + "deepseek_v3_fp8";
const std::string shapes = TROUPE_SOURCE_DIR "/tests/data/shapes/";
const std::string mini_model = TROUPE_SOURCE_DIR "/configs/models/troupe-mini";

/// A way to compute, and how far `part` of its log-probabilities may be from the golden ones.
struct arithmetic {
  kernels::ops& ops;
  double tolerance;
  double part = 1.0;
};

kernels::ops& cpu() {
  static const auto ops = kernels::make_cpu_ops(2);
  return *ops;
}

arithmetic exact() {
  return {cpu(), 5e-4};
}

arithmetic fast() {
  static const auto ops = kernels::make_cpu_ops(2, nullptr, kernels::numerics::fast);
  // A router that is nearly tied decides otherwise for rounded activations, which moves a position
  // far: the models' random weights make many such ties.
  return {*ops, 3e-2, 0.8};
}

/// The golden tokens are the most likely wherever the margin allows to tell.
void check_tokens(const test::golden& expected, const std::vector<float>& logits,
                  std::int32_t vocab, double tolerance) {
  for (std::size_t i = 0; i < expected.tokens.size(); ++i) {
    const auto* at = logits.data() + (expected.prompt.size() - 1 + i) * vocab;
    if (expected.min_margin > 2 * tolerance)
      CHECK(std::max_element(at, at + vocab) - at == expected.tokens[i]);
  }
}

std::string describe(const layout& how) {
  return std::to_string(how.stage_ends.size()) + " stages, " + std::to_string(how.num_groups)
         + " expert groups";
}

/// Golden values on one stage in one piece, and the same bits on every other layout and chunking:
/// for the first prompts, and token by token for fewer of them, as that takes longest.
void check_model(const std::string& directory, const std::vector<layout>& layouts,
                 std::size_t num_prompts, std::size_t num_single_prompts,
                 const arithmetic& computing = exact()) {
  auto& ops = computing.ops;
  auto expected = test::load_golden(directory);
  stage_pipeline reference(directory, layouts.front(), 1, 512, ops);
  std::vector<std::vector<float>> logits;
  std::vector<double> deviations;
  for (const auto& one : expected) {
    logits.push_back(reference.score(one.all_tokens(), 512));
    test::add_deviations(one, logits.back(), reference.vocab_size(), deviations);
    check_tokens(one, logits.back(), reference.vocab_size(), computing.tolerance);
  }
  const double typical = test::quantile(deviations, computing.part);
  CHECK(typical < computing.tolerance);
  WARN(directory.substr(directory.rfind('/') + 1)
       << ": log-probabilities are off by " << test::quantile(deviations, 0.5) << " (median), "
       << test::quantile(deviations, 0.9) << " (90 %), " << test::quantile(deviations, 1.0)
       << " (most)");
  for (const auto& how : layouts) {
    stage_pipeline pipeline(directory, how, 1, 512, ops);
    for (const auto chunk : {1, 7, 512})
      for (std::size_t i = 0; i < (chunk == 1 ? num_single_prompts : num_prompts); ++i) {
        INFO(describe(how) << ", chunks of " << chunk << ", prompt " << i);
        CHECK(same_bits(pipeline.score(expected[i].all_tokens(), chunk), logits[i]));
      }
  }
}

} // namespace

TEST_CASE("bf16 reference: golden log-probabilities, same bits however it is cut") {
  check_model(bf16_model, {{{4}, 0}, {{2, 4}, 0}, {{1, 2, 3, 4}, 0}, {{4}, 2}, {{1, 4}, 3}}, 5, 3);
}

TEST_CASE("fp8 reference: golden log-probabilities, same bits however it is cut") {
  check_model(fp8_model, {{{4}, 0}, {{2, 4}, 0}, {{1, 2, 3, 4}, 0}, {{4}, 2}, {{3, 4}, 3}}, 5, 3);
}

TEST_CASE("troupe-mini: golden log-probabilities, same bits however it is cut") {
  check_model(mini_model, {{{6}, 0}, {{3, 6}, 0}, {{1, 3, 5, 6}, 0}, {{3, 6}, 2}, {{6}, 4}}, 4, 1);
}

TEST_CASE("deepseek_v2 reference: golden log-probabilities, same bits however it is cut") {
  check_model(references + "deepseek_v2", {{{4}, 0}, {{2, 4}, 0}, {{1, 2, 3, 4}, 2}, {{4}, 4}}, 5,
              3);
}

TEST_CASE("deepseek_v2_lite reference: golden log-probabilities, same bits however it is cut") {
  check_model(references + "deepseek_v2_lite", {{{4}, 0}, {{2, 4}, 0}, {{1, 3, 4}, 2}}, 5, 3);
}

TEST_CASE("llama reference: golden log-probabilities, same bits however it is cut") {
  check_model(references + "llama", {{{4}, 0}, {{2, 4}, 0}, {{1, 2, 3, 4}, 0}}, 5, 3);
}

TEST_CASE("qwen2 reference: golden log-probabilities, same bits however it is cut") {
  check_model(references + "qwen2", {{{4}, 0}, {{2, 4}, 0}, {{1, 2, 3, 4}, 0}}, 5, 3);
}

TEST_CASE("models of other shapes: golden log-probabilities, same bits however they are cut") {
  // Ragged widths, one to eight experts a token, groups of one, biases, tied embeddings, both
  // orders of rotated pairs, one key for all heads and one for each, every scaling of positions.
  const auto [name, num_groups] = GENERATE(table<std::string, int>({{"v3_ragged", 3},
                                                                    {"v3_bias_tied", 4},
                                                                    {"v3_halves", 2},
                                                                    {"v3_mostly_rotated", 0},
                                                                    {"v2_groups_of_one", 8},
                                                                    {"v2_bias", 2},
                                                                    {"llama_mqa", 0},
                                                                    {"llama_mha_bias", 0},
                                                                    {"llama_yarn", 0},
                                                                    {"qwen2_untied", 0}}));
  check_model(TROUPE_SOURCE_DIR "/tests/data/shapes/" + name,
              {{{3}, 0}, {{1, 3}, num_groups}, {{1, 2, 3}, 0}}, 3, 2);
}

TEST_CASE("fast numerics: within 3e-2 of the golden log-probabilities, same bits however cut") {
  const auto [name, num_groups] = GENERATE(table<std::string, int>({{"deepseek_v3", 2},
                                                                    {"deepseek_v3_fp8", 3},
                                                                    {"deepseek_v2", 4},
                                                                    {"deepseek_v2_lite", 0},
                                                                    {"llama", 0},
                                                                    {"qwen2", 0}}));
  check_model(references + name, {{{4}, 0}, {{1, 4}, num_groups}}, 3, 1, fast());
}

TEST_CASE("fast numerics: troupe-mini keeps its golden tokens") {
  check_model(mini_model, {{{6}, 0}, {{3, 6}, 2}}, 2, 1, fast());
}

TEST_CASE(
  "a head in 8 bit: log-probabilities close to those of the head as stored, same bits however "
  "it is cut") {
  // Tied and not; the embedding stays as it is, so the hidden states do.
  const auto [directory, end, limit] =
    GENERATE(table<std::string, std::int32_t, double>({{mini_model, 6, 0.1},
                                                       {bf16_model, 4, 0.1},
                                                       {references + "llama", 4, 0.1},
                                                       {shapes + "v3_bias_tied", 3, 0.3}}));
  CAPTURE(directory);
  const auto expected = test::load_golden(directory);
  stage_pipeline stored(directory, {{end}, 0}, 1, 512, cpu());
  stage_pipeline narrow(directory, {{end}, 0, false, head_format::int8}, 1, 512, cpu());
  stage_pipeline cut(directory, {{1, end}, 0, false, head_format::int8}, 1, 512, cpu());
  const auto vocab = stored.vocab_size();
  std::vector<double> deviations;
  int num_tokens = 0;
  int num_others = 0;
  for (std::size_t i = 0; i < std::min<std::size_t>(expected.size(), 4); ++i) {
    const auto tokens = expected[i].all_tokens();
    const auto want = stored.score(tokens, 512);
    const auto got = narrow.score(tokens, 512);
    CHECK_FALSE(same_bits(got, want));
    CHECK(same_bits(cut.score(tokens, 7), got));
    for (std::size_t row = 0; row < tokens.size(); ++row) {
      const auto* a = want.data() + row * vocab;
      const auto* b = got.data() + row * vocab;
      const auto best = static_cast<std::int32_t>(std::max_element(a, a + vocab) - a);
      deviations.push_back(std::abs(test::logprob(a, vocab, best) - test::logprob(b, vocab, best)));
      ++num_tokens;
      num_others += std::max_element(b, b + vocab) - b == best ? 0 : 1;
    }
  }
  const double median = test::quantile(deviations, 0.5);
  const double most = test::quantile(deviations, 1.0);
  WARN(directory.substr(directory.rfind('/') + 1)
       << ": a head in 8 bit moves the best token's log-probability by " << median << " (median), "
       << most << " (most), and " << num_others << " of " << num_tokens << " best tokens");
  CHECK(most > 0.0);
  CHECK(most < limit);
}

TEST_CASE("a head in 8 bit: troupe-mini keeps its golden tokens") {
  for (auto* ops : {&exact().ops, &fast().ops}) {
    stage_pipeline pipeline(mini_model, {{6}, 0, false, head_format::int8}, 1, 512, *ops);
    for (const auto& one : test::load_golden(mini_model)) {
      const auto logits = pipeline.score(one.all_tokens(), 512);
      int num_others = 0;
      for (std::size_t i = 0; i < one.tokens.size(); ++i) {
        const auto* at = logits.data() + (one.prompt.size() - 1 + i) * pipeline.vocab_size();
        num_others +=
          std::max_element(at, at + pipeline.vocab_size()) - at == one.tokens[i] ? 0 : 1;
      }
      CHECK(num_others == 0);
    }
  }
}

TEST_CASE("sequences mixed in one micro-batch give the same bits as alone") {
  const auto [name, groups] = GENERATE(std::pair{"deepseek_v3_fp8", 2}, std::pair{"deepseek_v2", 2},
                                       std::pair{"llama", 0}, std::pair{"qwen2", 0});
  const auto model = references + name;
  const auto expected = test::load_golden(model);
  const auto num_sequences = static_cast<std::int32_t>(expected.size());
  stage_pipeline alone(model, {{4}, 0}, num_sequences, 512, cpu());
  stage_pipeline crowd(model, {{2, 4}, groups}, num_sequences, 512, cpu());
  std::vector<std::vector<float>> logits(expected.size());
  std::vector<std::size_t> done(expected.size(), 0);
  std::mt19937 random(3);
  for (bool goes_on = true; goes_on;) {
    goes_on = false;
    std::vector<test::slice> slices;
    for (std::int32_t s = 0; s < num_sequences; ++s) {
      const auto tokens = expected[s].all_tokens();
      const auto count = std::min<std::size_t>(random() % 40, tokens.size() - done[s]);
      if (count > 0)
        slices.push_back({s,
                          static_cast<std::int32_t>(done[s]),
                          {tokens.begin() + done[s], tokens.begin() + done[s] + count}});
      done[s] += count;
      goes_on |= done[s] < tokens.size();
    }
    if (slices.empty())
      continue;
    std::shuffle(slices.begin(), slices.end(), random);
    REQUIRE(crowd.forward(slices));
    std::int32_t row = 0;
    for (const auto& slice : slices) {
      const auto count = static_cast<std::int32_t>(slice.tokens.size());
      crowd.append_logits(row, count, logits[slice.sequence]);
      row += count;
    }
  }
  for (std::int32_t s = 0; s < num_sequences; ++s)
    CHECK(same_bits(logits[s], alone.score(expected[s].all_tokens(), 512, s)));
}

TEST_CASE("greedy decoding of troupe-mini's conversations gives the golden tokens") {
  auto expected = test::load_golden(mini_model);
  const auto num_sequences = static_cast<std::int32_t>(expected.size());
  stage_pipeline pipeline(mini_model, {{2, 6}, 2}, num_sequences, 320, cpu(), 2048);
  std::vector<test::slice> slices;
  std::vector<std::vector<std::int32_t>> drawn(expected.size());
  for (std::int32_t s = 0; s < num_sequences; ++s)
    slices.push_back({s, 0, expected[s].prompt});
  while (!slices.empty()) {
    REQUIRE(pipeline.forward(slices));
    std::vector<std::int32_t> rows;
    std::int32_t row = -1;
    for (const auto& slice : slices)
      rows.push_back(row += static_cast<std::int32_t>(slice.tokens.size()));
    std::vector<kernels::sampled_token> out(rows.size());
    REQUIRE(pipeline.last().sample(rows, std::vector<kernels::sampling_params>(rows.size()), out));
    std::vector<test::slice> next;
    for (std::size_t i = 0; i < slices.size(); ++i) {
      const auto s = slices[i].sequence;
      drawn[s].push_back(out[i].token);
      if (drawn[s].size() < expected[s].tokens.size())
        next.push_back(
          {s,
           slices[i].first_position + static_cast<std::int32_t>(slices[i].tokens.size()),
           {out[i].token}});
    }
    slices = std::move(next);
  }
  for (std::int32_t s = 0; s < num_sequences; ++s)
    CHECK(drawn[s] == expected[s].tokens);
}

TEST_CASE("sampling reports the golden log-probabilities") {
  const auto expected = test::load_golden(bf16_model).at(3);
  const auto tokens = expected.all_tokens();
  stage_pipeline pipeline(bf16_model, {{4}, 0}, 1, 512, cpu());
  REQUIRE(pipeline.forward({{0, 0, tokens}}));
  // More rows than logits are computed at once, and not all of them.
  std::vector<std::int32_t> rows;
  std::vector<kernels::sampling_params> params;
  for (std::size_t i = 0; i + 1 < expected.prompt.size(); i += i == 5 ? 2 : 1) {
    rows.push_back(static_cast<std::int32_t>(i));
    params.emplace_back().target = expected.prompt[i + 1];
  }
  REQUIRE(rows.size() > static_cast<std::size_t>(pipeline.last().max_logit_rows()));
  const auto num_scored = rows.size();
  for (std::size_t i = 0; i < expected.tokens.size(); ++i) {
    rows.push_back(static_cast<std::int32_t>(expected.prompt.size() - 1 + i));
    params.emplace_back().num_logprobs = 5;
  }
  std::vector<kernels::sampled_token> out(rows.size());
  REQUIRE(pipeline.last().sample(rows, params, out));
  for (std::size_t i = 0; i < num_scored; ++i) {
    CHECK(out[i].token == expected.prompt[rows[i] + 1]);
    CHECK(std::abs(out[i].logprob - expected.prompt_logprobs[rows[i]]) < exact().tolerance);
  }
  for (std::size_t i = 0; i < expected.tokens.size(); ++i) {
    const auto& one = out[num_scored + i];
    REQUIRE(one.num_top == 5);
    for (std::int32_t k = 0; k < 5; ++k)
      CHECK(std::abs(one.top_logprobs[k] - expected.top_logprobs[i][k].second) < exact().tolerance);
  }
}

TEST_CASE("a failed exchange aborts the pass, and the same micro-batch can be computed again") {
  const auto tokens = test::load_golden(fp8_model).at(2).all_tokens();
  stage_pipeline undisturbed(fp8_model, {{4}, 0}, 1, 512, cpu());
  const auto expected = undisturbed.score(tokens, 512);
  stage_pipeline pipeline(fp8_model, {{4}, 2}, 1, 512, cpu());
  pipeline.exchange->fail_next(2);
  for (int i = 0; i < 2; ++i) {
    auto failed = pipeline.forward({{0, 0, tokens}});
    REQUIRE_FALSE(failed);
    CHECK(failed.error().code == error_code::peer_lost);
    CHECK_FALSE(pipeline.last().logits(std::vector<std::int32_t>{0}));
  }
  CHECK(same_bits(pipeline.score(tokens, 512), expected));
  // And so can one that succeeded.
  CHECK(same_bits(pipeline.score(tokens, 512), expected));
}

TEST_CASE("micro-batches that cannot be computed are refused") {
  stage_pipeline pipeline(bf16_model, {{2, 4}, 0}, 1, 64, cpu(), 32);
  const auto code = [&](const std::vector<test::slice>& slices) {
    auto result = pipeline.forward(slices);
    REQUIRE_FALSE(result);
    return result.error().code;
  };
  CHECK(code({{0, 0, {5, 1024}}}) == error_code::invalid_request);
  CHECK(code({{0, 0, {-1}}}) == error_code::invalid_request);
  CHECK(code({}) == error_code::internal);
  CHECK(code({{0, 0, std::vector<std::int32_t>(33, 5)}}) == error_code::internal);

  auto& stage = pipeline.stages.front()->leader();
  const std::vector<std::int32_t> token{5}, zero{0}, one{1}, bad_page{4}, position{17};
  const std::vector<std::int32_t> negative{-1};
  stage_input input;
  input.tokens = token;
  const auto refused = [&](kernels::batch_view batch) {
    input.batch = batch;
    auto result = stage.forward(input);
    return !result && result.error().code == error_code::invalid_request;
  };
  CHECK_FALSE(refused({zero, zero, zero, zero}));
  CHECK(refused({zero, one, zero, zero}));
  CHECK(refused({zero, negative, zero, zero}));
  CHECK(refused({position, zero, zero, zero}));
  CHECK(refused({negative, zero, zero, zero}));
  CHECK(refused({zero, zero, bad_page, zero}));
  CHECK(refused({zero, zero, negative, zero}));
  CHECK(refused({zero, zero, zero, one}));
  CHECK(refused({zero, zero, zero, negative}));

  stage_input late;
  late.batch = {zero, zero, zero, zero};
  std::vector<float> hidden(192, 0.5F);
  late.hidden = hidden.data();
  CHECK(pipeline.last().forward(late));
  CHECK_FALSE(pipeline.last().logits(one));
  CHECK(pipeline.last().logits(zero));
  CHECK_FALSE(stage.logits(zero));
  hidden[100] = std::nanf("");
  auto not_finite = pipeline.last().forward(late);
  REQUIRE_FALSE(not_finite);
  CHECK_THAT(not_finite.error().cause, Catch::Contains("layer 2"));
}

TEST_CASE("impossible stages and groups are refused") {
  auto config = load_model_config(bf16_model);
  auto source = checkpoint::open(bf16_model);
  REQUIRE(config);
  REQUIRE(source);
  for (const auto& options :
       {stage_options{0, 5}, stage_options{2, 2}, stage_options{-1, 2}, stage_options{0, 4, 0}}) {
    auto stage = stage_model::load(*source, *config, options, cpu());
    REQUIRE_FALSE(stage);
    CHECK(stage.error().code == error_code::invalid_config);
  }
  for (const auto range : {expert_range{0, 25}, expert_range{3, 3}, expert_range{-1, 3}})
    CHECK_FALSE(expert_group_model::load(*source, *config, range, cpu()));
}

TEST_CASE("an expert group refuses tasks that are not its own") {
  auto config = load_model_config(bf16_model);
  auto source = checkpoint::open(bf16_model);
  REQUIRE(source);
  auto group = expert_group_model::load(*source, *config, {6, 12}, cpu());
  REQUIRE(group);
  const row_buffer x(cpu(), cpu().activation_type(), 2, config->hidden_size);
  const row_buffer out(cpu(), cpu().activation_type(), 2, config->hidden_size);
  const auto runs = [&](std::int32_t layer, std::vector<kernels::expert_task> tasks) {
    return (*group)->run(layer, x.view(2), tasks, out.view(2)).has_value();
  };
  CHECK(runs(1, {{0, 0}, {1, 5}}));
  CHECK(runs(1, {}));
  CHECK_FALSE(runs(0, {{0, 0}}));
  CHECK_FALSE(runs(4, {{0, 0}}));
  CHECK_FALSE(runs(-1, {{0, 0}}));
  CHECK_FALSE(runs(1, {{0, 6}}));
  CHECK_FALSE(runs(1, {{0, -1}}));
  CHECK_FALSE(runs(1, {{2, 0}}));
  CHECK_FALSE(runs(1, {{-1, 0}}));
  CHECK_FALSE(runs(1, {{0, 5}, {1, 0}}));
  CHECK_FALSE(runs(1, {{0, 0}, {0, 1}, {0, 2}}));
}

TEST_CASE("one q_proj instead of two gives what two give where the first changes nothing") {
  auto text = test::tiny_config();
  text.erase("quantization_config");
  text["q_lora_rank"] = text["hidden_size"];
  auto config = parse_model_config(text.dump(), "config.json");
  REQUIRE(config);
  const auto hidden = config->hidden_size;
  auto blobs = test::tiny_blobs(*config);
  // With unit norm weights and q_a the identity, q_a's norm normalises what is normal already.
  for (auto& one : blobs) {
    std::vector<float> values(one.bytes.size() / sizeof(float), 1.0F);
    if (one.name.find("q_a_proj") != std::string::npos)
      for (std::size_t i = 0; i < values.size(); ++i)
        values[i] = i % (hidden + 1) == 0 ? 1.0F : 0.0F;
    else if (one.name.find("input_layernorm") == std::string::npos
             && one.name.find("q_a_layernorm") == std::string::npos)
      continue;
    one.bytes = test::to_bytes(values);
  }
  const auto score = [&] {
    const testing::temporary_directory directory;
    test::write_file(directory.path() / "config.json", text.dump());
    test::write_file(directory.path() / "model.safetensors", test::to_safetensors(blobs));
    stage_pipeline pipeline(directory.path().string(), {{2}, 0}, 1, 64, cpu());
    return pipeline.score({3, 1, 4, 1, 5, 9, 2, 6}, 8);
  };
  const auto with_two = score();
  text["q_lora_rank"] = nullptr;
  for (auto& one : blobs)
    if (const auto at = one.name.find("q_b_proj"); at != std::string::npos)
      one.name.replace(at, 8, "q_proj");
  const auto with_one = score();
  REQUIRE(with_one.size() == with_two.size());
  for (std::size_t i = 0; i < with_one.size(); ++i)
    CHECK(with_one[i] == Approx(with_two[i]).margin(1e-4));
}

TEST_CASE("tied embeddings are the head") {
  auto text = test::tiny_config();
  auto config = parse_model_config(text.dump(), "config.json");
  REQUIRE(config);
  auto blobs = test::tiny_blobs(*config);
  auto& embedding = blobs.front();
  REQUIRE(embedding.name == "model.embed_tokens.weight");
  const auto score = [&](const layout& how) {
    const testing::temporary_directory directory;
    test::write_file(directory.path() / "config.json", text.dump());
    test::write_file(directory.path() / "model.safetensors", test::to_safetensors(blobs));
    stage_pipeline pipeline(directory.path().string(), how, 1, 64, cpu());
    return pipeline.score({3, 1, 4, 1, 5, 9, 2, 6}, 8);
  };
  const auto untied = score({{2}, 0});
  REQUIRE(blobs.back().name == "lm_head.weight");
  blobs.back().bytes = embedding.bytes;
  const auto copied = score({{2}, 0});
  CHECK_FALSE(same_bits(untied, copied));
  blobs.pop_back();
  text["tie_word_embeddings"] = true;
  CHECK(same_bits(score({{2}, 0}), copied));
  CHECK(same_bits(score({{1, 2}, 0}), copied));
}

TEST_CASE("unaligned and damaged weights: the one computes the same, the other names the tensor") {
  auto config = parse_model_config(test::tiny_config().dump(), "config.json");
  REQUIRE(config);
  auto blobs = test::tiny_blobs(*config);
  const testing::temporary_directory directory;
  test::write_file(directory.path() / "config.json", test::tiny_config().dump());
  const auto file = directory.path() / "model.safetensors";
  const auto score = [&](std::size_t padding) {
    test::write_file(file, test::to_safetensors(blobs, padding));
    stage_pipeline pipeline(directory.path().string(), {{1, 2}, 0}, 1, 64, cpu());
    return pipeline.score({3, 1, 4, 1, 5, 9, 2, 6}, 3);
  };
  CHECK(same_bits(score(0), score(3)));

  const float nan = std::nanf("");
  for (auto& one : blobs)
    if (one.name == "model.layers.1.mlp.experts.2.up_proj.weight_scale_inv")
      std::memcpy(one.bytes.data(), &nan, 4);
  test::write_file(file, test::to_safetensors(blobs));
  auto source = checkpoint::open(directory.path());
  REQUIRE(source);
  CHECK(stage_model::load(*source, *config, {0, 1, 8, true}, cpu()));
  CHECK(expert_group_model::load(*source, *config, {0, 2}, cpu()));
  CHECK(stage_model::load(*source, *config, {0, 2, 8, false}, cpu()));
  auto whole = stage_model::load(*source, *config, {0, 2, 8, true}, cpu());
  auto group = expert_group_model::load(*source, *config, {2, 4}, cpu());
  REQUIRE_FALSE(whole);
  REQUIRE_FALSE(group);
  for (const auto* error : {&whole.error(), &group.error()}) {
    CHECK(error->code == error_code::invalid_model);
    CHECK_THAT(error->cause, Catch::Contains("experts.2.up_proj.weight_scale_inv"));
  }
}
