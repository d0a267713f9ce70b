#include "troupe/drill/oracle.hpp"
#include "troupe/drill/outcome.hpp"
#include "troupe/drill/report.hpp"
#include "troupe/drill/statistics.hpp"

#include <algorithm>
#include <random>

#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>

using namespace troupe;
using namespace troupe::drill;

namespace {

constexpr std::int64_t ms = 1'000'000;

record_seen record(const std::string& cause, std::int64_t detected_ns) {
  record_seen r;
  r.id = 1;
  r.cause = cause;
  r.phase = "serving";
  r.detected_ns = detected_ns;
  r.first_seen_ns = detected_ns + 5 * ms;
  r.fence_ms = 2;
  r.restore_ms = 40;
  r.first_token_ms = 60;
  r.detected_by = "exit";
  return r;
}

injection hit(const std::string& target, std::int64_t t0_ns) {
  injection i;
  i.label = "kill " + target;
  i.target = target;
  i.t0_ns = t0_ns;
  i.leads_to_recovery = true;
  return i;
}

run_outcome one_run() {
  run_outcome run;
  run.seed = 1;
  run.begin_ns = 1000 * ms;
  run.end_ns = 3000 * ms;
  run.injections = {hit("node-0/worker-1", 1100 * ms), hit("node-0/worker-2", 2000 * ms)};
  run.records = {record("node-0/worker-1: killed by signal 9", 1110 * ms),
                 record("node-0/worker-2: killed by signal 9", 2020 * ms)};
  run.gaps = {{0, 1050 * ms, 1090 * ms},
              {0, 1095 * ms, 1195 * ms},
              {1, 1100 * ms, 1150 * ms},
              {2, 1990 * ms, 2100 * ms}};
  return run;
}

drill_outcome one_drill() {
  drill_outcome o;
  o.drill.name = "<stage> & \"killed\"";
  o.drill.config = "configs/local.yaml";
  o.begin_ns = 900 * ms;
  o.end_ns = 3100 * ms;
  o.replay = "troupe drill x --seed 1 --runs 1";
  o.runs = {one_run()};
  attribute(o.runs[0]);
  o.clients.conversations = 10;
  o.clients.tokens = 500;
  for (int i = 1; i <= 100; ++i)
    o.usual.add(i);
  return o;
}

bool holds(const std::vector<finding>& findings, const std::string& check) {
  auto found = std::ranges::find(findings, check, &finding::check);
  REQUIRE(found != findings.end());
  return found->ok;
}

} // namespace

TEST_CASE("answers are compared token by token") {
  const std::vector<std::int32_t> golden{1, 2, 3, 4, 5, 6};
  const auto against = [&](std::vector<std::int32_t> received) {
    return compare(golden, received);
  };
  CHECK_FALSE(against({1, 2, 3, 4, 5, 6}).any());
  auto cut = against({1, 2, 3});
  CHECK(cut.lost == 3);
  CHECK(cut.index == 3);
  CHECK(cut.duplicated + cut.wrong == 0);
  auto twice = against({1, 2, 3, 3, 4, 5, 6});
  CHECK(twice.duplicated == 1);
  CHECK(twice.lost + twice.wrong == 0);
  auto hole = against({1, 2, 4, 5, 6});
  CHECK(hole.lost == 1);
  CHECK(hole.index == 2);
  auto other = against({1, 2, 9, 4, 5, 6});
  CHECK(other.wrong == 1);
  CHECK(other.lost + other.duplicated == 0);
  auto nothing = against({});
  CHECK(nothing.lost == 6);
  CHECK(against({1, 2, 3, 4, 5, 6, 6}).duplicated == 1);
  CHECK_THAT(twice.text(), Catch::Contains("1 duplicated"));
}

TEST_CASE("comparing counts what was done to an answer") {
  std::mt19937_64 random(3);
  for (int round = 0; round < 200; ++round) {
    // All tokens differ, so that the fewest changes are the ones that were made.
    std::vector<std::int32_t> golden(50);
    for (std::size_t i = 0; i < golden.size(); ++i)
      golden[i] = static_cast<std::int32_t>(i);
    auto received = golden;
    const auto lost = random() % 4;
    for (std::size_t k = 0; k < lost; ++k)
      received.erase(received.begin() + static_cast<std::ptrdiff_t>(random() % 10 + 12 * k));
    auto found = compare(golden, received);
    CHECK(found.lost == lost);
    CHECK(found.duplicated + found.wrong == 0);
    found = compare(received, golden);
    CHECK(found.duplicated == lost);
  }
}

TEST_CASE("the golden answers of the demo model are read") {
  auto known = load_golden(TROUPE_SOURCE_DIR "/configs/models/troupe-mini");
  REQUIRE(known);
  CHECK(known->size() == 48);
  CHECK_FALSE(known->front().tokens.empty());
  CHECK_FALSE(load_golden("/nowhere"));
}

TEST_CASE("percentiles of samples and of histograms agree") {
  CHECK(percentile({}, 0.5) == 0);
  CHECK(percentile({3}, 0.95) == 3);
  CHECK(percentile({4, 1, 3, 2}, 0.5) == 2.5);
  CHECK(percentile({4, 1, 3, 2}, 1) == 4);
  histogram h, part;
  std::vector<double> all;
  std::mt19937_64 random(1);
  for (int i = 0; i < 10'000; ++i) {
    double v = 0.5 + static_cast<double>(random() % 100'000) / 100;
    all.push_back(v);
    (i % 2 ? h : part).add(v);
  }
  h.add(part);
  CHECK(h.count() == 10'000);
  for (double p : {0.05, 0.5, 0.95, 0.99})
    CHECK(h.percentile(p) == Approx(percentile(all, p)).epsilon(0.03));
  CHECK(h.max() == percentile(all, 1));
  h.add(0);
  CHECK(histogram().percentile(0.5) == 0);
}

TEST_CASE("growth is told from noise and from warming up") {
  std::vector<double> flat{5,  9,  10, 10, 11, 10, 9,  10, 10, 11, 10, 10,
                           10, 11, 10, 9,  10, 10, 10, 11, 10, 10, 9,  10};
  std::vector<double> rising;
  for (int i = 0; i < 40; ++i)
    rising.push_back(100 + 10 * i);
  CHECK(std::abs(*growth(flat)) <= 1);
  CHECK(*growth(rising) == Approx(200).margin(1));
  CHECK_FALSE(growth(std::vector<double>{1, 2, 3}));
}

TEST_CASE("records belong to the faults that caused them") {
  auto run = one_run();
  // Detected after the second fault, but it names the target of the first.
  run.records.push_back(record("node-0/worker-1: without progress", 2100 * ms));
  attribute(run);
  const auto& first = run.injections[0];
  CHECK(*first.detect_ms == Approx(10));
  CHECK(*first.fence_ms == Approx(1002));
  CHECK(*run.injections[1].detect_ms == Approx(20));
  CHECK(*run.injections[1].restore_ms == Approx(60));
  CHECK(first.detected_by == "exit");
}

TEST_CASE("a node that was killed owns the records of its workers") {
  run_outcome run;
  run.end_ns = 100 * ms;
  run.injections = {hit("node-1", 10 * ms)};
  run.records = {record("node-1/worker-0: killed by signal 9", 20 * ms),
                 record("node-1: killed by signal 9", 15 * ms)};
  attribute(run);
  CHECK(*run.injections[0].detect_ms == Approx(5));
  CHECK(*run.injections[0].first_token_ms == Approx(70));
  judge_run(run, {.cause = "culprit"});
  CHECK(run.ok());
}

TEST_CASE("gaps belong to the fault that they overlap") {
  auto run = one_run();
  attribute(run);
  CHECK(run.injections[0].longest_gap_ms == Approx(110)); // began before the second fault
  CHECK(run.injections[0].median_gap_ms == Approx(100));
  CHECK(run.injections[1].longest_gap_ms == Approx(110));
}

TEST_CASE("a stream that went on during the recovery stood by") {
  auto run = one_run();
  // Restored 50 ms after the fault; stream 3 got tokens meanwhile, stream 0 got none.
  run.gaps.push_back({3, 1105 * ms, 1135 * ms});
  run.gaps.push_back({3, 1135 * ms, 1205 * ms});
  run.gaps.push_back({4, 1101 * ms, 1170 * ms});
  run.gaps.erase(run.gaps.begin() + 2); // stream 1
  attribute(run);
  CHECK(*run.injections[0].bystander_gap_ms == Approx(110)); // stream 2, before the second fault
  run.gaps.pop_back();
  run.gaps.erase(run.gaps.begin() + 2);
  attribute(run);
  CHECK(*run.injections[0].bystander_gap_ms == Approx(70));
  CHECK(run.injections[0].longest_gap_ms == Approx(100));
  run.gaps.resize(2);
  for (auto& i : run.injections)
    i.bystander_gap_ms.reset();
  attribute(run);
  CHECK_FALSE(run.injections[0].bystander_gap_ms);
}

TEST_CASE("a record that blames a victim is a problem") {
  auto run = one_run();
  run.records[1].cause = "node-0/worker-3: connection lost";
  attribute(run);
  auto lenient = run;
  judge_run(lenient, {.cause = "any"});
  CHECK(lenient.ok());
  judge_run(run, {.cause = "culprit"});
  REQUIRE_FALSE(run.ok());
  CHECK_THAT(run.problems[0], Catch::Contains("blames node-0/worker-3"));
  auto named = one_run();
  judge_run(named, {.cause = "node-0/worker-1"});
  REQUIRE_FALSE(named.ok());
  CHECK_THAT(named.problems[0], Catch::Contains("blames node-0/worker-2"));
}

TEST_CASE("a death without a record is a problem") {
  auto run = one_run();
  run.records.pop_back();
  attribute(run);
  judge_run(run, {.cause = "culprit"});
  REQUIRE_FALSE(run.ok());
  CHECK_THAT(run.problems[0], Catch::Contains("no record"));
}

TEST_CASE("bounds of a run are kept") {
  auto run = one_run();
  attribute(run);
  judge_run(run, {.longest_gap_ms = 200, .detect_ms = 50});
  CHECK(run.ok());
  judge_run(run, {.longest_gap_ms = 105, .detect_ms = 15});
  CHECK(run.problems.size() == 3); // two gaps, one detection
}

TEST_CASE("the verdict finds what a client lost and what was left behind") {
  auto o = one_drill();
  CHECK(passed(judge(o)));
  const auto spoilt = [&](auto spoil) {
    auto bad = o;
    spoil(bad);
    return judge(bad);
  };
  CHECK_FALSE(holds(spoilt([](auto& b) { b.clients.lost = 1; }), "lost"));
  CHECK_FALSE(holds(spoilt([](auto& b) { b.clients.duplicated = 1; }), "duplicated"));
  CHECK_FALSE(holds(spoilt([](auto& b) { b.clients.wrong = 1; }), "golden"));
  CHECK_FALSE(holds(spoilt([](auto& b) { b.clients.conversations = 0; }), "golden"));
  CHECK_FALSE(holds(spoilt([](auto& b) { b.clients.errors = 1; }), "errors"));
  CHECK_FALSE(holds(spoilt([](auto& b) { b.clients.reconnects = 1; }), "reconnects"));
  CHECK_FALSE(holds(spoilt([](auto& b) { b.leaks = {"process 7"}; }), "leaks"));
  CHECK_FALSE(holds(spoilt([](auto& b) { b.runs[0].problems = {"x"}; }), "runs"));
  CHECK_FALSE(holds(spoilt([](auto& b) { b.runs.clear(); }), "runs"));
  CHECK_FALSE(holds(spoilt([](auto& b) {
                      for (auto& i : b.runs[0].injections)
                        i.note = "nobody there";
                    }),
                    "faults"));
  CHECK_FALSE(holds(spoilt([](auto& b) { b.problems = {"x"}; }), "drill"));
}

TEST_CASE("the verdict finds growth of processes") {
  auto o = one_drill();
  // A frontend that warms up for a minute and then stays as it is, and the whole cluster.
  process_series s{"frontend", 7, {}, {}}, all{"all processes together", 0, {}, {}};
  for (int i = 0; i < 100; ++i) {
    s.private_kib.push_back(std::min(i, 50) * 2'000.0 + i);
    s.fds.push_back(50 + std::min(i, 30));
  }
  for (int i = 0; i < 100; ++i) {
    all.private_kib.push_back(400'000 + 10'000 * std::min(i, 50) + 10 * i);
    all.fds.push_back(500);
  }
  const auto judged = [&](auto&& change) {
    o.processes = {all, s};
    change(o.processes);
    return holds(judge(o), "flat");
  };
  CHECK(judged([](auto&) {}));
  CHECK_FALSE(judged([](auto& p) {
    for (std::size_t i = 0; i < 100; ++i)
      p[1].fds[i] = 50 + static_cast<double>(i);
  }));
  CHECK_FALSE(judged([](auto& p) {
    for (std::size_t i = 0; i < 100; ++i)
      p[1].private_kib[i] = 100'000 + 2'000 * static_cast<double>(i);
  }));
  CHECK_FALSE(judged([](auto& p) {
    for (std::size_t i = 0; i < 100; ++i)
      p[0].private_kib[i] = 400'000 + 8'000 * static_cast<double>(i);
  }));
  CHECK_FALSE(judged([](auto& p) {
    for (std::size_t i = 0; i < 100; ++i)
      p[0].fds[i] = 500 + 5 * static_cast<double>(i);
  }));
  // A process of an age at which it still warms up says nothing.
  CHECK(judged([](auto& p) {
    p[1].private_kib.resize(70);
    p[1].fds.resize(70);
    for (std::size_t i = 0; i < 70; ++i)
      p[1].private_kib[i] = 100'000 + 2'000 * static_cast<double>(i);
  }));
}

TEST_CASE("rows gather the figures of one kind of fault") {
  auto o = one_drill();
  o.runs.push_back(o.runs[0]);
  o.runs[1].problems = {"x"};
  o.runs[1].injections[1].note = "nobody there";
  auto rows = fault_rows(o);
  REQUIRE(rows.size() == 2);
  CHECK(rows[0].runs == 2);
  CHECK(rows[0].ok == 1);
  CHECK(rows[1].runs == 1);
  CHECK(rows[1].skipped == 1);
  CHECK(rows[0].detect == std::vector<double>{10, 10});
}

TEST_CASE("reports say what happened") {
  auto o = one_drill();
  auto findings = judge(o);
  auto json = to_json(o, findings);
  CHECK(json["ok"] == true);
  CHECK(json["faults"].size() == 2);
  CHECK(json["faults"][0]["detect_ms"]["median"] == 10.0);
  CHECK(json["runs"][0]["faults"][0]["at_ms"] == 200.0);
  CHECK(json["replay"] == o.replay);
  auto text = to_text(o, findings);
  CHECK_THAT(text, Catch::Contains("kill node-0/worker-1") && !Catch::Contains("run it again"));
  o.clients.lost = 2;
  CHECK_THAT(to_text(o, judge(o)),
             Catch::Contains("FAILED lost") && Catch::Contains("run it again with:  " + o.replay));
  CHECK(to_row(o, judge(o)).size() == row_heads.size());
}

TEST_CASE("the page needs nothing else and is well formed") {
  auto o = one_drill();
  auto page = to_html({o, o}, {judge(o), judge(o)});
  CHECK_THAT(page,
             Catch::Contains("<svg") && Catch::Contains("&lt;stage&gt; &amp; &quot;killed&quot;"));
  CHECK_THAT(page, !Catch::Contains("http://") && !Catch::Contains("https://")
                     && !Catch::Contains("<script") && !Catch::Contains("src=")
                     && !Catch::Contains("nan") && !Catch::Contains("inf\""));
  for (auto tag : {"svg", "table", "tr", "td", "th", "g", "p", "h2", "text"}) {
    INFO(tag);
    const auto count = [&](const std::string& what) {
      std::size_t n = 0;
      for (auto at = page.find(what); at != std::string::npos; at = page.find(what, at + 1))
        ++n;
      return n;
    };
    auto name = std::string(tag);
    CHECK(count("<" + name + ">") + count("<" + name + " ") == count("</" + name + ">"));
  }
  // A drill without a single run has a page, too.
  CHECK_THAT(to_html({drill_outcome{}}, {judge(drill_outcome{})}), Catch::Contains("FAILED"));
}
