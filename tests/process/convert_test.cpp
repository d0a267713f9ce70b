#include "harness.hpp"

#include <csignal>
#include <fstream>
#include <map>

#include <catch2/catch.hpp>

using namespace troupe::process_tests;
namespace fs = std::filesystem;

namespace {

std::map<std::string, std::string> contents(const fs::path& directory) {
  std::map<std::string, std::string> result;
  for (const auto& entry : fs::directory_iterator(directory)) {
    std::ifstream in(entry.path(), std::ios::binary);
    result[entry.path().filename().string()] = {std::istreambuf_iterator<char>(in), {}};
  }
  return result;
}

/// `troupe convert` of the demo model in shards of a megabyte.
std::vector<std::string> arguments(const fs::path& target) {
  return {"convert",
          source_path("configs/models/troupe-mini").string(),
          target.string(),
          "--format",
          "int4",
          "--group-size",
          "64",
          "--stages",
          "2",
          "--expert-groups",
          "2",
          "--shard-mb",
          "1",
          "--threads",
          "2"};
}

/// Each run has a log of its own.
fs::path new_log(const temporary_directory& scratch) {
  static int count = 0;
  return scratch.path() / ("log-" + std::to_string(++count));
}

std::string run_to_the_end(const fs::path& target, const temporary_directory& scratch) {
  program convert(troupe_program(), arguments(target), scratch.path(), new_log(scratch));
  const auto exit = convert.wait(120s);
  INFO(convert.output());
  REQUIRE(exit);
  REQUIRE_FALSE(exit->signalled);
  REQUIRE(exit->status == 0);
  return convert.output();
}

std::size_t num_shards_in(const std::string& output) {
  std::size_t count = 0;
  for (auto at = output.find(" is written,"); at != std::string::npos;
       at = output.find(" is written,", at + 1))
    ++count;
  return count;
}

} // namespace

TEST_CASE("a conversion killed again and again ends with the bytes of an undisturbed one") {
  const temporary_directory scratch;
  const auto straight = scratch.path() / "straight";
  run_to_the_end(straight, scratch);
  const auto want = contents(straight);

  const auto target = scratch.path() / "disturbed";
  std::size_t num_kills = 0;
  for (int tries = 0; num_kills < 3; ++tries) {
    REQUIRE(tries < 30);
    program convert(troupe_program(), arguments(target), scratch.path(), new_log(scratch));
    // Somewhere in the shard behind the one that it reports, or before the first.
    REQUIRE(eventually(
      [&] { return fs::exists(target) && num_shards_in(convert.output()) >= num_kills; }, 60s));
    convert.signal(SIGKILL);
    const auto exit = convert.wait(10s);
    REQUIRE(exit);
    if (!exit->signalled) { // it was faster: once more from the start
      fs::remove_all(target);
      num_kills = 0;
      continue;
    }
    ++num_kills;
    CHECK_FALSE(fs::exists(target / "config.json"));
  }
  const auto output = run_to_the_end(target, scratch);
  CHECK_THAT(output, Catch::Contains("of an earlier run stayed as they were"));
  const auto got = contents(target);
  CHECK(got == want);
}

TEST_CASE("a conversion that cannot write says so, and goes on where there is space again") {
  const temporary_directory scratch;
  const auto target = scratch.path() / "converted";
  // Files of at most 400 KB, which stand for a disk that is full.
  std::string command = "trap '' XFSZ; ulimit -f 800; exec \"$0\" \"$@\"";
  std::vector<std::string> limited{"-c", command, troupe_program()};
  for (const auto& one : arguments(target))
    limited.push_back(one);
  program convert("/bin/sh", limited, scratch.path(), new_log(scratch));
  const auto exit = convert.wait(60s);
  REQUIRE(exit);
  CHECK_FALSE(exit->signalled);
  CHECK(exit->status == 1);
  CHECK_THAT(convert.output(), Catch::Contains("cannot be written: File too large")
                                 && Catch::Contains("give the same command again"));
  CHECK_FALSE(fs::exists(target / "config.json"));
  for (const auto& [file, bytes] : contents(target))
    CHECK_FALSE(file.ends_with(".partial"));
  run_to_the_end(target, scratch);
  const auto straight = scratch.path() / "straight";
  run_to_the_end(straight, scratch);
  const auto want = contents(straight);
  const auto got = contents(target);
  CHECK(got == want);
}
