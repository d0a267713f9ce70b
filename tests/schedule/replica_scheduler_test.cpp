#include "troupe/schedule/replica_scheduler.hpp"

#include <catch2/catch.hpp>

#include <algorithm>
#include <limits>
#include <map>

namespace troupe::schedule {
namespace {

request make_request(request_id id, std::size_t prompt_length, std::uint32_t max_tokens = 4) {
  request r;
  r.id = id;
  for (std::size_t i = 0; i < prompt_length; ++i)
    r.prompt.push_back(static_cast<std::int32_t>(100 * id + i));
  r.max_tokens = max_tokens;
  return r;
}

/// Limits where nothing is scarce.
limits roomy() {
  limits l;
  l.num_pages = 1000;
  l.page_tokens = 4;
  l.max_in_flight = 1;
  return l;
}

/// Answers `step`: drawn rows get `token`, scored rows their target.
void answer(replica_scheduler& s, const micro_batch& batch, std::int32_t token = 7) {
  std::vector<output_token> outputs;
  for (const auto& row : batch.outputs)
    outputs.push_back({.token = row.target >= 0 ? row.target : token,
                       .logprob = -1.0F,
                       .top_tokens = {},
                       .top_logprobs = {}});
  const auto step = batch.step;
  REQUIRE(s.complete(step, outputs));
}

std::vector<token_event> events_of(replica_scheduler& s) {
  std::vector<token_event> events;
  s.take_events(events);
  return events;
}

/// Request ids of the slices, in order.
std::vector<request_id> members(const micro_batch& batch) {
  std::vector<request_id> ids;
  for (const auto& slice : batch.sequences)
    ids.push_back(slice.request);
  return ids;
}

/// Submits one-token prompts and completes their prefill: ids first..last decode afterwards.
void start_decodes(replica_scheduler& s, request_id first, request_id last,
                   std::uint32_t max_tokens = 1000) {
  for (auto id = first; id <= last; ++id)
    REQUIRE(s.submit(make_request(id, 2, max_tokens)));
  std::vector<const micro_batch*> batches;
  while (const auto* batch = s.next())
    batches.push_back(batch);
  for (const auto* batch : batches)
    answer(s, *batch);
}

TEST_CASE("a request is computed chunk by chunk, then token by token") {
  auto l = roomy();
  l.prefill_chunk_tokens = 3;
  replica_scheduler s{l};
  auto r = make_request(1, 8, 3);
  r.num_logprobs = 2;
  r.draw.seed = 99;
  REQUIRE(s.submit(r));
  CHECK(s.count().num_queued == 1);

  const std::vector<std::vector<std::int32_t>> chunks{{100, 101, 102}, {103, 104, 105}, {106, 107}};
  std::uint64_t step = 0;
  std::uint32_t position = 0;
  for (const auto& chunk : chunks) {
    const auto* batch = s.next();
    REQUIRE(batch != nullptr);
    CHECK(batch->step == ++step);
    CHECK(batch->tokens == chunk);
    REQUIRE(batch->sequences.size() == 1);
    CHECK(batch->sequences[0].first_position == position);
    CHECK(batch->sequences[0].num_rows == chunk.size());
    position += static_cast<std::uint32_t>(chunk.size());
    CHECK(batch->sequences[0].pages.size() == (position + 3) / 4);
    CHECK(batch->outputs.size() == (position == 8 ? 1 : 0));
    CHECK(s.next() == nullptr);
    if (position == 8) {
      CHECK(batch->sequences[0].draw.seed == 99);
      CHECK(batch->outputs[0].row == 1);
      CHECK(batch->outputs[0].target == -1);
      CHECK(batch->outputs[0].num_logprobs == 2);
      CHECK(batch->outputs[0].position == 8);
    }
    answer(s, *batch, 40);
  }
  for (std::int32_t i = 0; i < 2; ++i) {
    const auto* batch = s.next();
    REQUIRE(batch != nullptr);
    CHECK(batch->tokens == std::vector<std::int32_t>{40 + i});
    CHECK(batch->sequences[0].first_position == static_cast<std::uint32_t>(8 + i));
    CHECK(batch->outputs[0].position == static_cast<std::uint32_t>(9 + i));
    answer(s, *batch, 41 + i);
  }
  CHECK(s.next() == nullptr);

  const auto events = events_of(s);
  REQUIRE(events.size() == 3);
  for (std::uint32_t i = 0; i < 3; ++i) {
    CHECK(events[i].request == 1);
    CHECK(events[i].has_token);
    CHECK_FALSE(events[i].is_prompt);
    CHECK(events[i].token_index == i);
    CHECK(events[i].token.token == static_cast<std::int32_t>(40 + i));
    CHECK(events[i].finish == (i == 2 ? finish_reason::length : finish_reason::none));
  }
  const auto c = s.count();
  CHECK(c.num_free_pages == 1000);
  CHECK(c.num_running == 0);
  CHECK(c.num_prompt_tokens == 8);
  CHECK(c.num_generated_tokens == 3);
  CHECK(events_of(s).empty());
}

TEST_CASE("submit refuses what cannot be served and says why") {
  auto l = roomy();
  l.max_context = 10;
  l.max_queued = 2;
  replica_scheduler s{l};
  CHECK(s.submit(make_request(1, 0)).error().code == error_code::invalid_request);

  const auto too_long = s.submit(make_request(2, 10));
  REQUIRE_FALSE(too_long);
  CHECK(too_long.error().code == error_code::invalid_request);
  CHECK_THAT(too_long.error().cause, Catch::Contains("request 2") && Catch::Contains("10"));

  REQUIRE(s.submit(make_request(3, 9)));
  CHECK(s.submit(make_request(3, 1)).error().code == error_code::invalid_request);
  REQUIRE(s.submit(make_request(4, 9)));
  CHECK(s.submit(make_request(5, 1)).error().code == error_code::overloaded);

  l = roomy();
  l.num_pages = 2;
  replica_scheduler few_pages{l};
  CHECK(few_pages.submit(make_request(1, 8)).error().code == error_code::invalid_request);
  CHECK(few_pages.submit(make_request(1, 7)));
}

TEST_CASE("a request ends with length at the context, at all pages and at max_tokens") {
  const auto [max_context, num_pages, max_tokens, expected] =
    GENERATE(table<std::uint32_t, std::uint32_t, std::uint32_t, std::size_t>(
      {{10, 100, std::numeric_limits<std::uint32_t>::max(), 5},
       {1000, 2, 99, 3},
       {1000, 100, 6, 6}}));
  auto l = roomy();
  l.max_context = max_context;
  l.num_pages = num_pages;
  replica_scheduler s{l};
  REQUIRE(s.submit(make_request(1, 5, max_tokens)));
  for (std::size_t i = 0; i < expected; ++i)
    answer(s, *s.next());
  CHECK(s.next() == nullptr);
  const auto events = events_of(s);
  REQUIRE(events.size() == expected);
  CHECK(events.back().finish == finish_reason::length);
}

TEST_CASE("stop tokens end a request and are banned before min_tokens") {
  replica_scheduler s{roomy()};
  auto r = make_request(1, 3, 10);
  r.stop_tokens = {5, 6};
  r.min_tokens = 2;
  REQUIRE(s.submit(r));
  for (std::uint32_t i = 0; i < 3; ++i) {
    const auto* batch = s.next();
    REQUIRE(batch != nullptr);
    CHECK(batch->outputs[0].ban_stop_tokens == (i < 2));
    CHECK(batch->sequences[0].stop_tokens.size() == (i < 2 ? 2 : 0));
    answer(s, *batch, i < 2 ? 9 : 6);
  }
  const auto events = events_of(s);
  REQUIRE(events.size() == 3);
  CHECK(events[1].finish == finish_reason::none);
  CHECK(events[2].finish == finish_reason::stop);
  CHECK(events[2].token.token == 6);
  CHECK(s.count().num_free_pages == 1000);
}

TEST_CASE("every prompt token but the first is scored, over chunks, before the first drawn one") {
  auto l = roomy();
  l.prefill_chunk_tokens = 2;
  replica_scheduler s{l};
  auto r = make_request(1, 5, 1);
  r.num_prompt_logprobs = 3;
  REQUIRE(s.submit(r));
  std::vector<std::pair<std::int32_t, std::int32_t>> rows; // row, target
  while (const auto* batch = s.next()) {
    for (const auto& row : batch->outputs) {
      rows.emplace_back(row.row, row.target);
      CHECK(row.num_logprobs == (row.target >= 0 ? 3 : 0));
    }
    answer(s, *batch, 8);
  }
  CHECK(rows
        == std::vector<std::pair<std::int32_t, std::int32_t>>{
          {0, 101}, {1, 102}, {0, 103}, {1, 104}, {0, -1}});
  const auto events = events_of(s);
  REQUIRE(events.size() == 5);
  for (std::uint32_t i = 0; i < 4; ++i) {
    CHECK(events[i].is_prompt);
    CHECK(events[i].token_index == i + 1);
    CHECK(events[i].token.token == static_cast<std::int32_t>(101 + i));
    CHECK(events[i].finish == finish_reason::none);
  }
  CHECK_FALSE(events[4].is_prompt);
  CHECK(events[4].token_index == 0);
  CHECK(events[4].token.token == 8);
}

TEST_CASE("max_tokens 0 scores the prompt without drawing, or ends at once") {
  auto l = roomy();
  l.max_context = 4;
  replica_scheduler s{l};
  auto r = make_request(1, 4, 0);
  r.num_prompt_logprobs = 0;
  REQUIRE(s.submit(r));
  const auto* batch = s.next();
  REQUIRE(batch != nullptr);
  CHECK(batch->tokens.size() == 3);
  CHECK(batch->outputs.size() == 3);
  answer(s, *batch);
  auto events = events_of(s);
  REQUIRE(events.size() == 4);
  CHECK(events[2].token_index == 3);
  CHECK_FALSE(events[3].has_token);
  CHECK(events[3].finish == finish_reason::length);
  CHECK(s.count().num_prompt_tokens == 4);

  REQUIRE(s.submit(make_request(2, 4, 0)));
  auto single = make_request(3, 1, 0);
  single.num_prompt_logprobs = 5;
  REQUIRE(s.submit(single));
  CHECK_FALSE(s.submit(make_request(4, 5, 0)));
  CHECK(s.next() == nullptr);
  events = events_of(s);
  REQUIRE(events.size() == 2);
  CHECK(events[0].request == 2);
  CHECK(events[1].request == 3);
  CHECK(events[1].finish == finish_reason::length);
  CHECK(s.count().num_queued == 0);
  CHECK(s.count().num_free_pages == 1000);
}

TEST_CASE("the limits of a micro-batch hold and decodes go first") {
  auto l = roomy();
  l.max_batch_tokens = 10;
  l.max_batch_sequences = 4;
  l.prefill_chunk_tokens = 6;
  replica_scheduler s{l};
  start_decodes(s, 1, 2);
  REQUIRE(s.submit(make_request(3, 20)));
  REQUIRE(s.submit(make_request(4, 20)));
  REQUIRE(s.submit(make_request(5, 20)));
  const auto* batch = s.next();
  REQUIRE(batch != nullptr);
  CHECK(members(*batch) == std::vector<request_id>{1, 2, 3, 4});
  CHECK(batch->sequences[2].num_rows == 6);
  CHECK(batch->sequences[3].num_rows == 2);
  CHECK(batch->tokens.size() == 10);
  CHECK(s.count().num_queued == 1);
}

TEST_CASE("sequences are spread evenly over the free slots") {
  auto l = roomy();
  l.max_in_flight = 3;
  l.max_decoding = 2;
  replica_scheduler s{l};
  const auto sizes = [&] {
    std::vector<std::size_t> n;
    while (const auto* batch = s.next())
      n.push_back(batch->sequences.size());
    return n;
  };
  start_decodes(s, 1, 7);
  // Decodes go in two micro-batches, the third slot is for prefills.
  CHECK(sizes() == std::vector<std::size_t>{4, 3});
  REQUIRE(s.submit(make_request(8, 2, 100)));
  CHECK(sizes() == std::vector<std::size_t>{1});

  // Prefills take all free slots. Once they decode, those that met in one part again.
  replica_scheduler other{l};
  start_decodes(other, 1, 1);
  const auto* lone = other.next();
  REQUIRE(lone != nullptr);
  for (request_id id = 2; id <= 6; ++id)
    REQUIRE(other.submit(make_request(id, 2, 100)));
  const auto* second = other.next();
  const auto* third = other.next();
  CHECK(second->sequences.size() == 3);
  CHECK(third->sequences.size() == 2);
  answer(other, *second);
  answer(other, *third);
  const auto* fourth = other.next();
  REQUIRE(fourth != nullptr);
  CHECK(fourth->sequences.size() == 3);
  CHECK(other.next() == nullptr); // a third of decodes would be one too many
  answer(other, *lone);
  fourth = other.next();
  REQUIRE(fourth != nullptr);
  CHECK(fourth->sequences.size() == 3);
  CHECK(other.count().num_in_flight == 2);
}

TEST_CASE("whoever has waited longest for a step goes first") {
  auto l = roomy();
  l.max_batch_sequences = 2;
  l.max_in_flight = 2;
  replica_scheduler s{l};
  start_decodes(s, 1, 4);
  std::map<request_id, int> steps;
  for (int i = 0; i < 40; ++i) {
    const auto* batch = s.next();
    REQUIRE(batch != nullptr);
    for (auto id : members(*batch))
      ++steps[id];
    answer(s, *batch);
  }
  for (request_id id = 1; id <= 4; ++id)
    CHECK(steps[id] == 20);
}

TEST_CASE("admission is in order, waits for pages and keeps a reserve for those that run") {
  auto l = roomy();
  l.num_pages = 6; // of 4 tokens
  l.max_in_flight = 2;
  replica_scheduler s{l};
  REQUIRE(s.submit(make_request(1, 12))); // 3 pages
  REQUIRE(s.submit(make_request(2, 16))); // 4 pages
  REQUIRE(s.submit(make_request(3, 4)));  // would fit, but does not overtake
  const auto* batch = s.next();
  REQUIRE(batch != nullptr);
  CHECK(members(*batch) == std::vector<request_id>{1});
  CHECK(s.next() == nullptr);
  CHECK(s.count().num_queued == 2);
  s.cancel(1);
  CHECK(s.next() == nullptr); // its pages are still written
  answer(s, *batch);
  batch = s.next();
  REQUIRE(batch != nullptr);
  CHECK(members(*batch) == std::vector<request_id>{2});
  // Two slots were free for two requests, so the third goes into the next one.
  batch = s.next();
  REQUIRE(batch != nullptr);
  CHECK(members(*batch) == std::vector<request_id>{3});

  for (std::uint32_t num_pages : {6, 7}) {
    l.num_pages = num_pages;
    replica_scheduler full{l};
    REQUIRE(full.submit(make_request(1, 12)));
    REQUIRE(full.submit(make_request(2, 12)));
    REQUIRE(full.next() != nullptr);
    CHECK((full.next() != nullptr) == (num_pages == 7));
  }
}

TEST_CASE("a prompt under way keeps its claim on the pages that it still needs") {
  auto l = roomy();
  l.num_pages = 6;
  l.prefill_chunk_tokens = 4;
  l.max_in_flight = 2;
  replica_scheduler s{l};
  REQUIRE(s.submit(make_request(1, 20))); // 5 pages in the end, 1 now
  REQUIRE(s.submit(make_request(2, 4)));
  const auto* batch = s.next();
  REQUIRE(batch != nullptr);
  CHECK(members(*batch) == std::vector<request_id>{1});
  CHECK(s.count().num_free_pages == 5);
  CHECK(s.next() == nullptr);
}

TEST_CASE("out of pages, the sequence admitted last starts over without repeating its events") {
  auto l = roomy();
  l.num_pages = 4;
  l.page_tokens = 2;
  replica_scheduler s{l};
  auto first = make_request(1, 2, 6);
  first.num_prompt_logprobs = 0;
  auto second = make_request(2, 2, 5);
  second.num_prompt_logprobs = 0;
  REQUIRE(s.submit(first));
  REQUIRE(s.submit(second));
  std::map<request_id, std::vector<std::pair<bool, std::uint32_t>>> seen;
  std::map<request_id, std::vector<std::int32_t>> last_tokens;
  std::int32_t token = 0;
  for (int i = 0; i < 100; ++i) {
    const auto* batch = s.next();
    if (batch == nullptr)
      break;
    std::size_t row = 0;
    for (const auto& slice : batch->sequences) {
      if (slice.first_position == 0)
        last_tokens[slice.request].assign(batch->tokens.begin() + row,
                                          batch->tokens.begin() + row + slice.num_rows);
      row += slice.num_rows;
    }
    answer(s, *batch, ++token);
    for (const auto& e : events_of(s))
      seen[e.request].emplace_back(e.is_prompt, e.token_index);
  }
  CHECK(s.count().num_preemptions == 1);
  const std::vector<std::pair<bool, std::uint32_t>> of_first{
    {true, 1}, {false, 0}, {false, 1}, {false, 2}, {false, 3}, {false, 4}, {false, 5}};
  const std::vector<std::pair<bool, std::uint32_t>> of_second{{true, 1},  {false, 0}, {false, 1},
                                                              {false, 2}, {false, 3}, {false, 4}};
  CHECK(seen[1] == of_first);
  CHECK(seen[2] == of_second);
  CHECK(last_tokens[1].size() == 2);
  CHECK(last_tokens[2].size() == 5); // the second time over what was generated, too
  CHECK(s.count().num_free_pages == 4);
}

TEST_CASE("pages of a cancelled request are free at once or when its micro-batch completes") {
  replica_scheduler s{roomy()};
  REQUIRE(s.submit(make_request(1, 10)));
  s.cancel(1); // queued
  CHECK(s.count().num_queued == 0);
  REQUIRE(s.submit(make_request(2, 10)));
  const auto* batch = s.next();
  REQUIRE(batch != nullptr);
  s.cancel(2); // in flight
  s.cancel(2);
  CHECK(s.count().num_free_pages == 997);
  CHECK(s.count().num_running == 0);
  auto events = events_of(s);
  REQUIRE(events.size() == 2);
  CHECK(events[0].request == 1);
  CHECK(events[1].request == 2);
  CHECK(events[1].finish == finish_reason::cancelled);
  CHECK_FALSE(events[1].has_token);
  answer(s, *batch);
  CHECK(s.count().num_free_pages == 1000);
  CHECK(events_of(s).empty());

  REQUIRE(s.submit(make_request(3, 10)));
  answer(s, *s.next());
  s.cancel(3); // between two steps
  CHECK(s.count().num_free_pages == 1000);
  s.cancel(77);
  events = events_of(s);
  REQUIRE(events.size() == 2);
  CHECK(events[1].finish == finish_reason::cancelled);
  CHECK(events[1].token_index == 1);
  CHECK(s.next() == nullptr);

  for (request_id id = 1; id <= 3; ++id)
    CHECK(s.submit(make_request(id, 1))); // nothing remembers the ids
}

TEST_CASE("complete ignores steps not in flight and refuses a wrong number of answers") {
  auto l = roomy();
  l.max_in_flight = 2;
  l.max_decoding = 2;
  replica_scheduler s{l};
  CHECK(s.oldest_step() == 1);
  start_decodes(s, 1, 2);
  (void)events_of(s);
  const auto* a = s.next();
  const auto* b = s.next();
  REQUIRE(a != nullptr);
  REQUIRE(b != nullptr);
  CHECK(s.in_flight() == std::vector<const micro_batch*>{a, b});
  CHECK(s.oldest_step() == a->step);
  const auto step = a->step;
  const std::vector<output_token> one(1);
  const std::vector<output_token> two(2);
  CHECK(s.complete(step, two).error().code == error_code::internal);
  CHECK(s.in_flight().size() == 2);
  CHECK(s.complete(step + 10, one));
  CHECK(s.complete(0, one));
  CHECK(events_of(s).empty());
  CHECK(s.complete(step, one));
  CHECK(s.complete(step, one));
  CHECK(events_of(s).size() == 1);
  CHECK(s.oldest_step() == b->step);
  CHECK(s.in_flight() == std::vector<const micro_batch*>{b});
}

TEST_CASE("requests past their deadline fail, the others go on") {
  replica_scheduler s{roomy()};
  const time_point start{};
  for (request_id id = 1; id <= 3; ++id) {
    auto r = make_request(id, 2, 100);
    r.deadline = start + std::chrono::seconds(id);
    REQUIRE(s.submit(r));
  }
  const auto* batch = s.next();
  REQUIRE(batch != nullptr);
  s.expire(start + std::chrono::seconds(1));
  CHECK(events_of(s).empty());
  s.expire(start + std::chrono::milliseconds(2500));
  const auto events = events_of(s);
  REQUIRE(events.size() == 2);
  CHECK(events[0].request == 1);
  CHECK(events[1].request == 2);
  CHECK(events[1].finish == finish_reason::failed);
  answer(s, *batch);
  batch = s.next();
  REQUIRE(batch != nullptr);
  CHECK(members(*batch) == std::vector<request_id>{3});
}

TEST_CASE("fail_all ends every request, forgets its steps and leaves a usable scheduler") {
  auto l = roomy();
  l.max_in_flight = 2;
  l.max_batch_sequences = 2;
  replica_scheduler s{l};
  start_decodes(s, 1, 3);
  REQUIRE(s.submit(make_request(4, 5)));
  const auto* batch = s.next();
  REQUIRE(batch != nullptr);
  const auto step = batch->step;
  s.cancel(batch->sequences[0].request);
  (void)events_of(s);
  s.fail_all();
  std::vector<request_id> failed;
  for (const auto& e : events_of(s)) {
    CHECK(e.finish == finish_reason::failed);
    failed.push_back(e.request);
  }
  std::sort(failed.begin(), failed.end());
  CHECK(failed == std::vector<request_id>{2, 3, 4});
  CHECK(s.count().num_free_pages == 1000);
  CHECK(s.count().num_in_flight == 0);
  CHECK(s.count().num_running == 0);
  CHECK(s.count().num_queued == 0);
  CHECK(s.complete(step, std::vector<output_token>(1)));
  CHECK(events_of(s).empty());

  REQUIRE(s.submit(make_request(5, 3, 1)));
  batch = s.next();
  REQUIRE(batch != nullptr);
  CHECK(batch->step > step);
  answer(s, *batch);
  CHECK(events_of(s).back().finish == finish_reason::length);
}

TEST_CASE("answers carry their log-probabilities into the events") {
  replica_scheduler s{roomy()};
  auto r = make_request(1, 2, 1);
  r.num_logprobs = 2;
  REQUIRE(s.submit(r));
  const auto* batch = s.next();
  REQUIRE(batch != nullptr);
  const std::vector<output_token> outputs{
    {.token = 3, .logprob = -0.5F, .top_tokens = {3, 9}, .top_logprobs = {-0.5F, -1.5F}}};
  REQUIRE(s.complete(batch->step, outputs));
  const auto events = events_of(s);
  REQUIRE(events.size() == 1);
  CHECK(events[0].token.logprob == -0.5F);
  CHECK(events[0].token.top_tokens == std::vector<std::int32_t>{3, 9});
  CHECK(events[0].token.top_logprobs == std::vector<float>{-0.5F, -1.5F});
}

TEST_CASE("a step that cannot be computed ends its requests and nobody else's") {
  auto l = roomy();
  l.max_in_flight = 2;
  l.max_batch_sequences = 1;
  replica_scheduler s{l};
  REQUIRE(s.submit(make_request(1, 2)));
  REQUIRE(s.submit(make_request(2, 2)));
  const auto first = s.next()->step;
  const auto* second = s.next();
  REQUIRE(second != nullptr);
  s.fail_step(first);
  s.fail_step(first); // once
  const auto events = events_of(s);
  REQUIRE(events.size() == 1);
  CHECK(events[0].request == 1);
  CHECK(events[0].finish == finish_reason::failed);
  answer(s, *second);
  REQUIRE(events_of(s).size() == 1);
  CHECK(s.oldest_step() > second->step);
  CHECK(s.count().num_free_pages == l.num_pages - 1);
}

TEST_CASE("behind a fence, pages that a step in flight writes to rest, others do not") {
  auto l = roomy();
  l.num_pages = 4;
  l.page_tokens = 2;
  replica_scheduler s{l};
  const time_point begin{};
  REQUIRE(s.submit(make_request(1, 2, 2))); // two pages in the end
  REQUIRE(s.submit(make_request(2, 2, 5))); // three
  answer(s, *s.next());
  const auto* batch = s.next();
  REQUIRE(members(*batch) == std::vector<request_id>{1, 2});
  std::vector<std::int32_t> of_first = batch->sequences[0].pages; // written to: the second
  REQUIRE(of_first.size() == 2);
  s.fence(begin + fence_time);
  s.fence(begin + fence_time / 2); // of an earlier one
  answer(s, *batch);               // of the new epoch: the first request ends
  CHECK(s.count().num_free_pages == 2);
  answer(s, *s.next()); // the second has room in its own page
  batch = s.next();
  REQUIRE(batch != nullptr);
  CHECK(members(*batch) == std::vector<request_id>{2});
  CHECK(batch->sequences[0].pages.back() == of_first[0]);
  answer(s, *batch);
  REQUIRE(s.submit(make_request(3, 2, 1)));
  const auto is_third_in = [&](const micro_batch* made) {
    const auto in = made == nullptr ? std::vector<request_id>{} : members(*made);
    return std::count(in.begin(), in.end(), 3) > 0;
  };
  s.end_fence(begin + fence_time - std::chrono::milliseconds(1));
  batch = s.next();
  CHECK_FALSE(is_third_in(batch));
  CHECK(s.count().num_preemptions == 0);
  answer(s, *batch); // the second request ends
  s.end_fence(begin + fence_time);
  batch = s.next();
  CHECK(is_third_in(batch));
}

TEST_CASE("where it is not known what is in flight, no page is handed out behind a fence") {
  replica_scheduler s{roomy()};
  const time_point begin{};
  s.fence_all(begin + fence_time);
  REQUIRE(s.submit(make_request(1, 2, 1)));
  CHECK(s.next() == nullptr);
  s.end_fence(begin + fence_time - std::chrono::milliseconds(1));
  CHECK(s.next() == nullptr);
  CHECK(s.count().num_free_pages == 1000);
  s.end_fence(begin + fence_time);
  CHECK(s.next() != nullptr);
}

TEST_CASE("lost KV is computed again from the token logs, without a second event") {
  auto l = roomy();
  l.max_in_flight = 2;
  l.max_batch_sequences = 2;
  replica_scheduler s{l};
  start_decodes(s, 1, 3);
  events_of(s);
  const auto* batch = s.next();
  REQUIRE(batch != nullptr);
  const auto lost_step = batch->step;
  s.cancel(members(*batch).front());
  events_of(s);
  s.forget_kv();
  CHECK(s.in_flight().empty());
  CHECK(s.count().num_free_pages == l.num_pages);
  CHECK(s.count().num_queued == 2);
  REQUIRE(s.complete(lost_step, {})); // comes too late: ignored
  CHECK(events_of(s).empty());

  batch = s.next();
  REQUIRE(batch != nullptr);
  CHECK(batch->step > lost_step);
  const auto id = members(*batch).front();
  CHECK(batch->sequences[0].first_position == 0);
  const auto first = static_cast<std::int32_t>(100 * id);
  CHECK(std::vector<std::int32_t>(batch->tokens.begin(), batch->tokens.begin() + 3)
        == std::vector<std::int32_t>{first, first + 1, 7});
  answer(s, *batch, 8);
  const auto events = events_of(s);
  REQUIRE_FALSE(events.empty());
  CHECK(events[0].token_index == 1); // goes on where it was
}

TEST_CASE("after a loss of KV those with the fewest positions to compute go first") {
  auto l = roomy();
  l.max_batch_sequences = 2;
  l.max_in_flight = 3;
  replica_scheduler s(l);
  REQUIRE(s.submit(make_request(1, 30)));
  REQUIRE(s.submit(make_request(2, 5)));
  REQUIRE(s.submit(make_request(3, 12)));
  REQUIRE(s.submit(make_request(4, 5)));
  REQUIRE(s.submit(make_request(5, 1)));
  REQUIRE(s.submit(make_request(6, 2)));
  const micro_batch* batch = nullptr;
  while ((batch = s.next()) != nullptr) {
  }
  REQUIRE(s.submit(make_request(7, 1))); // never admitted: behind those that were
  REQUIRE(s.count().num_running == 6);
  s.forget_kv();
  std::vector<request_id> order;
  while ((batch = s.next()) != nullptr)
    for (auto id : members(*batch))
      order.push_back(id);
  CHECK(order == std::vector<request_id>{5, 6, 2, 4, 3, 1});
}

} // namespace
} // namespace troupe::schedule
