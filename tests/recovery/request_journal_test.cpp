#include "troupe/recovery/request_journal.hpp"

#include "troupe/base/fault_point.hpp"

#include "temporary_directory.hpp"

#include <catch2/catch.hpp>

#include <chrono>
#include <cstdlib>
#include <fstream>
#include <map>
#include <random>
#include <sstream>

#include <fmt/format.h>

using namespace troupe;
using namespace troupe::schedule;
using recovery::request_journal;
using testing::temporary_directory;

namespace {

std::filesystem::path journal_in(const temporary_directory& dir) {
  return dir.path() / "requests.journal";
}

std::string state_of(const request_log& log) {
  std::vector<std::string> records;
  log.write_snapshot(records);
  std::string all;
  for (const auto& record : records)
    all += record;
  return all;
}

/// Random calls as a frontend has them: accepted, fed, failed, given up.
class random_frontend {
public:
  explicit random_frontend(unsigned seed) : random_(seed) {}

  /// One message's worth of changes, without `flush`.
  void act(request_journal& j) {
    ++now_;
    const auto kind = random_() % 10;
    if (kind < 2 || j.log().calls().empty())
      return accept(j);
    const auto& calls = j.log().calls();
    auto which = calls.begin();
    std::advance(which, static_cast<std::ptrdiff_t>(random_() % calls.size()));
    const auto id = which->first;
    const auto choice = static_cast<std::uint32_t>(random_() % which->second.choices.size());
    if (kind == 2)
      j.fail(id, error{error_code::unavailable, "cause", "cure", "origin"}, now_);
    else if (kind == 3)
      j.forget(id);
    else if (kind == 4)
      j.end_choice(which->second.what.first_request + choice, now_);
    else
      feed(j);
  }

  std::int64_t now() const { return now_; }

private:
  void accept(request_journal& j) {
    accepted_call call;
    call.id = ++last_;
    if (random_() % 2)
      call.key = fmt::format("key-{}", random_() % 4);
    call.chat = random_() % 2;
    call.body = std::string(random_() % 40, 'b');
    call.seed = random_();
    call.created_ms = now_;
    call.deadline_ms = now_ + 100;
    call.first_request = last_ << 8U;
    call.num_choices = 1 + random_() % 3;
    call.keeps_scores = random_() % 3 == 0;
    j.accept(std::move(call));
  }

  void feed(request_journal& j) {
    std::vector<token_event> events;
    for (const auto& [id, call] : j.log().calls())
      for (std::uint32_t c = 0; c < call.what.num_choices; ++c) {
        token_event event;
        event.request = call.what.first_request + c;
        event.token_index = static_cast<std::uint32_t>(call.choices[c].tokens.size());
        event.has_token = random_() % 20 != 0;
        event.token.token = static_cast<std::int32_t>(random_() % 1000);
        event.token.logprob = -static_cast<float>(random_() % 100);
        event.token.top_tokens.assign(random_() % 3, 4);
        event.token.top_logprobs.assign(random_() % 3, 0.5F);
        if (call.choices[c].tokens.empty() && call.what.keeps_scores)
          event.is_prompt = event.has_token && random_() % 2;
        if (!event.has_token || (!event.is_prompt && random_() % 15 == 0))
          event.finish = finish_reason::stop;
        events.push_back(event);
      }
    for (const auto& event : events)
      j.append(event, now_);
  }

  std::mt19937 random_;
  std::uint64_t last_ = 0;
  std::int64_t now_ = 1000;
};

std::string read_file(const std::filesystem::path& file) {
  std::ifstream in(file, std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

request_journal::options options_of(const temporary_directory& dir) {
  request_journal::options o;
  o.file = journal_in(dir);
  o.limits.retain_ms = 1'000'000;
  o.limits.max_retained = 5;
  return o;
}

/// Lets appends fail while it lives.
struct full_disk {
  std::filesystem::path file;
  faults::board rules;
  explicit full_disk(const temporary_directory& dir, faults::kind what = faults::kind::no_space)
    : file(dir.path() / "board"), rules(std::move(faults::board::create(file).value())) {
    ::setenv(faults::board::variable, rules.value().c_str(), 1);
    REQUIRE(faults::arm());
    faults::rule r;
    r.process = "*";
    r.where = faults::point::journal_write;
    r.what = what;
    REQUIRE(rules.add(r));
  }
  ~full_disk() {
    ::unsetenv(faults::board::variable);
    (void)faults::arm();
  }
};

} // namespace

TEST_CASE("a request journal cut at any byte gives a state that was once true") {
  for (unsigned seed = 1; seed <= 4; ++seed) {
    const temporary_directory dir;
    std::map<std::uint64_t, std::string> states; // by size of the file
    {
      request_journal j(options_of(dir), 0);
      random_frontend frontend(seed);
      states[std::filesystem::file_size(journal_in(dir))] = state_of(j.log());
      for (int i = 0; i < 120; ++i) {
        frontend.act(j);
        j.flush(frontend.now());
        states[std::filesystem::file_size(journal_in(dir))] = state_of(j.log());
      }
      CHECK(j.num_errors() == 0);
      CHECK(j.is_durable());
    }
    const auto bytes = read_file(journal_in(dir));
    CHECK(states.size() > 60);
    for (std::size_t cut = 0; cut <= bytes.size(); ++cut) {
      std::ofstream(journal_in(dir), std::ios::binary | std::ios::trunc) << bytes.substr(0, cut);
      const request_journal j(options_of(dir), 0);
      auto at = states.upper_bound(cut);
      const auto expected = at == states.begin() ? std::string{} : std::prev(at)->second;
      REQUIRE(state_of(j.log()) == expected);
      REQUIRE(j.is_durable());
    }
  }
}

TEST_CASE("a journal that is mostly about what is over becomes small again and says the same") {
  const temporary_directory dir;
  auto o = options_of(dir);
  o.compact_bytes = 10'000;
  request_journal j(o, 0);
  random_frontend frontend(17);
  std::uint64_t largest = 0;
  int num_rewrites = 0;
  for (int i = 0; i < 3000; ++i) {
    frontend.act(j);
    j.flush(frontend.now());
    const auto before = std::filesystem::file_size(journal_in(dir));
    const auto state = state_of(j.log());
    j.tick(frontend.now());
    const auto after = std::filesystem::file_size(journal_in(dir));
    REQUIRE(state_of(j.log()) == state);
    largest = std::max<std::uint64_t>(largest, before);
    if (after < before) {
      ++num_rewrites;
      REQUIRE(state_of(request_journal(o, 0).log()) == state);
    }
  }
  CHECK(num_rewrites > 3);
  CHECK(largest < 10'000 + 2 * j.log().bytes() + 60'000);
  CHECK(state_of(request_journal(o, 0).log()) == state_of(j.log()));
}

TEST_CASE("a full disk fails nobody, and the file is complete once there is room") {
  const auto what =
    GENERATE(faults::kind::no_space, faults::kind::io_error, faults::kind::short_write);
  const temporary_directory dir;
  request_journal j(options_of(dir), 0);
  random_frontend frontend(23);
  auto act = [&](int times) {
    for (int i = 0; i < times; ++i) {
      frontend.act(j);
      j.flush(frontend.now());
    }
  };
  act(50);
  const auto before = state_of(j.log());
  std::int64_t later = 0;
  {
    full_disk disk(dir, what);
    act(50);
    CHECK(j.num_errors() == 1); // then it waits
    CHECK_FALSE(j.is_durable());
    // Who dies now has the state before, not one with holes.
    CHECK(state_of(request_journal(options_of(dir), 0).log()) == before);
    later = frontend.now() + 2000;
    j.tick(later);
    CHECK(j.num_errors() == 2);
    j.tick(later + 10);
    CHECK(j.num_errors() == 2);
  }
  j.tick(later + 2000);
  CHECK(j.is_durable());
  CHECK(state_of(request_journal(options_of(dir), 0).log()) == state_of(j.log()));
  act(20);
  CHECK(state_of(request_journal(options_of(dir), 0).log()) == state_of(j.log()));
}

TEST_CASE("a journal whose directory is missing comes to be once it is there") {
  const temporary_directory dir;
  request_journal::options o;
  o.file = dir.path() / "later" / "requests.journal";
  request_journal j(o, 0);
  CHECK(j.num_errors() == 1);
  random_frontend frontend(29);
  frontend.act(j);
  j.flush(5);
  std::filesystem::create_directories(o.file.parent_path());
  j.tick(1500);
  CHECK(j.is_durable());
  CHECK(state_of(request_journal(o, 0).log()) == state_of(j.log()));
}

TEST_CASE("without a file a journal is memory, and a fresh one forgets what was there") {
  const temporary_directory dir;
  random_frontend frontend(31);
  request_journal memory({}, 0);
  frontend.act(memory);
  memory.flush(1);
  memory.tick(1);
  CHECK(memory.log().calls().size() == 1);
  CHECK(memory.num_errors() == 0);
  CHECK_FALSE(memory.is_durable());
  {
    request_journal j(options_of(dir), 0);
    frontend.act(j);
    j.flush(1);
  }
  auto o = options_of(dir);
  CHECK_FALSE(request_journal(o, 0).log().calls().empty());
  o.fresh = true;
  CHECK(request_journal(o, 0).log().calls().empty());
}

TEST_CASE("what a step's tokens cost", "[.benchmark]") {
  constexpr std::uint32_t num_calls = 48;
  constexpr std::uint32_t num_steps = 20'000;
  for (const bool with_file : {true, false}) {
    const temporary_directory dir;
    auto o = options_of(dir);
    if (!with_file)
      o.file.clear();
    request_journal j(o, 0);
    for (std::uint64_t id = 1; id <= num_calls; ++id) {
      accepted_call call;
      call.id = (std::uint64_t{1} << 40U) + id;
      call.first_request = call.id;
      j.accept(std::move(call));
    }
    const auto begin = std::chrono::steady_clock::now();
    for (std::uint32_t step = 0; step < num_steps; ++step) {
      for (std::uint64_t id = 1; id <= num_calls; ++id) {
        token_event event;
        event.request = (std::uint64_t{1} << 40U) + id;
        event.has_token = true;
        event.token_index = step;
        event.token.token = 1000;
        j.append(event, 1);
      }
      j.flush(1);
    }
    const std::chrono::duration<double, std::micro> taken =
      std::chrono::steady_clock::now() - begin;
    WARN((with_file ? "with" : "without")
         << " a file: " << taken.count() / num_steps << " us a step of " << num_calls << " tokens");
  }
}
