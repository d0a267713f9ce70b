#include "bench.hpp"
#include "commands.hpp"

#include "troupe/actors/cluster_plan.hpp"
#include "troupe/model/convert.hpp"
#include "troupe/model/model_comparison.hpp"
#include "troupe/placement/partition.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <unistd.h>

namespace troupe::tools {

namespace {

using std::chrono::steady_clock;

constexpr double kMega = 1e6;
constexpr std::size_t kWorstShown = 10;
constexpr std::size_t kPieceTokens = 512;

struct options {
  std::filesystem::path source;
  std::filesystem::path target;
  int bits = 8;
  std::int32_t group_size = -1; ///< -1: 128 for 4 bits, rows for 8
  std::uint32_t stages = 1;
  std::int32_t expert_groups = 0;
  std::uint64_t shard_mb = 4096;
  int threads = 0; ///< 0: all cores
  bool compares = false;
  std::filesystem::path text;
  std::size_t max_tokens = 8192;
  bool as_json = false;
};

double seconds_since(steady_clock::time_point start) {
  return std::chrono::duration<double>(steady_clock::now() - start).count();
}

/// How far the conversion is: a bar on a terminal, else a line for each shard.
class progress_bar {
public:
  progress_bar() : terminal_(::isatty(STDERR_FILENO) == 1) {}

  ~progress_bar() { clear(); }
  progress_bar(const progress_bar&) = delete;
  progress_bar& operator=(const progress_bar&) = delete;

  void show(const model::conversion_progress& now) {
    if (terminal_)
      draw(now);
    else if (now.is_shard_done)
      fmt::print(stderr, "{} is written, {} of {}, {:.0f} of {:.0f} MB\n", now.file, now.shard + 1,
                 now.num_shards, static_cast<double>(now.bytes_done) / kMega,
                 static_cast<double>(now.bytes_total) / kMega);
  }

  /// What goes on when nothing can be counted.
  void say(const std::string& what) {
    if (terminal_)
      fmt::print(stderr, "\r\033[K{}", what);
  }

  void clear() {
    if (terminal_)
      fmt::print(stderr, "\r\033[K");
  }

private:
  void draw(const model::conversion_progress& now) {
    const auto time = steady_clock::now();
    if (time - drawn_ < std::chrono::milliseconds(100) && now.bytes_done < now.bytes_total)
      return;
    drawn_ = time;
    if (now.is_checking) {
      say(fmt::format("checking {}, which an earlier run wrote", now.file));
      return;
    }
    if (begin_ == steady_clock::time_point{}) {
      begin_ = time;
      bytes_before_ = now.bytes_done;
    }
    constexpr std::size_t width = 30;
    const double share = now.bytes_total == 0 ? 1.0
                                              : static_cast<double>(now.bytes_done)
                                                  / static_cast<double>(now.bytes_total);
    const auto filled = static_cast<std::size_t>(share * width);
    const double elapsed = std::chrono::duration<double>(time - begin_).count();
    const auto done = static_cast<double>(now.bytes_done - bytes_before_);
    const double rate = elapsed > 0 ? done / elapsed : 0.0;
    const double left =
      rate > 0 ? static_cast<double>(now.bytes_total - now.bytes_done) / rate : 0.0;
    say(fmt::format(
      "[{}{}] {:3.0f} % of {:.0f} MB, {:.0f} MB/s, {:.0f}:{:02.0f} left, shard {} of {}",
      std::string(filled, '#'), std::string(width - filled, '.'), 100 * share,
      static_cast<double>(now.bytes_total) / kMega, rate / kMega, std::floor(left / 60),
      std::floor(std::fmod(left, 60)), now.shard + 1, now.num_shards));
  }

  bool terminal_;
  steady_clock::time_point drawn_{};
  steady_clock::time_point begin_{};
  std::uint64_t bytes_before_ = 0; ///< of an earlier run
};

/// Cuts layers as `placement::place` does for so many stages, so that a stage finds its weights in
/// shards of its own.
expected<std::vector<std::int32_t>> cut_stages(const model::model_config& config,
                                               const options& opts) {
  const auto shape = actors::shape_of(config);
  if (opts.stages > shape.num_layers)
    return fail(
      error_code::invalid_config,
      fmt::format("{} layers cannot be cut into {} stages", shape.num_layers, opts.stages),
      fmt::format("give from 1 to {} stages", shape.num_layers));
  const auto moe = shape.moe_layer_cost + (opts.expert_groups == 0 ? shape.routed_experts_cost : 0);
  std::vector<std::uint64_t> costs;
  for (std::uint32_t layer = 0; layer < shape.num_layers; ++layer)
    costs.push_back(std::max<std::uint64_t>(1, shape.is_moe(layer) ? moe : shape.dense_layer_cost));
  const auto bounds = placement::partition(costs, opts.stages, shape.head_cost);
  return std::vector<std::int32_t>(bounds.begin() + 1, bounds.end());
}

struct outcome {
  model::conversion_result conversion;
  double seconds = 0.0;
  std::vector<model::tensor_loss> losses; ///< the worst first
  std::map<std::string, model::rounding_loss> by_kind;
  model::rounding_loss all;
  std::optional<model::model_comparison> accuracy;
};

expected<model::model_comparison> compare(const options& opts, progress_bar& bar) {
  const auto golden = opts.source / "golden.json";
  std::error_code ignored;
  expected<std::vector<model::comparison_text>> texts;
  if (!opts.text.empty())
    texts = model::read_comparison_text(opts.text, opts.source, kPieceTokens, opts.max_tokens);
  else if (std::filesystem::exists(golden, ignored))
    texts = model::read_conversations(golden);
  else
    return fail(error_code::invalid_config,
                fmt::format("{} has no golden.json to compare the models on", opts.source.string()),
                "give a text with --check-text FILE");
  if (!texts)
    return tl::unexpected(std::move(texts.error()));
  // One model after the other, so that only one of them is in memory.
  bar.say("computing the source");
  const auto source = model::expect_tokens(opts.source, *texts, opts.threads);
  if (!source)
    return tl::unexpected(source.error());
  bar.say("computing the converted model");
  const auto converted = model::expect_tokens(opts.target, *texts, opts.threads);
  if (!converted)
    return tl::unexpected(converted.error());
  return model::compare(*texts, *source, *converted);
}

expected<outcome> carry_out(options opts, progress_bar& bar) {
  if (opts.threads == 0)
    opts.threads = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
  if (opts.group_size < 0)
    opts.group_size = opts.bits == 4 ? 128 : 0;
  auto config = model::load_model_config(opts.source);
  if (!config)
    return tl::unexpected(std::move(config.error()));
  auto stage_ends = cut_stages(*config, opts);
  if (!stage_ends)
    return tl::unexpected(std::move(stage_ends.error()));
  model::conversion_options what;
  what.source = opts.source;
  what.target = opts.target;
  what.format = {opts.bits, opts.group_size};
  what.layout = {std::move(*stage_ends), opts.expert_groups, opts.shard_mb * 1'000'000};
  what.num_threads = opts.threads;
  const auto begin = steady_clock::now();
  auto done = model::convert(what, [&](const auto& now) { bar.show(now); });
  if (!done)
    return tl::unexpected(std::move(done.error()));
  outcome result;
  result.seconds = seconds_since(begin);
  result.conversion = std::move(*done);
  for (const auto& shard : result.conversion.manifest.shards)
    for (const auto& one : shard.losses) {
      result.losses.push_back(one);
      result.by_kind[model::kind_of(one.tensor)].add(one.loss);
      result.all.add(one.loss);
    }
  std::stable_sort(result.losses.begin(), result.losses.end(), [](const auto& a, const auto& b) {
    return a.loss.relative_rms() > b.loss.relative_rms();
  });
  if (opts.compares) {
    auto accuracy = compare(opts, bar);
    if (!accuracy)
      return tl::unexpected(std::move(accuracy.error()));
    result.accuracy = *accuracy;
  }
  bar.clear();
  return result;
}

std::string percent(double share) {
  return fmt::format("{:.3f} %", 100 * share);
}

std::string describe(const model::model_comparison& a) {
  auto text = fmt::format(
    "\n{} tokens: mean KL {:.2e} nats (worst {:.2e}), same top token {:.2f} %, log-probability of "
    "the text's token off by {:.2e},\nperplexity {:.5f} -> {:.5f}\n",
    a.num_tokens, a.mean_kl, a.worst_kl, 100 * a.top1_agreement, a.mean_deviation,
    a.source_perplexity, a.perplexity);
  if (a.num_answers > 0)
    text += fmt::format("golden answers: {} of {} the same, {} of {} tokens\n", a.num_same_answers,
                        a.num_answers, a.num_same_answer_tokens, a.num_answer_tokens);
  return text;
}

std::string describe(const options& opts, const outcome& result) {
  const auto& done = result.conversion;
  bench::table kinds({"kind", "elements", "relative RMS error", "worst element"}, 1);
  std::vector<std::pair<std::string, model::rounding_loss>> ordered(result.by_kind.begin(),
                                                                    result.by_kind.end());
  std::stable_sort(ordered.begin(), ordered.end(), [](const auto& a, const auto& b) {
    return a.second.relative_rms() > b.second.relative_rms();
  });
  const auto row = [](const std::string& name, const model::rounding_loss& loss) {
    return std::vector<std::string>{name, fmt::format("{}", loss.num_elements),
                                    percent(loss.relative_rms()),
                                    fmt::format("{:.2e}", loss.worst)};
  };
  for (const auto& [kind, loss] : ordered)
    kinds.add(row(kind, loss));
  kinds.add(row("all", result.all));
  bench::table worst({"tensor", "relative RMS error", "worst element", "at"}, 1);
  for (std::size_t i = 0; i < std::min(kWorstShown, result.losses.size()); ++i) {
    const auto& [tensor, loss] = result.losses[i];
    worst.add({tensor, percent(loss.relative_rms()), fmt::format("{:.2e}", loss.worst),
               fmt::format("[{}, {}]", loss.worst_row, loss.worst_col)});
  }
  std::uint64_t written = 0;
  for (const auto& shard : done.manifest.shards)
    written += shard.seal.num_bytes;
  auto text =
    fmt::format("{} -> {}: {}\n{:.1f} MB -> {:.1f} MB in {} shards, {:.1f} s", opts.source.string(),
                opts.target.string(), model::describe(done.plan.format),
                static_cast<double>(done.plan.source_bytes) / kMega,
                static_cast<double>(written) / kMega, done.plan.shards.size(), result.seconds);
  if (done.num_reused > 0)
    text += fmt::format("; {} shards of an earlier run stayed as they were", done.num_reused);
  text += "\n";
  for (const auto& file : done.done_again)
    text += fmt::format("{} was missing or damaged and is written again\n", file);
  text += fmt::format("\n{}\nThe worst tensors:\n\n{}", kinds.text(), worst.text());
  for (const auto& one : done.plan.misfits)
    text += fmt::format("not quantized: {}\n", one);
  if (result.accuracy)
    text += describe(*result.accuracy);
  return text;
}

nlohmann::json to_json(const model::rounding_loss& loss) {
  return {{"relative_rms", loss.relative_rms()},
          {"worst", loss.worst},
          {"worst_at", {loss.worst_row, loss.worst_col}},
          {"elements", loss.num_elements}};
}

nlohmann::json to_json(const options& opts, const outcome& result) {
  const auto& done = result.conversion;
  nlohmann::json json = {
    {"source", opts.source.string()},
    {"target", opts.target.string()},
    {"format", {{"bits", done.plan.format.bits}, {"group_size", done.plan.format.group_size}}},
    {"source_bytes", done.plan.source_bytes},
    {"bytes", done.plan.num_bytes},
    {"seconds", result.seconds},
    {"shards", done.plan.shards.size()},
    {"shards_reused", done.num_reused},
    {"shards_done_again", done.done_again},
    {"not_quantized", done.plan.misfits},
    {"loss", to_json(result.all)}};
  for (const auto& [kind, loss] : result.by_kind)
    json["loss_by_kind"][kind] = to_json(loss);
  for (const auto& one : result.losses) {
    auto entry = to_json(one.loss);
    entry["tensor"] = one.tensor;
    json["loss_by_tensor"].push_back(std::move(entry));
  }
  if (const auto& a = result.accuracy)
    json["accuracy"] = {{"tokens", a->num_tokens},
                        {"mean_kl", a->mean_kl},
                        {"worst_kl", a->worst_kl},
                        {"top1_agreement", a->top1_agreement},
                        {"mean_logprob_deviation", a->mean_deviation},
                        {"source_perplexity", a->source_perplexity},
                        {"perplexity", a->perplexity},
                        {"answers", a->num_answers},
                        {"same_answers", a->num_same_answers},
                        {"answer_tokens", a->num_answer_tokens},
                        {"same_answer_tokens", a->num_same_answer_tokens}};
  return json;
}

int convert(const options& opts) {
  progress_bar bar;
  const auto result = carry_out(opts, bar);
  bar.clear();
  if (!result)
    return complain(result.error());
  fmt::print("{}", opts.as_json ? to_json(opts, *result).dump() + "\n" : describe(opts, *result));
  std::fflush(stdout);
  return EXIT_SUCCESS;
}

} // namespace

void add_convert(CLI::App& app, command& run) {
  auto opts = std::make_shared<options>();
  auto* sub = app.add_subcommand("convert", "Quantize a checkpoint to INT8 or INT4");
  sub->footer("Killed or out of space, it goes on where it stopped when it is given again.\n"
              "int8 writes compressed-tensors (int-quantized), int4 writes AWQ with zero points.");
  sub->add_option("SOURCE", opts->source, "a model directory in BF16, FP16, FP32 or FP8")
    ->required();
  sub->add_option("TARGET", opts->target, "a new directory, or one to go on with")->required();
  sub->add_option("--format", opts->bits, "int8 or int4")
    ->required()
    ->transform(CLI::CheckedTransformer(std::map<std::string, int>{{"int8", 8}, {"int4", 4}}));
  sub
    ->add_option("--group-size", opts->group_size,
                 "columns that share a scale, 0: a row; if not given, 128 for int4, 0 for int8")
    ->check(CLI::IsMember({0, 32, 64, 128}));
  sub->add_option("--stages", opts->stages, "pipeline stages to cut the shards by")
    ->capture_default_str()
    ->check(CLI::Range(1U, 4096U));
  sub->add_option("--expert-groups", opts->expert_groups, "expert groups with shards of their own")
    ->capture_default_str()
    ->check(CLI::Range(0, 65536));
  sub->add_option("--shard-mb", opts->shard_mb, "largest shard; what is lost when it is killed")
    ->capture_default_str()
    ->check(CLI::Range(std::uint64_t{1}, std::uint64_t{1} << 20));
  sub->add_option("--threads", opts->threads, "all cores if not given")->check(CLI::Range(1, 1024));
  sub->add_flag("--check", opts->compares,
                "compute source and result, and compare them on the source's golden.json");
  sub->add_option("--check-text", opts->text, "the same on a text file")
    ->each([opts](const std::string&) { opts->compares = true; });
  sub->add_option("--check-tokens", opts->max_tokens, "of the text, at most")
    ->capture_default_str()
    ->check(CLI::Range(2, 1 << 24));
  sub->add_flag("--json", opts->as_json, "for programs");
  sub->callback([opts, &run] { run = [opts] { return convert(*opts); }; });
}

} // namespace troupe::tools
