#include "bench.hpp"
#include "bench_stream.hpp"

#include <algorithm>
#include <memory>
#include <optional>
#include <thread>

#include <fmt/format.h>

namespace troupe::tools::bench {

namespace {

using nlohmann::json;

struct serve_arguments {
  std::vector<std::string> clusters, endpoints;
  std::vector<unsigned> streams{1, 8, 32};
  unsigned rounds = 5;
  unsigned max_tokens = 128;
  unsigned prompt_tokens = 64;
  unsigned requests = 16;
  bool as_json = false;
};

struct target {
  std::string name;
  std::string endpoint;
  prompt_maker prompts;
};

/// The figures of a round, in the order of the columns.
enum figure : std::size_t {
  ttft_p50,
  ttft_p99,
  gap_p50,
  gap_p99,
  gap_max,
  throughput,
  num_figures
};

struct figure_text {
  const char* key;
  const char* head;
  int decimals;
};

constexpr figure_text figures[num_figures] = {
  {"ttft_p50_ms", "TTFT p50, ms", 1},     {"ttft_p99_ms", "TTFT p99, ms", 1},
  {"gap_p50_ms", "token gap p50, ms", 2}, {"gap_p99_ms", "token gap p99, ms", 2},
  {"gap_max_ms", "token gap max, ms", 1}, {"tokens_per_s", "tokens/s", 0},
};

using round_figures = std::vector<double>; ///< one a figure

/// Every stream asks for the next answer when the last one has ended.
expected<round_figures> run_round(const target& to, unsigned num_streams, unsigned per_stream,
                                  const serve_arguments& given) {
  std::vector<std::vector<expected<raw_stream>>> raw(num_streams);
  std::vector<std::thread> clients;
  auto begin = steady::now();
  for (unsigned s = 0; s < num_streams; ++s)
    clients.emplace_back([&, s] {
      for (unsigned r = 0; r < per_stream; ++r) {
        auto prompt = to.prompts.prompt(given.prompt_tokens, std::size_t{s} * per_stream + r);
        raw[s].push_back(stream({to.endpoint, std::move(prompt), given.max_tokens}));
        if (!raw[s].back())
          return;
      }
    });
  for (auto& client : clients)
    client.join();
  auto seconds = milliseconds(steady::now() - begin) / 1000;

  std::vector<double> first_tokens, gaps;
  double num_tokens = 0;
  for (const auto& of_stream : raw)
    for (const auto& answer : of_stream) {
      if (!answer)
        return tl::unexpected(answer.error());
      auto record = read(*answer, given.max_tokens);
      if (!record)
        return tl::unexpected(record.error());
      const auto& times = record->times;
      first_tokens.push_back(milliseconds(times.front() - record->sent));
      for (std::size_t i = 1; i < times.size(); ++i)
        gaps.push_back(milliseconds(times[i] - times[i - 1]));
      num_tokens += static_cast<double>(times.size());
    }
  return round_figures{percentile(first_tokens, 0.5), percentile(first_tokens, 0.99),
                       percentile(gaps, 0.5),         percentile(gaps, 0.99),
                       percentile(gaps, 1.0),         num_tokens / seconds};
}

/// One figure of every round.
std::vector<double> column(const std::vector<round_figures>& rounds, std::size_t f) {
  std::vector<double> result;
  for (const auto& round : rounds)
    result.push_back(round[f]);
  return result;
}

/// The same divided by that of `base`'s same round. Nothing if one of those is 0: tokens that
/// arrive together have no time between them.
std::optional<std::vector<double>> ratios(const std::vector<round_figures>& rounds,
                                          const std::vector<round_figures>& base, std::size_t f) {
  auto result = column(rounds, f);
  for (std::size_t r = 0; r < result.size(); ++r) {
    if (base[r][f] <= 0)
      return std::nullopt;
    result[r] /= base[r][f];
  }
  return result;
}

/// All figures, for people and for programs.
struct rows {
  table shown;
  json figures_json = json::array();

  void add(unsigned streams, const std::string& name, const std::vector<round_figures>& rounds) {
    std::vector<std::string> cells{std::to_string(streams), name};
    json entry{{"streams", streams}, {"cluster", name}};
    for (std::size_t f = 0; f < num_figures; ++f) {
      auto s = spread_of(column(rounds, f));
      cells.push_back(show(s, figures[f].decimals));
      entry["figures"][figures[f].key] = to_json(s);
    }
    shown.add(std::move(cells));
    figures_json.push_back(std::move(entry));
  }

  void add_ratio(unsigned streams, const std::string& name,
                 const std::vector<round_figures>& rounds, const std::vector<round_figures>& base) {
    std::vector<std::string> cells{std::to_string(streams), name};
    json entry{{"streams", streams}, {"ratio", name}};
    for (std::size_t f = 0; f < num_figures; ++f) {
      auto values = ratios(rounds, base, f);
      cells.push_back(values ? show(spread_of(*values), 2) : "-");
      entry["figures"][figures[f].key] = values ? to_json(spread_of(*values)) : json(nullptr);
    }
    shown.add(std::move(cells));
    figures_json.push_back(std::move(entry));
  }
};

expected<std::vector<target>> find_targets(const serve_arguments& given) {
  std::vector<std::pair<std::string, std::string>> asked; // cluster, endpoint
  for (const auto& cluster : given.clusters)
    asked.emplace_back(cluster, "");
  for (const auto& endpoint : given.endpoints)
    asked.emplace_back("", endpoint);
  if (asked.empty())
    asked.emplace_back();
  std::vector<target> result;
  for (const auto& [cluster, endpoint] : asked) {
    auto found = resolve_endpoint(cluster, endpoint);
    if (!found)
      return tl::unexpected(found.error());
    auto prompts = prompt_maker::make(*found);
    if (!prompts)
      return tl::unexpected(prompts.error());
    result.push_back({cluster.empty() ? *found : cluster, *found, std::move(*prompts)});
  }
  return result;
}

expected<report> measure(const serve_arguments& given) {
  auto targets = find_targets(given);
  if (!targets)
    return tl::unexpected(targets.error());
  progress shown;
  // What a cluster does for the first time (pages of memory, connections) is not measured.
  auto most = *std::max_element(given.streams.begin(), given.streams.end());
  for (const auto& to : *targets) {
    shown.say(fmt::format("serve: warming {} up", to.name));
    if (auto warm = run_round(to, most, 1, given); !warm)
      return tl::unexpected(warm.error());
  }
  std::vector<std::string> heads{"streams", "cluster"};
  for (const auto& f : figures)
    heads.emplace_back(f.head);
  rows all{table(std::move(heads), 2)};
  for (auto streams : given.streams) {
    auto per_stream = std::max(1U, (given.requests + streams - 1) / streams);
    std::vector<std::vector<round_figures>> rounds(targets->size());
    for (unsigned r = 0; r < given.rounds; ++r)
      for (std::size_t t = 0; t < targets->size(); ++t) {
        const auto& to = (*targets)[t];
        shown.say(fmt::format("serve: {} streams, round {} of {}, {}", streams, r + 1, given.rounds,
                              to.name));
        auto figures_of_round = run_round(to, streams, per_stream, given);
        if (!figures_of_round)
          return tl::unexpected(figures_of_round.error());
        rounds[t].push_back(std::move(*figures_of_round));
      }
    for (std::size_t t = 0; t < targets->size(); ++t) {
      const auto& name = (*targets)[t].name;
      all.add(streams, name, rounds[t]);
      if (t > 0)
        all.add_ratio(streams, name + " / " + targets->front().name, rounds[t], rounds[0]);
    }
  }
  report result;
  result.text = all.shown.text();
  result.figures = {{"rounds", given.rounds},
                    {"max_tokens", given.max_tokens},
                    {"prompt_tokens", given.prompt_tokens},
                    {"rows", std::move(all.figures_json)}};
  return result;
}

} // namespace

void add_serve(CLI::App& bench, command& run) {
  auto given = std::make_shared<serve_arguments>();
  auto* sub = bench.add_subcommand("serve", "Time to first token, gaps between tokens, tokens/s");
  sub->footer(
    "Each of N streams asks for an answer, takes it token by token and asks again. Clusters "
    "that are named together are measured in turn, a round each, and compared.");
  sub
    ->add_option("--cluster", given->clusters,
                 "name of a running cluster (repeatable); may be left out if only one runs")
    ->allow_extra_args(false);
  sub
    ->add_option("--endpoint", given->endpoints,
                 "a frontend, for instance 10.0.0.1:8000 (repeatable)")
    ->allow_extra_args(false);
  sub->add_option("--streams", given->streams, "at the same time: 1,8,32")
    ->delimiter(',')
    ->check(CLI::Range(1, 4096));
  sub->add_option("--rounds", given->rounds, "of each, in turn")->check(at_least_one());
  sub->add_option("--max-tokens", given->max_tokens, "of an answer; never less")
    ->check(CLI::Range(2.0, 1e9));
  sub->add_option("--prompt-tokens", given->prompt_tokens, "of a prompt")->check(at_least_one());
  sub
    ->add_option("--requests", given->requests,
                 "of a round, at least; each stream makes one or more")
    ->check(at_least_one());
  add_json_flag(sub, given->as_json);
  sub->callback(
    [given, &run] { run = [given] { return finish(measure(*given), given->as_json); }; });
}

} // namespace troupe::tools::bench
