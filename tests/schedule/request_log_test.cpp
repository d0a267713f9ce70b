#include "troupe/schedule/request_log.hpp"

#include "troupe/schedule/record_codec.hpp"

#include <catch2/catch.hpp>

#include <limits>
#include <random>

namespace troupe::schedule {
namespace {

accepted_call call_of(std::uint64_t id, std::string key = {}, std::uint32_t num_choices = 1) {
  accepted_call call;
  call.id = id;
  call.key = std::move(key);
  call.body = "{\"prompt\":[1,2]}";
  call.created_ms = 1'700'000'000'000;
  call.deadline_ms = call.created_ms + 5000;
  call.first_request = id * 100;
  call.num_choices = num_choices;
  return call;
}

token_event token_of(request_id request, std::uint32_t index, std::int32_t token,
                     finish_reason finish = finish_reason::none) {
  token_event event;
  event.request = request;
  event.has_token = true;
  event.token_index = index;
  event.token.token = token;
  event.finish = finish;
  return event;
}

std::string state_of(const request_log& log) {
  std::vector<std::string> records;
  log.write_snapshot(records);
  std::string all;
  for (const auto& record : records)
    all += record;
  return all;
}

const error given_up{error_code::unavailable, "given up", "send it again", "here"};

} // namespace

TEST_CASE("numbers of every size come back from a record") {
  std::string bytes;
  record_writer out(bytes);
  const std::vector<std::int64_t> numbers{0,
                                          1,
                                          -1,
                                          63,
                                          64,
                                          -64,
                                          -65,
                                          127,
                                          128,
                                          1'000'000,
                                          std::numeric_limits<std::int64_t>::max(),
                                          std::numeric_limits<std::int64_t>::min()};
  for (const auto n : numbers) {
    out.put_signed(n);
    out.put(static_cast<std::uint64_t>(n));
  }
  out.put_float(-1.5F);
  out.put_text("text");
  record_reader in(bytes);
  for (const auto n : numbers) {
    CHECK(in.signed_integer() == n);
    CHECK(in.integer() == static_cast<std::uint64_t>(n));
  }
  CHECK(in.real() == -1.5F);
  CHECK(in.text() == "text");
  CHECK(in.ok());
  CHECK(in.at_end());
  CHECK(in.byte() == 0);
  CHECK_FALSE(in.ok());
}

TEST_CASE("a call is completed when each of its choices has ended") {
  request_log log({});
  std::string record;
  log.accept(call_of(1, "k", 2), record);
  CHECK(log.append(token_of(100, 0, 7), 10, record));
  CHECK(log.append(token_of(101, 0, 8, finish_reason::stop), 11, record));
  CHECK_FALSE(log.append(token_of(101, 1, 9), 11, record)); // it has ended
  CHECK_FALSE(log.append(token_of(100, 0, 7), 11, record)); // known
  CHECK_FALSE(log.append(token_of(100, 2, 7), 11, record)); // one is missing
  CHECK_FALSE(log.append(token_of(102, 0, 7), 11, record)); // nobody's
  CHECK(log.find(1)->state == call_state::in_progress);
  token_event end;
  end.request = 100;
  end.token_index = 1;
  end.finish = finish_reason::length;
  CHECK(log.append(end, 12, record));
  const auto* call = log.find_key("k");
  REQUIRE(call != nullptr);
  CHECK(call->state == call_state::completed);
  CHECK(call->ended_ms == 12);
  CHECK(call->choices[0].tokens == std::vector<std::int32_t>{7});
  CHECK(call->choices[0].finished_bare);
  CHECK(call->choices[1].finish == finish_reason::stop);

  request_log again({});
  REQUIRE(again.apply(record));
  CHECK(state_of(again) == state_of(log));
  CHECK(again.find(1)->ended_ms == 12);
}

TEST_CASE("a choice that a stop string has ended takes no more tokens") {
  request_log log({});
  std::string record;
  log.accept(call_of(1), record);
  log.append(token_of(100, 0, 7), 1, record);
  log.end_choice(100, 2, record);
  CHECK_FALSE(log.append(token_of(100, 1, 7), 3, record));
  CHECK(log.find(1)->state == call_state::completed);
}

TEST_CASE("the key of a failed call is free, and what it brought can still be read") {
  request_log log({});
  std::string record;
  log.accept(call_of(1, "k"), record);
  log.append(token_of(100, 0, 7), 1, record);
  log.fail(1, given_up, 2, record);
  log.fail(1, {}, 3, record);
  CHECK(log.find_key("k") == nullptr);
  CHECK(log.find(1)->why.cause == "given up");
  CHECK(log.find(1)->choices[0].tokens.size() == 1);
  log.accept(call_of(2, "k"), record);
  CHECK(log.find_key("k")->what.id == 2);
  request_log again({});
  REQUIRE(again.apply(record));
  CHECK(state_of(again) == state_of(log));
  CHECK(again.find_key("k")->what.id == 2);
  CHECK(again.find(1)->why.code == error_code::unavailable);
}

TEST_CASE("answers are kept for their time, and so many") {
  request_log::limits l;
  l.retain_ms = 100;
  l.max_retained = 2;
  request_log log(l);
  std::string record;
  for (std::uint64_t id = 1; id <= 4; ++id)
    log.accept(call_of(id, "k" + std::to_string(id)), record);
  for (std::uint64_t id = 3; id >= 1; --id)
    log.append(token_of(id * 100, 0, 1, finish_reason::stop), static_cast<std::int64_t>(10 - id),
               record);
  CHECK(log.find(3) == nullptr); // the first to end
  CHECK(log.find_key("k3") == nullptr);
  log.expire(107);
  CHECK(log.find(2) != nullptr);
  log.expire(108);
  CHECK(log.find(2) == nullptr);
  log.expire(109);
  CHECK(log.find(1) == nullptr);
  CHECK(log.find(4) != nullptr); // it goes on
  log.expire(1'000'000'000);
  CHECK(log.calls().size() == 1);

  l.max_retained = 100;
  l.max_retained_bytes = 200;
  request_log tight(l);
  for (std::uint64_t id = 1; id <= 20; ++id) {
    tight.accept(call_of(id), record);
    tight.append(token_of(id * 100, 0, 1, finish_reason::stop), static_cast<std::int64_t>(id),
                 record);
    CHECK(tight.bytes() <= 200);
  }
  CHECK(tight.find(20) != nullptr);
  CHECK(tight.find(1) == nullptr);
}

TEST_CASE("a call that nobody will ask for leaves nothing") {
  request_log log({});
  std::string record;
  log.accept(call_of(1, "k"), record);
  log.append(token_of(100, 0, 7), 1, record);
  log.forget(1, record);
  CHECK(log.calls().empty());
  CHECK(log.find_key("k") == nullptr);
  CHECK(log.bytes() == 0);
  CHECK_FALSE(log.append(token_of(100, 1, 7), 1, record));
  request_log again({});
  REQUIRE(again.apply(record));
  CHECK(again.calls().empty());
}

TEST_CASE("log-probabilities come back where the answer shows them") {
  request_log log({});
  std::string record;
  auto call = call_of(1);
  call.keeps_scores = true;
  log.accept(call, record);
  token_event scored = token_of(100, 1, 5);
  scored.is_prompt = true;
  scored.token.logprob = -0.25F;
  scored.token.top_tokens = {5, -1};
  scored.token.top_logprobs = {-0.25F, -2.0F};
  log.append(scored, 1, record);
  auto drawn = token_of(100, 0, 6);
  drawn.token.logprob = -0.5F;
  log.append(drawn, 1, record);
  request_log again({});
  REQUIRE(again.apply(record));
  const auto& choice = again.find(1)->choices[0];
  REQUIRE(choice.prompt_scores.size() == 1);
  CHECK(choice.prompt_scores[0].first == 1);
  CHECK(choice.prompt_scores[0].second.top_tokens == std::vector<std::int32_t>{5, -1});
  CHECK(choice.prompt_scores[0].second.top_logprobs == std::vector<float>{-0.25F, -2.0F});
  REQUIRE(choice.scores.size() == 1);
  CHECK(choice.scores[0].logprob == -0.5F);
  CHECK(state_of(again) == state_of(log));
}

TEST_CASE("a record that is damaged is refused and never more than that") {
  request_log log({});
  std::string record;
  auto call = call_of(1, "key", 3);
  call.keeps_scores = true;
  log.accept(call, record);
  for (std::uint32_t i = 0; i < 5; ++i)
    log.append(token_of(100, i, 7), 1, record);
  log.append(token_of(101, 0, 7, finish_reason::stop), 1, record);
  log.fail(1, given_up, 2, record);
  for (std::size_t cut = 0; cut < record.size(); ++cut)
    (void)request_log({}).apply(record.substr(0, cut));
  std::mt19937 random(1);
  for (int i = 0; i < 20'000; ++i) {
    auto damaged = record;
    for (auto n = 1 + random() % 4; n > 0; --n)
      damaged[random() % damaged.size()] = static_cast<char>(random());
    request_log torn({});
    (void)torn.apply(damaged);
    std::vector<std::string> records;
    torn.write_snapshot(records);
  }
  CHECK_FALSE(request_log({}).apply("no record"));
}

} // namespace troupe::schedule
