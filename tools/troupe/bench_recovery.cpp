#include "bench.hpp"
#include "bench_stream.hpp"

#include "troupe/http/client.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <thread>

#include <fmt/format.h>

namespace troupe::tools::bench {

namespace {

using namespace std::chrono_literals;
using nlohmann::json;

constexpr auto poll_interval = 10ms;
constexpr auto recovery_patience = 30s;
constexpr auto first_answers_patience = 60s;
constexpr auto quiet_window = 300ms; ///< before a kill, to compare with
constexpr auto warm_up = 500ms;

struct recovery_arguments {
  std::string cluster, endpoint;
  std::vector<std::string> workers;
  unsigned kills = 20;
  unsigned streams = 8;
  unsigned max_tokens = 256;
  unsigned prompt_tokens = 64;
  std::uint64_t seed = 1;
  bool as_json = false;
};

/// Clients that ask for the same answers again and again, a thread each, and check that they are
/// the same.
class load {
public:
  load(const std::string& endpoint, const prompt_maker& prompts, const recovery_arguments& given) {
    for (unsigned s = 0; s < given.streams; ++s) {
      auto& c = *clients_.emplace_back(std::make_unique<client>());
      c.request = {endpoint, prompts.prompt(given.prompt_tokens, s), given.max_tokens};
      c.thread = std::thread([this, &c] { converse(c); });
    }
  }

  ~load() { finish(); }
  load(const load&) = delete;
  load& operator=(const load&) = delete;

  /// Lets the answers under way come to their ends.
  void finish() {
    stopping_ = true;
    for (auto& c : clients_)
      if (c->thread.joinable())
        c->thread.join();
  }

  /// The longest time between two tokens of a stream that overlaps [from, to]. After `finish`.
  double longest_gap_around(steady::time_point from, steady::time_point to) const {
    return longest_gap([=](auto begin, auto end) { return begin < to && end > from; });
  }

  /// The same of those that ended in [from, to].
  double longest_gap_ended(steady::time_point from, steady::time_point to) const {
    return longest_gap([=](auto, auto end) { return end >= from && end <= to; });
  }

  /// The first thing that went wrong. After `finish`.
  std::optional<error> problem() const {
    for (const auto& c : clients_)
      if (c->problem)
        return c->problem;
    return std::nullopt;
  }

  bool failed() const { return failed_; }
  unsigned num_answers() const { return num_answers_; }

private:
  struct client {
    stream_request request;
    std::vector<std::int32_t> expected_tokens;
    std::vector<std::pair<steady::time_point, steady::time_point>> gaps;
    std::optional<error> problem;
    std::thread thread;
  };

  template <class Counts>
  double longest_gap(Counts counts) const {
    steady::duration longest{};
    for (const auto& c : clients_)
      for (const auto& [begin, end] : c->gaps)
        if (counts(begin, end))
          longest = std::max(longest, end - begin);
    return milliseconds(longest);
  }

  void converse(client& c) {
    while (!stopping_ && !c.problem) {
      auto raw = stream(c.request);
      if (!raw)
        c.problem = raw.error();
      else if (auto record = read(*raw, c.request.max_tokens); !record)
        c.problem = record.error();
      else
        take(c, *record);
    }
    if (c.problem)
      failed_ = true;
  }

  void take(client& c, const stream_record& record) {
    if (c.expected_tokens.empty())
      c.expected_tokens = record.tokens;
    else if (c.expected_tokens != record.tokens)
      c.problem = fail(error_code::internal, "an answer differs from the same client's first one",
                       "a token was lost, doubled or computed anew otherwise")
                    .value();
    for (std::size_t i = 1; i < record.times.size(); ++i)
      c.gaps.emplace_back(record.times[i - 1], record.times[i]);
    ++num_answers_;
  }

  std::atomic<bool> stopping_{false};
  std::atomic<bool> failed_{false};
  std::atomic<unsigned> num_answers_{0};
  std::vector<std::unique_ptr<client>> clients_;
};

expected<json> fetch_status(const std::string& endpoint) {
  auto answer = http::fetch({"GET", endpoint + "/v1/cluster", {}, {}}, 5000ms);
  if (!answer)
    return tl::unexpected(answer.error());
  auto status = json::parse(answer->body, nullptr, false);
  if (answer->status != 200 || !status.is_object() || !status.contains("nodes")
      || !status.contains("recoveries"))
    return fail(error_code::internal, endpoint + "/v1/cluster is not what a frontend answers");
  return status;
}

/// All workers by name.
std::vector<std::pair<std::string, json>> workers_of(const json& status) {
  std::vector<std::pair<std::string, json>> result;
  for (const auto& node : status["nodes"])
    for (const auto& worker : node["workers"])
      result.emplace_back(worker.value("name", ""), worker);
  return result;
}

bool all_run(const json& status) {
  for (const auto& [name, worker] : workers_of(status))
    if (worker.value("state", "") != "running")
      return false;
  return status.value("ready", false);
}

/// The newest recovery's id; 0 if there was none.
std::uint64_t last_recovery(const json& status) {
  const auto& records = status["recoveries"];
  return records.empty() ? 0 : records.back().value("id", std::uint64_t{0});
}

/// Waits until a recovery newer than `after` is over; that record.
expected<json> wait_recovered(const std::string& endpoint, std::uint64_t after) {
  auto deadline = steady::now() + recovery_patience;
  for (;;) {
    auto status = fetch_status(endpoint);
    if (!status)
      return tl::unexpected(status.error());
    const auto& records = (*status)["recoveries"];
    bool over = !records.empty() && records.back().value("phase", "") == "serving";
    if (over && last_recovery(*status) > after && all_run(*status))
      return records.back();
    if (steady::now() > deadline)
      return fail(error_code::deadline_exceeded,
                  "no recovery was over 30 s after the kill; the recoveries: " + records.dump(),
                  "`troupe status` shows the cluster");
    std::this_thread::sleep_for(poll_interval);
  }
}

struct kill_note {
  std::string worker;
  steady::time_point killed;
  steady::time_point recovered;
  json record;
};

expected<kill_note> kill_once(const std::string& endpoint, const std::string& worker) {
  auto status = fetch_status(endpoint);
  if (!status)
    return tl::unexpected(status.error());
  kill_note note;
  note.worker = worker;
  pid_t pid = 0;
  for (const auto& [name, shown] : workers_of(*status))
    if (name == worker)
      pid = shown.value("pid", 0);
  if (pid <= 0)
    return fail(error_code::not_found, fmt::format("no worker named {} runs", worker),
                "`troupe status` shows those that do");
  note.killed = steady::now();
  if (::kill(pid, SIGKILL) != 0)
    return fail(error_code::io_failed,
                fmt::format("cannot kill {} (pid {}): {}", worker, pid, std::strerror(errno)),
                "run this on the worker's host, as its user");
  auto record = wait_recovered(endpoint, last_recovery(*status));
  if (!record)
    return tl::unexpected(record.error());
  note.recovered = steady::now();
  note.record = std::move(*record);
  return note;
}

/// A row of the table: one figure over all kills of a worker.
struct quantity {
  const char* key;
  const char* head;
};

constexpr quantity from_records[] = {
  {"detect_ms", "exit to detection"},
  {"fence_ms", "detection to fence"},
  {"restore_ms", "detection to restored"},
  {"first_token_ms", "detection to first token"},
};

class summary {
public:
  summary() : table_({"worker", "ms", "median", "p95", "max"}, 2) {}

  void add(const std::string& worker, const char* key, const char* head,
           std::vector<double> values) {
    auto median = percentile(values, 0.5);
    auto p95 = percentile(values, 0.95);
    auto most = percentile(values, 1);
    table_.add({worker, head, fmt::format("{:.1f}", median), fmt::format("{:.1f}", p95),
                fmt::format("{:.1f}", most)});
    figures_[worker][key] = {{"median", median}, {"p95", p95}, {"max", most}};
  }

  std::string text() const { return table_.text(); }
  const json& figures() const { return figures_; }

private:
  table table_;
  json figures_;
};

report summarise(const std::vector<kill_note>& kills, const load& clients,
                 const recovery_arguments& given) {
  summary all;
  for (const auto& worker : given.workers) {
    std::vector<double> pauses, quiet;
    std::vector<std::vector<double>> recorded(std::size(from_records));
    for (const auto& note : kills) {
      if (note.worker != worker)
        continue;
      pauses.push_back(clients.longest_gap_around(note.killed, note.recovered));
      quiet.push_back(clients.longest_gap_ended(note.killed - quiet_window, note.killed));
      for (std::size_t q = 0; q < std::size(from_records); ++q)
        recorded[q].push_back(note.record.value(from_records[q].key, 0.0));
    }
    all.add(worker, "client_gap_ms", "longest gap a client saw", std::move(pauses));
    for (std::size_t q = 0; q < std::size(from_records); ++q)
      all.add(worker, from_records[q].key, from_records[q].head, std::move(recorded[q]));
    all.add(worker, "quiet_gap_ms", "longest gap in the 300 ms before", std::move(quiet));
  }
  report result;
  result.text =
    fmt::format("{}\n{} kills of each worker under {} streams; {} answers, all complete and "
                "the same as before the first kill.\n",
                all.text(), given.kills, given.streams, clients.num_answers());
  result.figures = {{"kills", given.kills},
                    {"streams", given.streams},
                    {"answers", clients.num_answers()},
                    {"workers", all.figures()}};
  return result;
}

expected<report> measure(recovery_arguments given) {
  auto endpoint = resolve_endpoint(given.cluster, given.endpoint);
  if (!endpoint)
    return tl::unexpected(endpoint.error());
  auto prompts = prompt_maker::make(*endpoint);
  if (!prompts)
    return tl::unexpected(prompts.error());
  auto status = fetch_status(*endpoint);
  if (!status)
    return tl::unexpected(status.error());
  if (given.workers.empty())
    for (const auto& [name, worker] : workers_of(*status))
      given.workers.push_back(name);
  progress shown;
  load clients(*endpoint, *prompts, given);
  // The first answers are what the later ones are compared with: they must come before a kill.
  for (auto begin = steady::now();
       clients.num_answers() < given.streams || steady::now() - begin < warm_up;
       std::this_thread::sleep_for(poll_interval)) {
    shown.say("recovery: first answers");
    if (clients.failed())
      break;
    if (steady::now() - begin > first_answers_patience)
      return fail(
        error_code::deadline_exceeded,
        fmt::format("{} of {} first answers came in 60 s", clients.num_answers(), given.streams),
        "fewer --streams or --max-tokens make them shorter");
  }
  std::mt19937_64 random(given.seed);
  std::uniform_int_distribution<int> pause_ms(300, 700);
  std::vector<kill_note> kills;
  for (unsigned k = 0; k < given.kills; ++k)
    for (const auto& worker : given.workers) {
      shown.say(fmt::format("recovery: kill {} of {}, {}", k + 1, given.kills, worker));
      std::this_thread::sleep_for(std::chrono::milliseconds(pause_ms(random)));
      if (clients.failed())
        break;
      auto note = kill_once(*endpoint, worker);
      if (!note)
        return tl::unexpected(note.error());
      kills.push_back(std::move(*note));
    }
  clients.finish();
  if (auto problem = clients.problem()) {
    problem->cause = fmt::format("after {} kills: {}", kills.size(), problem->cause);
    return tl::unexpected(*problem);
  }
  return summarise(kills, clients, given);
}

} // namespace

void add_recovery(CLI::App& bench, command& run) {
  auto given = std::make_shared<recovery_arguments>();
  auto* sub = bench.add_subcommand("recovery", "Kill workers under load: how long clients wait");
  sub->footer(
    "The workers must be processes of this host. Give the cluster restarts enough:\n"
    "troupe up configs/local.yaml --set recovery.max_restarts=1000 --set recovery.within_s=60");
  sub->add_option("--cluster", given->cluster,
                  "name of the cluster; may be left out if only one runs");
  sub->add_option("--endpoint", given->endpoint,
                  "its frontend instead, for instance 127.0.0.1:8000");
  sub
    ->add_option("--worker", given->workers,
                 "to be killed, for instance node-0/worker-1 (repeatable); all if left out")
    ->allow_extra_args(false);
  sub->add_option("--kills", given->kills, "of each worker, in turn")->check(at_least_one());
  sub->add_option("--streams", given->streams, "that run meanwhile")->check(CLI::Range(1, 4096));
  sub->add_option("--max-tokens", given->max_tokens, "of an answer; never less")
    ->check(CLI::Range(2.0, 1e9));
  sub->add_option("--prompt-tokens", given->prompt_tokens, "of a prompt")->check(at_least_one());
  sub->add_option("--seed", given->seed, "of the moments of the kills");
  add_json_flag(sub, given->as_json);
  sub->callback(
    [given, &run] { run = [given] { return finish(measure(*given), given->as_json); }; });
}

} // namespace troupe::tools::bench
