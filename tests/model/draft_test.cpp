#include "troupe/model/draft_plan.hpp"

#include "stage_pipeline.hpp"

#include <algorithm>
#include <cmath>
#include <map>

#include <catch2/catch.hpp>

using namespace troupe;
using namespace troupe::model;
using test::layout;
using test::stage_pipeline;

namespace {

const std::string mini_model = TROUPE_SOURCE_DIR "/configs/models/troupe-mini";

kernels::ops& cpu() {
  static const auto ops = kernels::make_cpu_ops(2);
  return *ops;
}

std::vector<std::int32_t> copy(std::span<const std::int32_t> what) {
  return {what.begin(), what.end()};
}

/// What one sequence is to draw, and what has come of it.
struct generation {
  std::vector<std::int32_t> log;
  std::size_t limit = 0;
  std::int32_t end_token = -1;
  kernels::sampling_params draw;
  std::vector<std::int32_t> drafts;
  std::size_t num_computed = 0;
  bool done = false;
};

struct statistics {
  std::size_t num_steps = 0, num_drafted = 0, num_accepted = 0;
};

/// Generates all sequences together, each with its drafts, as a scheduler would.
statistics generate(stage_pipeline& model, std::vector<generation>& all, std::int32_t max_drafts,
                    std::size_t chunk) {
  statistics result;
  draft_plan plan;
  while (true) {
    std::vector<test::slice> slices;
    std::vector<draft_plan::slice> drafted;
    std::vector<std::int32_t> output_rows;
    std::vector<kernels::sampling_params> params;
    std::vector<generation*> members;
    std::int32_t first_row = 0;
    for (std::size_t s = 0; s < all.size(); ++s) {
      auto& g = all[s];
      if (g.done)
        continue;
      const auto end = std::min(g.log.size(), g.num_computed + chunk);
      test::slice one{static_cast<std::int32_t>(s),
                      static_cast<std::int32_t>(g.num_computed),
                      {g.log.begin() + static_cast<std::ptrdiff_t>(g.num_computed),
                       g.log.begin() + static_cast<std::ptrdiff_t>(end)}};
      draft_plan::slice part;
      part.next_token = end < g.log.size() ? g.log[end] : -1;
      if (end == g.log.size()) {
        one.tokens.insert(one.tokens.end(), g.drafts.begin(), g.drafts.end());
        part.num_drafts = static_cast<std::int32_t>(g.drafts.size());
        part.num_wanted = max_drafts;
        for (std::size_t i = 0; i <= g.drafts.size(); ++i) {
          output_rows.push_back(first_row
                                + static_cast<std::int32_t>(end - 1 - g.num_computed + i));
          params.push_back(g.draw);
          params.back().position = static_cast<std::uint32_t>(end + i);
        }
      }
      part.num_rows = static_cast<std::int32_t>(one.tokens.size());
      first_row += part.num_rows;
      g.num_computed = end;
      slices.push_back(std::move(one));
      drafted.push_back(part);
      members.push_back(&g);
    }
    if (slices.empty())
      return result;
    ++result.num_steps;
    REQUIRE(model.forward(slices));
    std::vector<kernels::sampled_token> drawn(output_rows.size());
    REQUIRE(model.last().sample(output_rows, params, drawn));
    std::vector<std::int32_t> tokens;
    for (const auto& one : drawn)
      tokens.push_back(one.token);
    std::vector<std::int32_t> drafts;
    if (max_drafts > 0) {
      REQUIRE(plan.build(drafted, model.tokens(), output_rows, tokens));
      std::vector<draft_chain> chains;
      for (const auto& chain : plan.chains()) {
        chains.push_back({chain.row, chain.num_drafts, params[chain.output]});
        ++chains.back().draw.position;
      }
      REQUIRE(model.draft(plan.rows(), plan.next_tokens(), chains, drafts));
    }
    std::size_t output = 0, chain = 0;
    for (std::size_t i = 0; i < members.size(); ++i) {
      auto& g = *members[i];
      if (drafted[i].next_token >= 0)
        continue;
      const auto before = g.drafts;
      result.num_drafted += before.size();
      for (std::size_t d = 0; d <= before.size(); ++d) {
        g.log.push_back(tokens[output + d]);
        g.done = g.log.size() == g.limit || g.log.back() == g.end_token;
        if (g.done || d == before.size() || before[d] != tokens[output + d])
          break;
        ++g.num_computed;
        ++result.num_accepted;
      }
      output += before.size() + 1;
      g.drafts.clear();
      if (max_drafts == 0)
        continue;
      for (std::int32_t d = 0; d < max_drafts && drafts[chain * max_drafts + d] >= 0; ++d)
        g.drafts.push_back(drafts[chain * max_drafts + d]);
      ++chain;
    }
  }
}

std::vector<generation> greedy_requests(const std::vector<test::golden>& golden,
                                        std::size_t count) {
  std::vector<generation> all(count);
  for (std::size_t i = 0; i < count; ++i) {
    all[i].log = golden[i].prompt;
    all[i].limit = golden[i].prompt.size() + golden[i].tokens.size();
  }
  return all;
}

} // namespace

TEST_CASE("a plan of drafts keeps what was drawn and drops what lies behind a wrong draft") {
  draft_plan plan;
  // A prompt's first chunk; a decode with two drafts of which one is right; one with none right;
  // one with all right; a prompt's last chunk.
  const std::vector<draft_plan::slice> slices = {
    {3, 0, 13, 2}, {3, 2, -1, 2}, {2, 1, -1, 0}, {2, 1, -1, 1}, {2, 0, -1, 3}};
  const std::vector<std::int32_t> tokens = {10, 11, 12, 20, 21, 22, 30, 31, 40, 41, 50, 51};
  const std::vector<std::int32_t> output_rows = {0, 3, 4, 5, 6, 7, 8, 9, 11};
  const std::vector<std::int32_t> drawn = {11, 21, 29, 28, 38, 37, 41, 46, 52};
  REQUIRE(plan.build(slices, tokens, output_rows, drawn));
  CHECK(copy(plan.rows()) == std::vector{0, 1, 2, 3, 4, 6, 8, 9, 10, 11});
  CHECK(copy(plan.next_tokens()) == std::vector{11, 12, 13, 21, 29, 38, 41, 46, 51, 52});
  REQUIRE(plan.chains().size() == 3);
  CHECK(plan.chains()[0].slice == 1);
  CHECK(plan.chains()[0].row == 4);
  CHECK(plan.chains()[0].output == 2);
  CHECK(plan.chains()[0].num_drafts == 2);
  CHECK(plan.chains()[1].slice == 3);
  CHECK(plan.chains()[1].row == 7);
  CHECK(plan.chains()[1].output == 7);
  CHECK(plan.chains()[2].slice == 4);
  CHECK(plan.chains()[2].row == 9);
  CHECK(plan.chains()[2].output == 8);

  const auto refused = [&](std::vector<draft_plan::slice> bad, std::vector<std::int32_t> rows) {
    std::vector<std::int32_t> drew(rows.size(), 1);
    return !plan.build(bad, std::vector<std::int32_t>{1, 2, 3}, rows, drew);
  };
  CHECK(refused({{4, 0, -1, 1}}, {3}));
  CHECK(refused({{0, 0, -1, 1}}, {}));
  CHECK(refused({{3, 3, -1, 1}}, {0, 1, 2}));
  CHECK(refused({{3, 1, 5, 1}}, {1, 2}));
  CHECK(refused({{3, 1, -1, 1}}, {2}));
  CHECK(refused({{3, 0, -1, 1}}, {}));
  CHECK_FALSE(plan.build(slices, tokens, output_rows, std::vector<std::int32_t>{1}));
}

TEST_CASE("with drafts the demo model gives its golden tokens in fewer steps") {
  const auto golden = test::load_golden(mini_model);
  const std::size_t count = 12;
  std::size_t steps_without = 0;
  {
    stage_pipeline model(mini_model, {{6}, 0}, count, 512, cpu());
    auto all = greedy_requests(golden, count);
    steps_without = generate(model, all, 0, 512).num_steps;
    for (std::size_t i = 0; i < count; ++i)
      CHECK(all[i].log == golden[i].all_tokens());
  }
  const std::vector<std::pair<layout, std::size_t>> ways = {
    {{{6}, 0}, 512}, {{{3, 6}, 2}, 7}, {{{2, 4, 6}, 0}, 33}};
  for (std::int32_t max_drafts = 1; max_drafts <= 3; ++max_drafts) {
    const auto& [how, chunk] = ways[static_cast<std::size_t>(max_drafts) - 1];
    INFO(max_drafts << " drafts, chunks of " << chunk);
    stage_pipeline model(mini_model, how, count, 512, cpu(), 512, max_drafts);
    auto all = greedy_requests(golden, count);
    const auto seen = generate(model, all, max_drafts, chunk);
    for (std::size_t i = 0; i < count; ++i)
      CHECK(all[i].log == golden[i].all_tokens());
    const auto rate =
      static_cast<double>(seen.num_accepted) / static_cast<double>(seen.num_drafted);
    INFO(seen.num_steps << " steps instead of " << steps_without << ", accepted " << rate);
    CHECK(rate > std::vector{0.95, 0.7, 0.55}[static_cast<std::size_t>(max_drafts) - 1]);
    if (chunk == 512)
      CHECK(seen.num_steps * 10 < steps_without * 7);
  }
}

TEST_CASE("sampling with drafts draws the same tokens") {
  const auto golden = test::load_golden(mini_model);
  const std::size_t count = 16;
  const auto requests = [&] {
    std::vector<generation> all(count);
    for (std::size_t i = 0; i < count; ++i) {
      all[i].log = golden[i].prompt;
      all[i].limit = golden[i].prompt.size() + 60;
      all[i].draw.temperature = 1.5F;
      all[i].draw.seed = 100 + i;
      all[i].draw.top_p = i % 2 == 0 ? 1.0F : 0.9F;
    }
    return all;
  };
  stage_pipeline plain(mini_model, {{6}, 0}, count, 512, cpu());
  auto expected = requests();
  generate(plain, expected, 0, 512);
  for (std::int32_t max_drafts = 1; max_drafts <= 3; ++max_drafts) {
    stage_pipeline model(mini_model, {{6}, 0}, count, 512, cpu(), 512, max_drafts);
    auto all = requests();
    const auto seen = generate(model, all, max_drafts, 512);
    for (std::size_t i = 0; i < count; ++i)
      CHECK(all[i].log == expected[i].log);
    INFO(seen.num_accepted << " of " << seen.num_drafted << " drafts accepted");
    CHECK(seen.num_accepted * 2 > seen.num_drafted);
  }
}

TEST_CASE("what is drawn behind accepted drafts has the model's distribution") {
  // Two tokens behind one prompt with drafts, for many seeds: how often each second token comes is
  // compared with its probability given the first, by Pearson's chi-squared test.
  const auto golden = test::load_golden(mini_model);
  auto prompt = golden[0].prompt;
  constexpr std::size_t batch = 32, rounds = 40;
  constexpr float temperature = 3.0F;
  std::map<std::int32_t, std::map<std::int32_t, std::size_t>> counts;
  std::size_t num_accepted = 0;
  stage_pipeline model(mini_model, {{6}, 0}, batch, 256, cpu(), 2048, 1);
  for (std::size_t round = 0; round < rounds; ++round) {
    std::vector<generation> all(batch);
    for (std::size_t i = 0; i < batch; ++i) {
      all[i].log = prompt;
      all[i].limit = prompt.size() + 3;
      all[i].draw.temperature = temperature;
      all[i].draw.top_k = 4;
      all[i].draw.seed = 1 + round * batch + i;
    }
    num_accepted += generate(model, all, 1, 512).num_accepted;
    for (const auto& one : all)
      ++counts[one.log[prompt.size()]][one.log[prompt.size() + 1]];
  }
  CHECK(num_accepted > 100);
  double statistic = 0.0;
  int freedom = 0;
  for (const auto& [first, seconds] : counts) {
    std::size_t total = 0;
    for (const auto& [token, n] : seconds)
      total += n;
    if (total < 100)
      continue;
    auto log = prompt;
    log.push_back(first);
    const auto logits = model.score(log, 512);
    const auto vocab = static_cast<std::size_t>(model.vocab_size());
    std::vector<std::pair<double, std::int32_t>> best;
    for (std::size_t t = 0; t < vocab; ++t)
      best.emplace_back(logits[(log.size() - 1) * vocab + t], static_cast<std::int32_t>(t));
    std::partial_sort(best.begin(), best.begin() + 4, best.end(), std::greater<>());
    double sum = 0.0;
    for (int i = 0; i < 4; ++i)
      sum += std::exp((best[i].first - best[0].first) / temperature);
    for (int i = 0; i < 4; ++i) {
      const double expected =
        static_cast<double>(total) * std::exp((best[i].first - best[0].first) / temperature) / sum;
      const auto found = seconds.find(best[i].second);
      const auto seen = found != seconds.end() ? static_cast<double>(found->second) : 0.0;
      statistic += (seen - expected) * (seen - expected) / expected;
    }
    freedom += 3;
  }
  REQUIRE(freedom >= 3);
  // Mean and deviation of the distribution are n and sqrt(2n); the seeds are fixed.
  INFO("chi-squared " << statistic << " with " << freedom << " degrees of freedom");
  CHECK(statistic < freedom + 4.0 * std::sqrt(2.0 * freedom));
}

TEST_CASE("drafts are refused where there is no MTP layer, and bad rows are too") {
  auto config = load_model_config(mini_model);
  auto source = open_weights(mini_model);
  REQUIRE((config && source));
  stage_options options{0, 3, 16};
  options.max_drafts = 1;
  CHECK_FALSE(stage_model::load(*source, *config, options, cpu()));
  auto without = *config;
  without.num_mtp_layers = 0;
  options.end_layer = 6;
  auto refused = stage_model::load(*source, without, options, cpu());
  REQUIRE_FALSE(refused);
  CHECK(refused.error().cause.find("no MTP layer") != std::string::npos);

  stage_pipeline model(mini_model, {{6}, 0}, 1, 64, cpu(), 64, 2);
  REQUIRE(model.forward({{0, 0, {1017, 5, 6}}}));
  std::vector<std::int32_t> out;
  const std::vector<std::int32_t> rows = {0, 1, 2}, next = {5, 6, 7};
  const auto drafts = [&](std::vector<std::int32_t> tokens, draft_chain chain) {
    return model.draft(rows, tokens, std::vector{chain}, out).has_value();
  };
  CHECK(drafts(next, {2, 2, {}}));
  CHECK(out[0] >= 0);
  CHECK(out[1] >= 0);
  CHECK(drafts(next, {2, 1, {}}));
  CHECK(out[1] == -1);
  CHECK_FALSE(drafts(next, {3, 1, {}}));
  CHECK_FALSE(drafts(next, {2, 3, {}}));
  CHECK_FALSE(drafts({5, 6, 100000}, {2, 1, {}}));
  CHECK_FALSE(drafts({5, 6}, {2, 1, {}}));
  // The block table ends at position 15: nothing can be drafted beyond the token behind it.
  std::vector<std::int32_t> log(16, 5);
  REQUIRE(model.forward({{0, 0, log}}));
  std::vector<std::int32_t> all(16);
  for (std::int32_t i = 0; i < 16; ++i)
    all[i] = i;
  REQUIRE(model.draft(all, log, std::vector<draft_chain>{{15, 2, {}}}, out));
  CHECK(out[0] >= 0);
  CHECK(out[1] == -1);
}
