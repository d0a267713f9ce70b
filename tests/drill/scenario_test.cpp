#include "troupe/drill/scenario.hpp"

#include <filesystem>

#include <catch2/catch.hpp>

using namespace troupe;
using namespace troupe::drill;
using namespace std::chrono_literals;

namespace {

constexpr auto whole = R"(drill: stage-killed
about: A stage is killed.
config: ../local.yaml
set: [recovery.max_restarts=1000]
load: {streams: 12, rate_per_s: 40.5}
seed: 7
runs: 20
events:
  - at: 300ms..700ms
    fault: kill
    target: replica-0/stage-1
    for: 2s
  - when: {worker: node-0/worker-1, state: loading}
    fault: {point: frame.send, kind: corrupt, probability: 0.2, count: 10, delay_ms: 5, peer: "node-1/*"}
    target: "*"
  - {at: 1s, every: 500ms, times: 3, fault: kill, node: node-1}
  - {at: 2s, fault: partition, target: node-1, from: controller, one_way: true, for: 1m}
  - {when: {recovery: restoring}, at: 20ms, fault: kill_controller}
  - {when: {epoch_raised: true}, fault: continue, target: same}
checks: {golden: true, lost: 1, duplicated: 2, leaks: any, longest_gap_ms: 5000, detect_ms: 1000, cause: culprit, settle_s: 9}
)";

/// The only line of the complaint, without the file's name.
std::string complaint(const std::string& text) {
  auto made = parse(text, "d.yaml");
  if (made)
    return "accepted";
  return made.error().cause;
}

std::string with_event(const std::string& event) {
  return "config: c.yaml\nevents:\n  - " + event + "\n";
}

} // namespace

TEST_CASE("a scenario is read whole") {
  auto made = parse(whole, "configs/drills/x.yaml");
  REQUIRE(made);
  CHECK(made->name == "stage-killed");
  CHECK(made->config == "configs/local.yaml");
  CHECK(made->settings == std::vector<std::string>{"recovery.max_restarts=1000"});
  CHECK(made->load.streams == 12);
  CHECK(made->load.rate_per_s == 40.5);
  CHECK(made->seed == 7);
  CHECK(made->runs == 20);
  REQUIRE(made->events.size() == 6);
  const auto& e = made->events;
  CHECK(e[0].at.low == 300ms);
  CHECK(e[0].at.high == 700ms);
  CHECK(e[0].fault.kind == fault_kind::kill);
  CHECK(e[0].lasting->low == 2s);
  CHECK(e[0].line == 9);
  CHECK(e[0].label() == "kill replica-0/stage-1");
  CHECK(e[1].when->worker == "node-0/worker-1");
  CHECK(e[1].fault.rule.where == faults::point::frame_send);
  CHECK(e[1].fault.rule.what == faults::kind::corrupt);
  CHECK(e[1].fault.rule.probability == 0.2);
  CHECK(e[1].fault.rule.count == 10);
  CHECK(e[1].fault.rule.peer == "node-1/*");
  CHECK(e[1].label() == "frame.send corrupt * when node-0/worker-1 is loading");
  CHECK(e[2].times == 3);
  CHECK(e[2].every == 500ms);
  CHECK(e[2].fault.kind == fault_kind::kill_node);
  CHECK(e[2].fault.target == "node-1");
  CHECK(e[3].fault.one_way);
  CHECK(e[3].fault.peer == "controller");
  CHECK(e[3].lasting->high == 60s);
  CHECK(e[4].fault.target == "controller");
  CHECK(e[4].when->what == condition::kind::recovery_phase);
  CHECK(e[5].when->what == condition::kind::epoch_raised);
  CHECK(e[5].fault.kind == fault_kind::resume);
  CHECK(made->checks.lost == 1);
  CHECK(made->checks.duplicated == 2);
  CHECK_FALSE(made->checks.leaks);
  CHECK(made->checks.cause == "culprit");
  CHECK(made->checks.settle_s == 9);
}

TEST_CASE("a short scenario has defaults") {
  auto made =
    parse("config: c.yaml\nevents: [{at: 1s, fault: kill, target: any worker}]", "d/n.yaml");
  REQUIRE(made);
  CHECK(made->name == "n");
  CHECK(made->load.streams == 48);
  CHECK(made->load.rate_per_s == 0);
  CHECK(made->runs == 1);
  CHECK(made->checks.golden);
  CHECK(made->checks.leaks);
  CHECK(made->checks.lost == 0);
  CHECK_FALSE(made->checks.longest_gap_ms);
}

TEST_CASE("every mistake is reported with its line and key") {
  struct {
    const char* text;
    const char* where;
    const char* what;
  } cases[] = {
    {"config: [", "d.yaml:2", "not valid YAML"},
    {"events: [{at: 1s, fault: kill, target: a}]", "config", "is missing"},
    {"config: c.yaml", "events", "at least one event"},
    {"config: c.yaml\nevents: []", "d.yaml:2:9: events", "the list is empty"},
    {"config: c.yaml\nevents: {}", "d.yaml:2:9: events", "a list is needed"},
    {"config: c.yaml\nevents: [kill]", "d.yaml:2:10: events[0]", "a mapping"},
    {"config: c.yaml\nruns: 0\nevents: [{at: 1s, fault: kill, target: a}]", "d.yaml:2:7: runs",
     "out of range"},
    {"config: c.yaml\nset: [a]\nevents: [{at: 1s, fault: kill, target: a}]", "d.yaml:2:7: set[0]",
     "not KEY=VALUE"},
    {"config: c.yaml\nload: {streams: many}\nevents: [{at: 1s, fault: kill, target: a}]",
     "d.yaml:2:17: load.streams", "whole number"},
    {"config: c.yaml\nload: {rate_per_s: -3}\nevents: [{at: 1s, fault: kill, target: a}]",
     "d.yaml:2:20: load.rate_per_s", "a number from"},
    {"config: c.yaml\nchecks: {golden: maybe}\nevents: [{at: 1s, fault: kill, target: a}]",
     "d.yaml:2:18: checks.golden", "true or false"},
    {"config: c.yaml\nchecks: {leaks: few}\nevents: [{at: 1s, fault: kill, target: a}]",
     "d.yaml:2:17: checks.leaks", "none or any"},
    {"config: c.yaml\nchecks: {longest_gap: 3}\nevents: [{at: 1s, fault: kill, target: a}]",
     "d.yaml:2:10: checks.longest_gap", "did you mean longest_gap_ms?"},
    {"config: c.yaml\nevent: 3\nevents: [{at: 1s, fault: kill, target: a}]", "d.yaml:2:1: event",
     "did you mean events?"},
  };
  for (const auto& c : cases) {
    INFO(c.text);
    auto said = complaint(c.text);
    CHECK_THAT(said, Catch::Contains(c.where) && Catch::Contains(c.what));
  }
}

TEST_CASE("every mistake in an event is reported with its line and key") {
  struct {
    const char* event;
    const char* where;
    const char* what;
  } cases[] = {
    {"{fault: kill, target: a}", "events[0].at", "needs a time (at) or a condition (when)"},
    {"{at: soon, fault: kill, target: a}", "d.yaml:3:10: events[0].at", "is no time"},
    {"{at: 5, fault: kill, target: a}", "d.yaml:3:10: events[0].at", "text is needed"},
    {"{at: 2s..1s, fault: kill, target: a}", "events[0].at", "is no time"},
    {"{at: 1s, target: a}", "events[0].fault", "is missing"},
    {"{at: 1s, fault: murder, target: a}", "d.yaml:3:21: events[0].fault", "write one of: kill"},
    {"{at: 1s, fault: kill}", "events[0].target", "is missing"},
    {"{at: 1s, fault: kill, target: a, node: b}", "events[0].node", "keep one of the two"},
    {"{at: 1s, fault: kill, target: a, times: 3}", "events[0].every", "needs a distance"},
    {"{at: 1s, fault: kill, target: a, for: long}", "events[0].for", "is no time"},
    {"{at: 1s, fault: kill, target: a, forr: 1s}", "events[0].forr", "did you mean for?"},
    {"{at: 1s, fault: {point: frame.sent, kind: drop}, target: a}", "events[0].fault.point",
     "frame.send"},
    {"{at: 1s, fault: {kind: drop}, target: a}", "events[0].fault.point", "is missing"},
    {"{at: 1s, fault: {point: frame.send, kind: lose}, target: a}", "events[0].fault.kind", "drop"},
    {"{at: 1s, fault: {point: frame.send, kind: none}, target: a}", "events[0].fault.kind",
     "does nothing"},
    {"{at: 1s, fault: {point: frame.send, kind: drop, probability: 2}, target: a}",
     "events[0].fault.probability", "a number from 0 to 1"},
    {"{at: 1s, fault: {point: frame.send, kind: drop, often: 2}, target: a}",
     "events[0].fault.often", "unknown key"},
    {"{when: {worker: w}, fault: kill, target: a}", "events[0].when.worker", "write {worker"},
    {"{when: {}, fault: kill, target: a}", "events[0].when.worker", "epoch_raised"},
    {"{when: {recovery: x}, times: 2, every: 1s, fault: kill, target: a}", "events[0].times",
     "happens once"},
  };
  for (const auto& c : cases) {
    INFO(c.event);
    auto said = complaint(with_event(c.event));
    CHECK_THAT(said, Catch::Contains(c.where) && Catch::Contains(c.what));
  }
}

TEST_CASE("several mistakes come in the order of the file") {
  auto said = complaint("runs: none\nconfig: c.yaml\nevents:\n  - {at: x, fault: y, target: z}\n");
  auto runs = said.find("d.yaml:1:7: runs"), at = said.find("events[0].at"),
       fault = said.find("events[0].fault");
  CHECK(runs < at);
  CHECK(at < fault);
  CHECK(fault != std::string::npos);
}

TEST_CASE("times are read") {
  CHECK(parse_duration("300ms") == 300ms);
  CHECK(parse_duration("1.5s") == 1500ms);
  CHECK(parse_duration("2m") == 120s);
  CHECK(parse_duration("0s") == 0ms);
  for (auto bad : {"", "s", "5", "-1s", "1h", "1 s", "nan", "1e999s", "infs"})
    CHECK_FALSE(parse_duration(bad));
  CHECK(parse_range("1s..2s")->high == 2s);
  CHECK(parse_range("1s")->high == 1s);
  for (auto bad : {"1s..", "..2s", "2s..1s", "1s...2s"})
    CHECK_FALSE(parse_range(bad));
}

TEST_CASE("every drill that is shipped can be read, and its config is there") {
  std::size_t count = 0;
  for (const auto& entry :
       std::filesystem::recursive_directory_iterator(TROUPE_SOURCE_DIR "/configs/drills")) {
    if (entry.is_directory())
      continue;
    INFO(entry.path().string());
    auto made = load(entry.path());
    if (!made)
      FAIL(made.error().text());
    CHECK(made->name == entry.path().stem().string());
    CHECK_FALSE(made->about.empty());
    CHECK(std::filesystem::exists(made->config));
    ++count;
  }
  CHECK(count >= 50);
}
