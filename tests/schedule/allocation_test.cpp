#include "troupe/schedule/replica_scheduler.hpp"

#include <catch2/catch.hpp>

#include <cstdlib>
#include <new>

// Sanitizers bring their own allocator and watch over pairs of new and delete.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)

namespace {

std::size_t num_allocations = 0;

} // namespace

void* operator new(std::size_t size) {
  ++num_allocations;
  if (auto* p = std::malloc(size))
    return p;
  throw std::bad_alloc{};
}

void operator delete(void* p) noexcept {
  std::free(p);
}

void operator delete(void* p, std::size_t) noexcept {
  std::free(p);
}

namespace troupe::schedule {
namespace {

TEST_CASE("a step takes its memory from earlier steps") {
  limits l;
  l.num_pages = 100'000;
  l.max_in_flight = 3;
  l.max_decoding = 3;
  l.max_context = 4096;
  replica_scheduler s{l};
  for (request_id id = 1; id <= 300; ++id) {
    request r;
    r.id = id;
    r.prompt.assign(10, 1);
    r.max_tokens = 4000;
    REQUIRE(s.submit(std::move(r)));
  }
  std::vector<std::pair<std::uint64_t, std::size_t>> steps; // and their outputs
  steps.reserve(l.max_in_flight);
  const std::vector<output_token> answers(l.max_batch_sequences);
  std::vector<token_event> events;
  std::uint64_t num_tokens = 0;
  const auto round = [&] {
    while (const auto* batch = s.next())
      steps.emplace_back(batch->step, batch->outputs.size());
    for (auto [step, count] : steps)
      if (!s.complete(step, std::span(answers).first(count)))
        FAIL("an answer for every output is refused");
    steps.clear();
    s.take_events(events);
    num_tokens += events.size();
  };
  for (int i = 0; i < 600; ++i)
    round();
  num_allocations = 0;
  num_tokens = 0;
  for (int i = 0; i < 400; ++i)
    round();
  CHECK(num_tokens == 400 * 300);
  // Logs and block tables double now and then; nothing else grows.
  CHECK(num_allocations < num_tokens / 100);
}

} // namespace
} // namespace troupe::schedule

#endif
