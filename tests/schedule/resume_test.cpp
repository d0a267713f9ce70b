#include "fake_model.hpp"
#include "troupe/schedule/replica_scheduler.hpp"

#include <catch2/catch.hpp>

#include <random>

namespace troupe::schedule {
namespace {

limits small_limits(std::uint32_t prefill_chunk) {
  limits l;
  l.num_pages = 20;
  l.page_tokens = 4;
  l.max_batch_tokens = 16;
  l.max_batch_sequences = 4;
  l.prefill_chunk_tokens = prefill_chunk;
  l.max_in_flight = 2;
  l.max_queued = 4;
  l.max_context = 48;
  return l;
}

request random_request(std::mt19937& random, request_id id) {
  request r;
  r.id = id;
  r.prompt.resize(1 + random() % 12);
  for (auto& token : r.prompt)
    token = static_cast<std::int32_t>(random() % kVocabulary);
  r.max_tokens = 1 + random() % 20;
  r.min_tokens = random() % 8;
  r.draw.seed = random();
  if (random() % 2)
    r.stop_tokens.push_back(static_cast<std::int32_t>(random() % kVocabulary));
  r.num_logprobs = static_cast<std::int32_t>(random() % 3) - 1;
  r.num_prompt_logprobs = static_cast<std::int32_t>(random() % 2) - 1;
  return r;
}

/// Every event of one request served alone to its end.
std::vector<token_event> serve(const limits& l, request r) {
  replica_scheduler s(l);
  fake_pipeline stages(l, 2);
  REQUIRE(s.submit(std::move(r)));
  std::vector<token_event> all;
  std::vector<token_event> some;
  for (int turns = 0; turns < 1000; ++turns) {
    s.take_events(some);
    all.insert(all.end(), some.begin(), some.end());
    const auto* batch = s.next();
    if (batch == nullptr)
      break;
    stages.send(batch);
    while (stages.finished() == nullptr)
      for (std::size_t i = 0; i < stages.num_stages(); ++i)
        stages.advance(i);
    const auto answers = stages.answers();
    const auto step = stages.finished()->step;
    stages.pop();
    REQUIRE(s.complete(step, answers));
  }
  CHECK(s.count().num_free_pages == l.num_pages);
  return all;
}

} // namespace

TEST_CASE("a request that goes on elsewhere after any of its tokens ends as if uninterrupted") {
  std::mt19937 random(3);
  int num_cuts = 0;
  for (request_id id = 1; id <= 200; ++id) {
    const auto l = small_limits(1 + random() % 9);
    const auto whole = random_request(random, id);
    const reference expected(whole, 48, 2);
    for (std::size_t cut = 0; cut < expected.generated.size(); ++cut, ++num_cuts) {
      auto rest = whole;
      rest.resumed = true;
      for (std::size_t i = 0; i < cut; ++i)
        rest.generated.push_back(expected.generated[i].token);
      const auto events = serve(l, rest);
      std::size_t index = cut;
      std::size_t num_scores = 0;
      for (const auto& event : events) {
        if (event.is_prompt) {
          ++num_scores;
          continue;
        }
        REQUIRE(index < expected.generated.size());
        CHECK(event.token_index == index);
        CHECK(event.token.token == expected.generated[index].token);
        CHECK(event.token.logprob == expected.generated[index].logprob);
        const bool last = ++index == expected.generated.size();
        CHECK(event.finish == (last ? expected.finish : finish_reason::none));
      }
      CHECK(index == expected.generated.size());
      // Scores of the prompt come before the first token; with one, they are known already.
      CHECK(num_scores == (cut == 0 ? expected.scores.size() : 0));
    }
  }
  CHECK(num_cuts > 1000);
}

TEST_CASE("a request whose last token was there already ends without another one") {
  std::mt19937 random(5);
  auto r = random_request(random, 1);
  r.stop_tokens.clear();
  r.num_prompt_logprobs = -1;
  r.max_tokens = 3;
  r.generated = {1, 2, 3};
  const auto events = serve(small_limits(4), r);
  REQUIRE(events.size() == 1);
  CHECK(events.front().finish == finish_reason::length);
  CHECK_FALSE(events.front().has_token);
  CHECK(events.front().token_index == 3);
}

TEST_CASE("requests that go on are not turned away by a full queue") {
  replica_scheduler s(small_limits(4));
  std::mt19937 random(9);
  request_id id = 0;
  for (; id < 4; ++id)
    REQUIRE(s.submit(random_request(random, id)));
  CHECK(s.submit(random_request(random, ++id)).error().code == error_code::overloaded);
  auto r = random_request(random, ++id);
  r.resumed = true;
  CHECK(s.submit(r));
  CHECK(s.count().num_queued == 5);
}

} // namespace troupe::schedule
