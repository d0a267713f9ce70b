#include "streams.hpp"

#include <algorithm>
#include <csignal>
#include <random>

#include <catch2/catch.hpp>
#include <fmt/format.h>
#include <fmt/ranges.h>

using namespace troupe::process_tests;

namespace {

constexpr int kills_per_worker = 20;

/// When and what a test killed.
struct blow {
  std::string worker;
  std::string kind; ///< of its first actor
  steady::time_point time;
};

blow kill_worker(const json& status, const std::string& name, int signal_number = SIGKILL) {
  for (const auto& node : status.at("nodes")) {
    for (const auto& worker : node.at("workers")) {
      if (worker.at("name") != name)
        continue;
      blow result{name, worker.at("actors").at(0).at("kind"), steady::now()};
      REQUIRE(::kill(worker.at("pid").get<pid_t>(), signal_number) == 0);
      return result;
    }
  }
  FAIL("there is no worker " << name);
  return {};
}

void pause(std::mt19937& random, int from_ms, int to_ms) {
  std::this_thread::sleep_for(
    std::chrono::milliseconds(std::uniform_int_distribution(from_ms, to_ms)(random)));
}

double median(std::vector<double> values) {
  auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

void check_load(golden_load& load) {
  load.finish();
  auto problems = load.problems();
  INFO("streams that went wrong: " << problems.size() << "\n" << lines(problems));
  CHECK(problems.empty());
  CHECK(load.num_conversations() >= load.num_streams());
}

/// The records from `first` on are of these blows: in this order, and each in an epoch of its own.
void check_records(const json& status, std::size_t first, const std::vector<blow>& blows,
                   int signal_number = SIGKILL) {
  const auto& records = status.at("recoveries");
  REQUIRE(records.size() == first + blows.size());
  for (std::size_t i = 0; i < blows.size(); ++i) {
    const auto& record = records[first + i];
    INFO(record.dump());
    CHECK(record.at("cause")
          == fmt::format("{}: killed by signal {}", blows[i].worker, signal_number));
    CHECK(record.at("level") == "process");
    CHECK(record.at("restore_ms") > 0);
    CHECK(record.at("first_token_ms") >= record.at("restore_ms"));
  }
  for (std::size_t i = 1; i < records.size(); ++i)
    CHECK(records[i].at("epoch") > records[i - 1].at("epoch"));
  CHECK(status.at("epoch") >= records.back().at("epoch"));
}

/// When the death of each was heard of, after the blow.
std::vector<double> times_of_detection(const json& status, const std::vector<blow>& blows) {
  std::vector<double> result;
  for (std::size_t i = 0; i < blows.size(); ++i) {
    const auto heard = steady::time_point(std::chrono::nanoseconds(
      status.at("recoveries").at(i).at("detected_ns").get<std::int64_t>()));
    result.push_back(milliseconds(heard - blows[i].time));
  }
  return result;
}

void print_pauses(const std::string& of, const std::vector<double>& pauses) {
  fmt::print("longest gap between two tokens, {}: median {:.0f} ms, maximum {:.0f} ms, {} kills\n",
             of, median(pauses), *std::max_element(pauses.begin(), pauses.end()), pauses.size());
}

const std::vector<std::string> many_restarts{"recovery.max_restarts=1000"};

/// Nobody is taken for dead because it stalls.
const std::vector<std::string> patient{"recovery.max_restarts=1000", "recovery.hang_ms=10000"};

} // namespace

TEST_CASE("each worker may be killed 20 times in a row, and no client sees more than a pause") {
  cluster c("local.yaml", many_restarts);
  std::mt19937 random(20240229);
  golden_load load(c.endpoint());
  pause(random, 500, 500); // until every stream is under way
  std::vector<blow> blows;
  auto status = c.wait_settled();
  for (const auto& name : c.worker_names()) {
    for (int i = 0; i < kills_per_worker; ++i) {
      pause(random, 50, 350);
      blows.push_back(kill_worker(status, name));
      status = c.wait_settled(blows.size());
    }
  }
  auto end = steady::now();
  check_load(load);
  check_records(status, 0, blows);

  std::vector<double> all;
  std::map<std::string, std::vector<double>> by_kind;
  for (std::size_t i = 0; i < blows.size(); ++i) {
    auto until = i + 1 < blows.size() ? blows[i + 1].time : end;
    all.push_back(milliseconds(load.longest_gap(blows[i].time, until)));
    by_kind[blows[i].kind].push_back(all.back());
  }
  for (const auto& [kind, pauses] : by_kind)
    print_pauses("a " + kind + " killed", pauses);
  print_pauses("any worker killed", all);
  const auto heard = times_of_detection(status, blows);
  fmt::print("heard of after: median {:.2f} ms, maximum {:.2f} ms\n", median(heard),
             *std::max_element(heard.begin(), heard.end()));
  CHECK(median(heard) < 5);
  fmt::print("{} conversations with {} tokens, all golden\n", load.num_conversations(),
             load.num_tokens());
  CHECK(median(all) < 1000);
  CHECK(*std::max_element(all.begin(), all.end()) < 5000);
  c.end();
}

TEST_CASE("workers that draft tokens may be killed as any other") {
  cluster c("local.yaml", {"recovery.max_restarts=1000", "serving.draft_tokens=2"});
  std::mt19937 random(20261122);
  golden_load load(c.endpoint());
  pause(random, 500, 500);
  std::vector<blow> blows;
  auto status = c.wait_settled();
  for (int i = 0; i < 3; ++i) {
    for (const auto& name : c.worker_names()) {
      pause(random, 50, 350);
      blows.push_back(kill_worker(status, name));
      status = c.wait_settled(blows.size());
    }
  }
  check_load(load);
  check_records(status, 0, blows);
  c.end();
}

TEST_CASE("a worker that crashes is recovered like one that is killed") {
  cluster c("local.yaml", many_restarts);
  golden_load load(c.endpoint(), 2);
  std::this_thread::sleep_for(200ms);
  std::vector<blow> blows;
  for (const auto& name : c.worker_names()) {
    blows.push_back(kill_worker(c.status(), name, SIGSEGV));
    c.wait_settled(blows.size());
  }
  auto status = c.wait_settled(blows.size());
  check_load(load);
  check_records(status, 0, blows, SIGSEGV);
  c.end();
}

TEST_CASE("two workers killed at the same moment are recovered together") {
  cluster c("local.yaml", many_restarts);
  golden_load load(c.endpoint());
  std::mt19937 random(7);
  auto names = c.worker_names();
  REQUIRE(names.size() == 4);
  auto status = c.wait_settled();
  std::size_t num_records = 0;
  for (std::size_t a = 0; a < names.size(); ++a) {
    for (std::size_t b = a + 1; b < names.size(); ++b) {
      pause(random, 100, 300);
      kill_worker(status, names[a]);
      kill_worker(status, names[b]);
      num_records += 2;
      status = c.wait_settled(num_records);
    }
  }
  check_load(load);
  CHECK(status.at("recoveries").size() == num_records);
  c.end();
}

TEST_CASE("a worker may be killed again while it is being restarted") {
  cluster c("local.yaml", many_restarts);
  golden_load load(c.endpoint());
  std::this_thread::sleep_for(200ms);
  for (const auto& name : c.worker_names()) {
    auto before = c.worker(name);
    auto pid = before.at("pid").get<pid_t>();
    REQUIRE(::kill(pid, SIGKILL) == 0);
    // Each successor dies as soon as it is heard of: before, while or just after it loads.
    for (int i = 0; i < 3; ++i) {
      REQUIRE(eventually([&] { return c.worker(name).at("pid") != pid; }, 5s));
      pid = c.worker_pid(name);
      ::kill(pid, SIGKILL);
    }
    REQUIRE(eventually(
      [&] { return c.worker(name).at("incarnation") >= before.at("incarnation").get<int>() + 4; },
      5s));
    auto status = c.wait_settled(1);
    CHECK(status.at("recoveries").back().at("cause") == name + ": killed by signal 9");
  }
  check_load(load);
  c.end();
}

TEST_CASE("a worker killed in one replica leaves the answers of both golden") {
  cluster c("two-nodes.yaml", many_restarts);
  golden_load load(c.endpoint());
  std::mt19937 random(3);
  std::vector<blow> blows;
  auto status = c.wait_settled();
  for (int i = 0; i < 4; ++i) {
    pause(random, 100, 300);
    blows.push_back(kill_worker(status, i % 2 == 0 ? "node-0/worker-0" : "node-0/worker-1"));
    status = c.wait_settled(blows.size());
  }
  check_load(load);
  check_records(status, 0, blows);
  for (const auto& worker : status.at("nodes").at(1).at("workers"))
    CHECK(worker.at("incarnation") == 1);
  c.end();
}

TEST_CASE("a node process that stalls is heard again, and so are its workers") {
  cluster c("local.yaml", patient);
  golden_load load(c.endpoint(), 4);
  std::this_thread::sleep_for(200ms);
  auto node = c.status().at("nodes").at(0).at("pid").get<pid_t>();
  // Longer than any connection lives without a heartbeat.
  REQUIRE(::kill(node, SIGSTOP) == 0);
  std::this_thread::sleep_for(2s);
  REQUIRE(::kill(node, SIGCONT) == 0);
  auto status = c.wait_settled();
  // What happens after it is heard of: views reach the workers, and losses the controller.
  std::vector<blow> blows;
  auto first = status.at("recoveries").size();
  for (const auto& name : c.worker_names()) {
    blows.push_back(kill_worker(status, name));
    status = c.wait_settled(first + blows.size());
  }
  check_load(load);
  check_records(status, first, blows);
  c.end();
}

TEST_CASE("a worker killed while the controller stalls is recovered when it is back") {
  cluster c("local.yaml", patient);
  golden_load load(c.endpoint(), 4);
  std::this_thread::sleep_for(200ms);
  auto status = c.wait_settled();
  auto controller = status.at("controller").at("pid").get<pid_t>();
  std::size_t num_records = 0;
  for (const char* name : {"node-0/worker-1", "node-0/worker-3"}) {
    REQUIRE(::kill(controller, SIGSTOP) == 0);
    std::this_thread::sleep_for(1500ms); // until its connections count as broken
    auto blow = kill_worker(status, name);
    std::this_thread::sleep_for(500ms);
    REQUIRE(::kill(controller, SIGCONT) == 0);
    status = c.wait_settled(++num_records);
    CHECK(status.at("recoveries")
            .back()
            .at("cause")
            .get<std::string>()
            .starts_with(blow.worker + ": "));
    CHECK(status.at("epoch") > num_records);
  }
  check_load(load);
  c.end();
}

TEST_CASE("any process may stall for two seconds, and every stream goes on") {
  cluster c("local.yaml", patient);
  golden_load load(c.endpoint(), 4);
  std::this_thread::sleep_for(200ms);
  auto status = c.wait_settled();
  std::vector<std::pair<std::string, pid_t>> processes{
    {"controller", status.at("controller").at("pid")},
    {"frontend", status.at("frontend").at("pid")}};
  for (const auto& name : c.worker_names())
    processes.emplace_back(name, c.worker_pid(name));
  for (const auto& [name, pid] : processes) {
    REQUIRE(::kill(pid, SIGSTOP) == 0);
    std::this_thread::sleep_for(2s); // connections without a heartbeat for so long break
    ::kill(pid, SIGCONT);
    auto before = load.num_conversations();
    bool goes_on =
      eventually([&] { return load.num_conversations() >= before + load.num_streams(); }, 20s);
    INFO("after a stall of " << name);
    REQUIRE(goes_on);
  }
  c.wait_settled();
  check_load(load);
  c.end();
}

TEST_CASE("several processes may stall at random moments") {
  cluster c("local.yaml", patient);
  golden_load load(c.endpoint(), 4);
  std::mt19937 random(11);
  std::vector<pid_t> pids;
  for (const auto& p : processes_under(c.runtime_directory()))
    pids.push_back(p.pid);
  for (int i = 0; i < 12; ++i) {
    std::shuffle(pids.begin(), pids.end(), random);
    for (std::size_t p = 0; p < 3; ++p)
      ::kill(pids[p], SIGSTOP);
    pause(random, 100, 1500);
    for (std::size_t p = 0; p < 3; ++p) {
      ::kill(pids[p], SIGCONT);
      pause(random, 0, 100);
    }
  }
  auto before = load.num_conversations();
  CHECK(eventually([&] { return load.num_conversations() >= before + load.num_streams(); }, 20s));
  c.wait_settled();
  check_load(load);
  c.end();
}
