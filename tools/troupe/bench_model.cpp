#include "bench.hpp"

#include "troupe/kernels/ops.hpp"
#include "troupe/model/model_config.hpp"
#include "troupe/model/stage_model.hpp"
#include "troupe/model/tensor_source.hpp"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include <fmt/format.h>

namespace troupe::tools::bench {

namespace {

using std::chrono::steady_clock;

struct options {
  std::string model;
  std::int32_t threads = 0; ///< 0: all cores
  std::int32_t prompt = 512;
  std::int32_t context = 128; ///< tokens before each decoded sequence
  std::int32_t steps = 64;    ///< decoded tokens a round
  std::vector<std::int32_t> batches{1, 8, 16, 32};
  std::uint32_t rounds = 5;
  kernels::numerics numerics = kernels::numerics::exact;
  bool as_json = false;
};

constexpr std::int32_t kPageTokens = 16;

/// A whole model in this process, with as many sequences as the largest batch.
class runner {
public:
  static expected<std::unique_ptr<runner>> load(const options& opts) {
    auto result = std::make_unique<runner>();
    // A file is the config of a made-up model, whichever way it is named.
    std::error_code ignored;
    const std::filesystem::path model =
      std::filesystem::is_regular_file(opts.model, ignored) ? "random:" + opts.model : opts.model;
    auto config = model::load_model_config(model);
    if (!config)
      return tl::unexpected(std::move(config.error()));
    auto weights = model::open_weights(model);
    if (!weights)
      return tl::unexpected(std::move(weights.error()));
    result->ops_ = kernels::make_cpu_ops(opts.threads, nullptr, opts.numerics);
    const auto widest = *std::max_element(opts.batches.begin(), opts.batches.end());
    model::stage_options stage;
    stage.end_layer = config->num_layers;
    stage.max_rows = std::max(opts.prompt, std::max(opts.context, widest));
    stage.checks_finite = false;
    auto loaded = model::stage_model::load(std::move(*weights), *config, stage, *result->ops_);
    if (!loaded)
      return tl::unexpected(std::move(loaded.error()));
    result->model_ = std::move(*loaded);
    const auto longest = std::max(opts.prompt, opts.context + opts.steps);
    if (longest > config->max_positions)
      return fail(error_code::invalid_config,
                  fmt::format("{} positions are asked for, but the model has {}", longest,
                              config->max_positions),
                  "give a shorter prompt, context or fewer steps");
    result->pages_ = (longest + kPageTokens - 1) / kPageTokens;
    const auto num_pages = result->pages_ * widest;
    result->kv_ = result->ops_->allocate(result->model_->kv_bytes(num_pages, kPageTokens));
    if (result->kv_ == nullptr)
      return fail(error_code::internal,
                  fmt::format("there is no memory for {} KV pages", num_pages),
                  "give smaller batches or a shorter context");
    result->model_->attach_kv(result->kv_.get(), num_pages, kPageTokens);
    for (std::int32_t page = 0; page < num_pages; ++page)
      result->tables_.push_back(page);
    for (std::int32_t s = 0; s < widest; ++s)
      result->offsets_.push_back(s * result->pages_);
    return result;
  }

  const char* device() const { return ops_->description(); }

  /// Feeds `count` tokens to one sequence, from position 0 on, and draws one token.
  expected<void> prefill(std::int32_t sequence, std::int32_t count) {
    begin();
    for (std::int32_t i = 0; i < count; ++i)
      add(sequence, i, (7 * i + 13 * sequence + 3) % model_->config().vocab_size);
    rows_.assign(1, count - 1);
    return run();
  }

  /// One token of each of the first `batch` sequences.
  expected<void> decode(std::int32_t batch, std::int32_t position) {
    begin();
    rows_.clear();
    for (std::int32_t s = 0; s < batch; ++s) {
      add(s, position, (11 * s + 17 * position + 5) % model_->config().vocab_size);
      rows_.push_back(s);
    }
    return run();
  }

private:
  void begin() {
    tokens_.clear();
    positions_.clear();
    sequences_.clear();
  }

  void add(std::int32_t sequence, std::int32_t position, std::int32_t token) {
    tokens_.push_back(token);
    positions_.push_back(position);
    sequences_.push_back(sequence);
  }

  expected<void> run() {
    model::stage_input input;
    input.tokens = tokens_;
    input.batch = {positions_, sequences_, tables_, offsets_};
    if (auto hidden = model_->forward(input); !hidden)
      return tl::unexpected(std::move(hidden.error()));
    params_.resize(rows_.size());
    drawn_.resize(rows_.size());
    return model_->sample(rows_, params_, drawn_);
  }

  std::unique_ptr<kernels::ops> ops_; // outlives the model
  std::unique_ptr<model::stage_model> model_;
  std::shared_ptr<void> kv_;
  std::int32_t pages_ = 0; ///< of one sequence
  std::vector<std::int32_t> tables_, offsets_;
  std::vector<std::int32_t> tokens_, positions_, sequences_, rows_;
  std::vector<kernels::sampling_params> params_;
  std::vector<kernels::sampled_token> drawn_;
};

double seconds_since(steady_clock::time_point start) {
  return std::chrono::duration<double>(steady_clock::now() - start).count();
}

expected<report> measure(options opts) {
  if (opts.threads == 0)
    opts.threads = static_cast<std::int32_t>(std::max(1U, std::thread::hardware_concurrency()));
  progress line;
  line.say(fmt::format("loading {}", opts.model));
  const auto start = steady_clock::now();
  auto loaded = runner::load(opts);
  if (!loaded)
    return tl::unexpected(std::move(loaded.error()));
  auto& model = **loaded;
  const auto load_s = seconds_since(start);
  report result;
  table rows({"what", "tok/s"}, 1);
  result.figures = {{"model", opts.model},     {"device", model.device()},
                    {"threads", opts.threads}, {"rounds", opts.rounds},
                    {"load_s", load_s},        {"prompt", opts.prompt},
                    {"context", opts.context}, {"steps", opts.steps}};
  expected<void> failure;
  /// Median of rounds of `tokens` tokens each, after one round that nobody counts.
  const auto rate = [&](const std::string& what, std::int32_t tokens, auto&& once) {
    std::vector<double> rates;
    for (std::uint32_t round = 0; round <= opts.rounds && failure; ++round) {
      line.say(fmt::format("{}: round {} of {}", what, round, opts.rounds));
      const auto begin = steady_clock::now();
      failure = once();
      if (round > 0)
        rates.push_back(tokens / seconds_since(begin));
    }
    return spread_of(std::move(rates));
  };
  const auto prefill = rate("prefill", opts.prompt, [&] { return model.prefill(0, opts.prompt); });
  rows.add({fmt::format("prefill {}", opts.prompt), show(prefill, 1)});
  result.figures["prefill"] = to_json(prefill);
  for (const auto batch : opts.batches) {
    for (std::int32_t s = 0; s < batch && failure; ++s)
      failure = model.prefill(s, opts.context);
    const auto what = fmt::format("decode, batch {}", batch);
    const auto decode = rate(what, batch * opts.steps, [&]() -> expected<void> {
      for (std::int32_t step = 0; step < opts.steps; ++step)
        if (auto ok = model.decode(batch, opts.context + step); !ok)
          return ok;
      return {};
    });
    rows.add({what, show(decode, 1)});
    result.figures["decode"][std::to_string(batch)] = to_json(decode);
  }
  if (!failure)
    return tl::unexpected(std::move(failure.error()));
  result.text = fmt::format(
    "{} on {}, loaded in {:.1f} s; decoding from {} tokens on, {} rounds of {} steps\n\n{}",
    opts.model, model.device(), load_s, opts.context, opts.rounds, opts.steps, rows.text());
  return result;
}

} // namespace

void add_model(CLI::App& bench, command& run) {
  auto opts = std::make_shared<options>();
  auto* sub = bench.add_subcommand("model", "Measure a model in this process, without actors");
  sub
    ->add_option("MODEL", opts->model,
                 "a model directory, or the config.json of a model to make up")
    ->required();
  sub->add_option("--threads", opts->threads, "of the computation; all cores if not given")
    ->check(at_least_one());
  sub
    ->add_option("--numerics", opts->numerics,
                 "exact: activations in float32; fast: rounded before products")
    ->transform(CLI::CheckedTransformer(
                  std::map<std::string, kernels::numerics>{{"exact", kernels::numerics::exact},
                                                           {"fast", kernels::numerics::fast}})
                  .description("exact or fast"));
  sub->add_option("--prompt", opts->prompt, "tokens of the prefill")
    ->capture_default_str()
    ->check(at_least_one());
  sub->add_option("--context", opts->context, "tokens before decoding starts")
    ->capture_default_str()
    ->check(at_least_one());
  sub->add_option("--steps", opts->steps, "steps of decoding a round")
    ->capture_default_str()
    ->check(at_least_one());
  sub->add_option("--batches", opts->batches, "sequences decoded together")
    ->delimiter(',')
    ->capture_default_str()
    ->check(at_least_one());
  sub->add_option("--rounds", opts->rounds, "measured rounds")
    ->capture_default_str()
    ->check(at_least_one());
  add_json_flag(sub, opts->as_json);
  sub->callback([opts, &run] { run = [opts] { return finish(measure(*opts), opts->as_json); }; });
}

} // namespace troupe::tools::bench
