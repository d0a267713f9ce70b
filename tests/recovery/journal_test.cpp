#include "troupe/recovery/journal.hpp"

#include "troupe/base/fault_point.hpp"

#include "temporary_directory.hpp"

#include <catch2/catch.hpp>

#include <cstdlib>
#include <fstream>
#include <random>
#include <sstream>

using namespace troupe;
using recovery::journal;
using testing::temporary_directory;

namespace {

std::string read_file(const std::filesystem::path& file) {
  std::ifstream in(file, std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

void write_file(const std::filesystem::path& file, std::string_view bytes) {
  std::ofstream(file, std::ios::binary | std::ios::trunc) << bytes;
}

std::vector<std::string> records_of(const std::filesystem::path& file) {
  std::vector<std::string> records;
  REQUIRE(journal::open(file, records));
  return records;
}

/// A few records of different lengths, one of them empty and one of zeros.
std::vector<std::string> sample() {
  std::mt19937 random(7);
  std::vector<std::string> records{"one", "", std::string(5, '\0')};
  for (int i = 0; i < 5; ++i) {
    std::string record(random() % 60, '\0');
    for (auto& c : record)
      c = static_cast<char>(random());
    records.push_back(record);
  }
  return records;
}

/// Writes the sample; `ends[i]` is the size of the file with i records.
std::vector<std::uint64_t> write_sample(const std::filesystem::path& file) {
  std::vector<std::string> none;
  auto j = journal::open(file, none);
  REQUIRE(j);
  REQUIRE(none.empty());
  std::vector<std::uint64_t> ends{j->size()};
  for (const auto& record : sample()) {
    REQUIRE(j->append(record));
    ends.push_back(j->size());
  }
  return ends;
}

/// Makes appends to `name` fail while it lives.
struct faulty_disk {
  std::filesystem::path file;
  faults::board rules;
  std::size_t number = 0;

  faulty_disk(const temporary_directory& dir, faults::kind what, const std::string& name,
              std::uint32_t count)
    : file(dir.path() / "board"), rules(std::move(faults::board::create(file).value())) {
    ::setenv(faults::board::variable, rules.value().c_str(), 1);
    REQUIRE(faults::arm());
    faults::rule r;
    r.process = "*";
    r.peer = name;
    r.where = faults::point::journal_write;
    r.what = what;
    r.count = count;
    number = rules.add(r).value();
  }
  ~faulty_disk() {
    ::unsetenv(faults::board::variable);
    (void)faults::arm();
  }
};

} // namespace

TEST_CASE("a journal gives back what was appended, in order") {
  const temporary_directory dir;
  const auto file = dir.path() / "j";
  const auto ends = write_sample(file);
  CHECK(records_of(file) == sample());
  CHECK(std::filesystem::file_size(file) == ends.back());
  std::vector<std::string> records;
  auto j = journal::open(file, records);
  REQUIRE(j);
  REQUIRE(j->append("more"));
  auto expected_records = sample();
  expected_records.emplace_back("more");
  CHECK(records_of(file) == expected_records);
}

TEST_CASE("a journal cut at any byte gives the whole records before the cut and goes on") {
  const temporary_directory dir;
  const auto file = dir.path() / "j";
  const auto ends = write_sample(file);
  const auto bytes = read_file(file);
  REQUIRE(bytes.size() == ends.back());
  for (std::size_t cut = 0; cut <= bytes.size(); ++cut) {
    write_file(file, bytes.substr(0, cut));
    auto whole = sample();
    std::size_t count = 0;
    while (count + 1 < ends.size() && ends[count + 1] <= cut)
      ++count;
    whole.resize(count);
    std::vector<std::string> records;
    auto j = journal::open(file, records);
    REQUIRE(j);
    REQUIRE(records == whole);
    REQUIRE(j->size() == ends[count]);
    REQUIRE(j->append("after"));
    whole.emplace_back("after");
    REQUIRE(records_of(file) == whole);
    REQUIRE(std::filesystem::file_size(file) == j->size());
  }
  CHECK_FALSE(std::filesystem::exists(dir.path() / "j.damaged"));
}

TEST_CASE("a flipped byte ends a journal before the record that it is in") {
  const temporary_directory dir;
  const auto file = dir.path() / "j";
  const auto ends = write_sample(file);
  const auto bytes = read_file(file);
  for (std::size_t at = 0; at < bytes.size(); ++at) {
    for (const int flip : {0x01, 0x80, 0xff}) {
      auto damaged = bytes;
      damaged[at] = static_cast<char>(damaged[at] ^ flip);
      write_file(file, damaged);
      auto whole = sample();
      std::size_t count = 0;
      while (count + 1 < ends.size() && ends[count + 1] <= at)
        ++count;
      whole.resize(count);
      std::vector<std::string> records;
      auto j = journal::open(file, records);
      REQUIRE(j);
      REQUIRE(records == whole);
      const bool in_header = at < ends.front();
      REQUIRE(std::filesystem::exists(dir.path() / "j.damaged") == in_header);
      if (in_header)
        REQUIRE(read_file(dir.path() / "j.damaged") == damaged);
      REQUIRE(j->append("after"));
      whole.emplace_back("after");
      REQUIRE(records_of(file) == whole);
      std::filesystem::remove(dir.path() / "j.damaged");
    }
  }
}

TEST_CASE("an append that fails leaves the journal as it was, and the next one works") {
  const temporary_directory dir;
  const auto file = dir.path() / "j";
  const auto ends = write_sample(file);
  const auto what =
    GENERATE(faults::kind::no_space, faults::kind::io_error, faults::kind::short_write);
  std::vector<std::string> records;
  auto j = journal::open(file, records);
  REQUIRE(j);
  {
    faulty_disk faulty(dir, what, "j", 2);
    for (int i = 0; i < 2; ++i) {
      const auto failed = j->append("does not fit");
      REQUIRE_FALSE(failed);
      CHECK(failed.error().code == error_code::io_failed);
      CHECK(failed.error().cause.find(what == faults::kind::io_error ? "Input/output error"
                                                                     : "No space left")
            != std::string::npos);
      CHECK(std::filesystem::file_size(file) == ends.back());
    }
    CHECK(faulty.rules.num_hits(faulty.number) == 2);
    REQUIRE(j->append("fits again"));
  }
  auto whole = sample();
  whole.emplace_back("fits again");
  CHECK(records_of(file) == whole);
}

TEST_CASE("what a dying writer left is cut off before the next append") {
  const temporary_directory dir;
  const auto file = dir.path() / "j";
  const auto ends = write_sample(file);
  std::ofstream(file, std::ios::binary | std::ios::app) << "half a fra";
  std::vector<std::string> records;
  auto j = journal::open(file, records);
  REQUIRE(j);
  CHECK(j->size() == ends.back());
  CHECK(std::filesystem::file_size(file) == ends.back() + 10);
  faulty_disk faulty(dir, faults::kind::short_write, "j", 1);
  REQUIRE_FALSE(j->append(std::string(100, 'x')));
  CHECK(std::filesystem::file_size(file) == ends.back());
  REQUIRE(j->append("x"));
  CHECK(records_of(file).size() == sample().size() + 1);
}

TEST_CASE("a rule for another file does not touch a journal") {
  const temporary_directory dir;
  std::vector<std::string> records;
  auto j = journal::open(dir.path() / "j", records);
  REQUIRE(j);
  faulty_disk faulty(dir, faults::kind::no_space, "other", 0);
  CHECK(j->append("x"));
}

TEST_CASE("rewriting replaces the records at once or not at all") {
  const temporary_directory dir;
  const auto file = dir.path() / "j";
  write_sample(file);
  std::vector<std::string> records;
  auto j = journal::open(file, records);
  REQUIRE(j);
  const std::vector<std::string> fewer{"left", std::string(3'000'000, 'y'), "over"};
  {
    faulty_disk faulty(dir, faults::kind::short_write, "j", 1);
    CHECK_FALSE(j->rewrite(fewer));
    CHECK(records_of(file) == sample());
    REQUIRE(j->append("goes on"));
    CHECK(records_of(file).back() == "goes on");
  }
  REQUIRE(j->rewrite(fewer));
  CHECK(records_of(file) == fewer);
  REQUIRE(j->append("more"));
  CHECK(j->size() == std::filesystem::file_size(file));
  auto whole = fewer;
  whole.emplace_back("more");
  CHECK(records_of(file) == whole);
  CHECK_FALSE(std::filesystem::exists(dir.path() / "j.new"));
}

TEST_CASE("a record over the limit is refused") {
  const temporary_directory dir;
  std::vector<std::string> records;
  auto j = journal::open(dir.path() / "j", records);
  REQUIRE(j);
  const auto size = j->size();
  const auto refused = j->append(std::string(journal::max_record_bytes + 1, 'x'));
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == error_code::too_large);
  CHECK(j->size() == size);
}

TEST_CASE("a journal in a directory that is not there cannot be opened") {
  const temporary_directory dir;
  std::vector<std::string> records;
  const auto j = journal::open(dir.path() / "missing" / "j", records);
  REQUIRE_FALSE(j);
  CHECK(j.error().code == error_code::io_failed);
}
