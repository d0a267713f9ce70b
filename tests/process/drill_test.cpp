#include "harness.hpp"

#include <fstream>
#include <sstream>

#include <catch2/catch.hpp>

using namespace troupe::process_tests;

namespace {

struct drill_result {
  int code = -1;
  std::string output;
  json figures;
};

std::string read_file(const std::filesystem::path& file) {
  std::ifstream stream(file);
  std::ostringstream text;
  text << stream.rdbuf();
  return text.str();
}

/// Runs `troupe drill ARGUMENTS` to its end. Its clusters have runtime directories of their own.
drill_result drill(std::vector<std::string> arguments, const temporary_directory& work) {
  auto figures = work.path() / "figures.json";
  arguments.insert(arguments.begin(), "drill");
  arguments.insert(arguments.end(), {"--json", figures.string()});
  program command(troupe_program(), std::move(arguments), work.path(), work.path() / "drill.log");
  auto exit = command.wait(180s);
  drill_result result;
  result.output = command.output();
  INFO(result.output);
  REQUIRE(exit);
  result.code = exit->signalled ? 128 + exit->status : exit->status;
  result.figures = json::parse(read_file(figures), nullptr, false);
  return result;
}

std::string drill_file(const std::string& name) {
  return source_path("configs/drills/" + name + ".yaml").string();
}

std::filesystem::path write_drill(const temporary_directory& work, const std::string& rest) {
  auto file = work.path() / "own.yaml";
  std::ofstream(file) << "config: " << source_path("configs/local.yaml").string() << "\n" << rest;
  return file;
}

} // namespace

TEST_CASE("a drill kills a stage, and every answer is golden") {
  temporary_directory work;
  auto page = work.path() / "page.html";
  auto result =
    drill({drill_file("stage-killed"), "--runs", "3", "--streams", "12", "--report", page.string()},
          work);
  INFO(result.output);
  CHECK(result.code == 0);
  REQUIRE(result.figures.is_object());
  CHECK(result.figures["ok"] == true);
  CHECK(result.figures["runs"].size() == 3);
  CHECK(result.figures["clients"]["conversations"] > 12);
  CHECK(result.figures["faults"][0]["ok"] == 3);
  CHECK(result.figures["faults"][0]["longest_gap_ms"]["count"] == 3);
  CHECK(result.figures["leaks"].empty());
  CHECK_THAT(read_file(page), Catch::Contains("<svg"));
  CHECK_THAT(result.output, Catch::Contains("kill replica-0/stage-1"));
}

TEST_CASE("a process whose device failed ends by itself and is replaced") {
  temporary_directory work;
  // The drill's own checks say that nobody had to wait until its pulse was missed.
  auto result = drill({drill_file("device-error"), "--runs", "2", "--streams", "8"}, work);
  INFO(result.output);
  CHECK(result.code == 0);
  REQUIRE(result.figures.is_object());
  REQUIRE(result.figures["runs"].size() == 2);
  for (const auto& run : result.figures["runs"]) {
    REQUIRE(run["recoveries"].size() == 1);
    CHECK_THAT(run["recoveries"][0]["cause"].get<std::string>(),
               Catch::Contains("expert-group-0/copy-0: the device failed"));
  }
}

TEST_CASE("several drills in one call make one table") {
  temporary_directory work;
  auto result = drill({drill_file("same-worker-twice"), drill_file("expert-group-killed"), "--runs",
                       "1", "--streams", "8"},
                      work);
  INFO(result.output);
  CHECK(result.code == 0);
  REQUIRE(result.figures.is_object());
  REQUIRE(result.figures["drills"].size() == 2);
  CHECK(result.figures["drills"][0]["runs"][0]["faults"].size() == 2);
  CHECK(result.figures["drills"][0]["runs"][0]["recoveries"].size() >= 2);
}

TEST_CASE("a check that does not hold fails the drill and says how to repeat it") {
  temporary_directory work;
  auto file = write_drill(work, "events: [{at: 100ms, fault: kill, target: any worker}]\n"
                                "checks: {longest_gap_ms: 0.001}\n");
  auto result = drill({file.string(), "--streams", "4", "--seed", "5"}, work);
  INFO(result.output);
  CHECK(result.code == 1);
  CHECK(result.figures["ok"] == false);
  CHECK_THAT(result.output, Catch::Contains("a stream paused for") && Catch::Contains("FAILED runs")
                              && Catch::Contains("--seed 5 --runs 1"));
}

TEST_CASE("a fault that finds nobody fails the drill") {
  temporary_directory work;
  auto file = write_drill(work, "events: [{at: 100ms, fault: kill, target: any standby}]\n");
  auto result = drill({file.string(), "--streams", "2"}, work);
  INFO(result.output);
  CHECK(result.code == 1);
  CHECK_THAT(result.output, Catch::Contains("any standby: there is none now"));
}

TEST_CASE("random faults repeat for a seed") {
  temporary_directory work;
  const auto faults = [&] {
    auto result =
      drill({source_path("configs/local.yaml").string(), "--random", "3", "--minutes", "0.15",
             "--every", "1s", "--only", "kill-worker", "--only", "segv-worker", "--streams", "8"},
            work);
    INFO(result.output);
    CHECK(result.code == 0);
    REQUIRE(result.figures.is_object());
    std::vector<std::string> list;
    for (const auto& run : result.figures["runs"])
      for (const auto& fault : run["faults"])
        list.push_back(fault["fault"].get<std::string>() + fault["target"].get<std::string>());
    return list;
  };
  auto first = faults();
  CHECK(first.size() >= 6);
  CHECK(faults() == first);
}

TEST_CASE("a drill that cannot be run says why") {
  temporary_directory work;
  auto wrong =
    drill({write_drill(work, "events: [{at: 1s, fault: kil, target: a}]\n").string()}, work);
  CHECK(wrong.code == 1);
  CHECK_THAT(wrong.output, Catch::Contains("own.yaml:2:26: events[0].fault"));
  auto missing = drill({"no-such-drill"}, work);
  CHECK(missing.code == 1);
  CHECK_THAT(missing.output, Catch::Contains("no-such-drill") && Catch::Contains("--list"));
  auto config = drill(
    {write_drill(work, "set: [parallel.pipeline=99]\nevents: [{at: 1s, fault: kill, target: a}]\n")
       .string()},
    work);
  CHECK(config.code == 1);
}
