#include "fake_model.hpp"
#include "troupe/schedule/replica_scheduler.hpp"

#include <catch2/catch.hpp>

#include <map>
#include <random>
#include <set>

namespace troupe::schedule {
namespace {

/// One replica under a random schedule: the scheduler, stages that compute when they like, and
/// what every request has shown of itself so far.
class world {
public:
  explicit world(std::uint64_t seed)
    : random_(seed), lim_(random_limits()), scheduler_(lim_), pipeline_(lim_, lim_.max_in_flight) {}

  /// Runs a number of random events, then lets everything come to an end.
  void run() {
    for (auto n = pick(20, 160); n > 0; --n) {
      event();
      check_events();
      if (pick(0, 3) > 0)
        send();
      if (pick(0, 5) == 0)
        num_late_ +=
          pipeline_.write_late(pick(0, static_cast<std::uint32_t>(pipeline_.num_stages()) - 1));
    }
    drain();
  }

  std::uint64_t num_preemptions() const { return scheduler_.count().num_preemptions; }

  std::uint64_t num_finished() const { return num_finished_; }

  std::uint64_t num_late() const { return num_late_; }

  counters count() const { return scheduler_.count(); }

private:
  struct life {
    request what;
    reference expected;
    std::size_t num_scores = 0;
    std::size_t num_tokens = 0;
  };

  std::uint32_t pick(std::uint32_t low, std::uint32_t high) {
    return std::uniform_int_distribution<std::uint32_t>(low, high)(random_);
  }

  limits random_limits() {
    limits l;
    l.num_pages = pick(1, pick(0, 1) ? 10 : 30);
    l.page_tokens = pick(1, 5);
    l.max_batch_tokens = pick(1, 20);
    l.max_batch_sequences = pick(1, 6);
    l.prefill_chunk_tokens = pick(1, 9);
    l.max_in_flight = pick(1, 4);
    l.max_decoding = pick(1, l.max_in_flight);
    l.max_queued = pick(1, 8);
    l.max_context = pick(1, 40);
    l.draft_tokens = pick(0, 1) * pick(0, 3);
    max_length_ = std::min(l.max_context, l.num_pages * l.page_tokens);
    return l;
  }

  request random_request() {
    request r;
    r.id = ++last_id_;
    r.prompt.resize(pick(1, std::min(max_length_, pick(0, 3) ? 8U : 40U)));
    for (auto& token : r.prompt)
      token = static_cast<std::int32_t>(pick(0, kVocabulary - 1));
    r.max_tokens = pick(0, 9) ? pick(0, 20) : 4'000'000'000U;
    r.min_tokens = pick(0, 6);
    r.draw.seed = pick(0, 1000);
    for (auto n = pick(0, 2); n > 0; --n)
      r.stop_tokens.push_back(static_cast<std::int32_t>(pick(0, kVocabulary - 1)));
    r.num_logprobs = static_cast<std::int32_t>(pick(0, 3)) - 1;
    r.num_prompt_logprobs = static_cast<std::int32_t>(pick(0, 2)) - 1;
    if (pick(0, 9) == 0)
      r.deadline = now_ + std::chrono::milliseconds(pick(1, 60));
    return r;
  }

  void submit() {
    auto r = random_request();
    const auto queued = scheduler_.count().num_queued;
    const auto result = scheduler_.submit(r);
    if (r.prompt.size() + (r.max_tokens > 0) > max_length_) {
      ensure(!result && result.error().code == error_code::invalid_request, "can never fit");
    } else if (queued >= lim_.max_queued) {
      ensure(!result && result.error().code == error_code::overloaded, "the queue is full");
    } else {
      ensure(result.has_value(), "a request that fits is accepted");
      reference expected{r, max_length_, pipeline_.num_stages()};
      lives_.emplace(r.id, life{std::move(r), std::move(expected)});
    }
  }

  void event() {
    const auto kind = pick(0, 99);
    if (kind < 25) {
      submit();
    } else if (kind < 30 && !lives_.empty()) {
      auto it = std::next(lives_.begin(), pick(0, static_cast<std::uint32_t>(lives_.size()) - 1));
      const auto id = it->first;
      scheduler_.cancel(id);
      expect_end(id, finish_reason::cancelled);
      scheduler_.cancel(id);
    } else if (kind < 70) {
      pipeline_.advance(pick(0, static_cast<std::uint32_t>(pipeline_.num_stages()) - 1));
    } else if (kind < 90) {
      complete();
    } else if (kind < 94) {
      strike();
    } else if (kind < 97 && !answered_.empty()) {
      const auto before = scheduler_.count();
      const auto idx = pick(0, static_cast<std::uint32_t>(answered_.size()) - 1);
      const auto& [step, outputs] = answered_[idx];
      ensure(scheduler_.complete(step, outputs).has_value(), "a duplicate is no error");
      ensure(scheduler_.count().num_drafted_tokens == before.num_drafted_tokens,
             "nor verifies drafts");
      const auto after = scheduler_.count();
      ensure(before.num_in_flight == after.num_in_flight
               && before.num_generated_tokens == after.num_generated_tokens,
             "a duplicate changes nothing");
    } else if (kind < 99) {
      pass(std::chrono::milliseconds(pick(1, 20)));
      scheduler_.expire(now_);
      std::vector<request_id> late;
      for (const auto& [id, l] : lives_)
        if (l.what.deadline < now_)
          late.push_back(id);
      check_events(late);
    } else if (pick(0, 3) == 0) {
      for (const auto* batch : pipeline_.in_flight())
        answered_.emplace_back(batch->step, std::vector<output_token>(batch->outputs.size()));
      strike();
      pipeline_.clear();
      scheduler_.fail_all();
      std::vector<request_id> all;
      for (const auto& [id, l] : lives_)
        all.push_back(id);
      check_events(all);
      ensure(scheduler_.count().num_free_pages == lim_.num_pages, "all pages are free");
    }
  }

  /// A stage dies. What its device has in work may be written as long as the fence stands; with
  /// drafts its successor comes when nothing is left of it.
  void strike() {
    pipeline_.restart(pick(0, static_cast<std::uint32_t>(pipeline_.num_stages()) - 1));
    if (lim_.draft_tokens > 0)
      return pipeline_.forget_late();
    fence_end_ = now_ + fence_time;
    scheduler_.fence(fence_end_);
  }

  void pass(std::chrono::milliseconds time) {
    now_ += time;
    if (now_ >= fence_end_)
      pipeline_.forget_late();
    scheduler_.end_fence(now_);
  }

  void complete() {
    const auto* batch = pipeline_.finished();
    if (batch == nullptr)
      return;
    const auto outputs = pipeline_.answers();
    const auto step = batch->step;
    make_drafts(*batch);
    pipeline_.pop();
    if (!draft_counts_.empty()) {
      ++draft_counts_.back();
      ensure(!scheduler_.complete(step, outputs, {draft_counts_, drafts_}), "drafts must fit");
      --draft_counts_.back();
    }
    ensure(scheduler_.complete(step, outputs, {draft_counts_, drafts_}).has_value(),
           "the answers fit");
    ensure(scheduler_.oldest_step() > step, "the step is complete");
    answered_.emplace_back(step, outputs);
  }

  /// What an MTP layer could come up with: some of what is wanted, some of it right.
  void make_drafts(const micro_batch& batch) {
    draft_counts_.clear();
    drafts_.clear();
    if (lim_.draft_tokens == 0)
      return;
    std::size_t end = 0;
    for (const auto& slice : batch.sequences) {
      end += slice.num_rows;
      draft_counts_.push_back(pick(0, slice.num_wanted));
      const auto it = lives_.find(slice.request);
      const auto known = slice.first_position + slice.num_rows - slice.num_drafts;
      std::uint32_t accepted = 0;
      if (it != lives_.end())
        while (accepted < slice.num_drafts && known + accepted < it->second.expected.log.size()
               && batch.tokens[end - slice.num_drafts + accepted]
                    == it->second.expected.log[known + accepted])
          ++accepted;
      for (std::uint32_t i = 0; i < draft_counts_.back(); ++i) {
        const auto at = known + accepted + 1 + i;
        const bool is_right =
          it != lives_.end() && at < it->second.expected.log.size() && pick(0, 3) > 0;
        drafts_.push_back(is_right ? it->second.expected.log[at]
                                   : static_cast<std::int32_t>(pick(0, kVocabulary - 1)));
      }
    }
  }

  bool send() {
    bool sent = false;
    while (const auto* batch = scheduler_.next()) {
      pipeline_.send(batch);
      check_batch(*batch);
      sent = true;
    }
    return sent;
  }

  void check_batch(const micro_batch& batch) {
    ensure(batch.step == ++last_step_, "steps count up by one");
    const auto sent = pipeline_.in_flight();
    const auto in_flight = scheduler_.in_flight();
    ensure(std::equal(sent.begin(), sent.end(), in_flight.begin(), in_flight.end()),
           "in_flight names what was sent, oldest first");
    ensure(in_flight.size() <= lim_.max_in_flight, "bounded number in flight");
    ensure(!batch.sequences.empty() && batch.sequences.size() <= lim_.max_batch_sequences,
           "bounded number of sequences");
    ensure(batch.tokens.size() <= lim_.max_batch_tokens, "bounded number of rows");

    std::size_t row = 0;
    for (const auto& slice : batch.sequences) {
      const auto it = lives_.find(slice.request);
      ensure(it != lives_.end(), "nothing is computed for a request that has ended");
      const auto& l = it->second;
      const auto end = slice.first_position + slice.num_rows;
      const auto known = end - slice.num_drafts;
      const auto num_known = l.what.prompt.size() + l.num_tokens;
      ensure(slice.num_rows > 0 && slice.num_rows <= lim_.prefill_chunk_tokens, "chunk");
      ensure(known <= num_known && known > slice.first_position, "only tokens that are known");
      ensure(slice.num_drafts == 0 || known == num_known, "drafts stand behind the log");
      ensure(slice.num_drafts <= lim_.draft_tokens && slice.num_wanted <= lim_.draft_tokens,
             "bounded number of drafts");
      ensure(end < max_length_ + (slice.num_drafts == 0 ? 1 : 0),
             "a token can be drawn behind every draft");
      ensure(std::equal(batch.tokens.begin() + row,
                        batch.tokens.begin() + row + (known - slice.first_position),
                        l.expected.log.begin() + slice.first_position),
             "the rows are those of the log");
      ensure(slice.next_token == (known < num_known ? l.expected.log[known] : -1),
             "the token behind the rows is the log's");
      const auto pages_for = [&](std::uint32_t n) {
        return (n + lim_.page_tokens - 1) / lim_.page_tokens;
      };
      ensure(slice.pages.size() >= pages_for(end)
               && slice.pages.size() <= pages_for(known + lim_.draft_tokens),
             "the block table covers the slice, and no more than drafts need");
      row += slice.num_rows;
    }
    ensure(row == batch.tokens.size(), "the slices cover the rows");
    ensure(std::is_sorted(batch.outputs.begin(), batch.outputs.end(),
                          [](const auto& a, const auto& b) { return a.row < b.row; }),
           "output rows ascend");

    std::set<std::int32_t> pages;
    std::set<request_id> requests;
    for (const auto* b : in_flight)
      for (const auto& slice : b->sequences) {
        ensure(requests.insert(slice.request).second, "a sequence is in one micro-batch");
        for (auto page : slice.pages)
          ensure(pages.insert(page).second && page >= 0
                   && static_cast<std::uint32_t>(page) < lim_.num_pages,
                 "a page belongs to one sequence");
      }
  }

  /// Checks the new events. The requests in `failed` must end with them, no others.
  void check_events(std::vector<request_id> failed = {}) {
    scheduler_.take_events(events_);
    for (const auto& e : events_) {
      if (e.finish == finish_reason::failed) {
        const auto n = std::erase(failed, e.request);
        ensure(n == 1, "only whom it concerns fails, once");
      }
      check_event(e);
    }
    ensure(failed.empty(), "whoever is late or given up fails at once");
  }

  void expect_end(request_id id, finish_reason reason) {
    scheduler_.take_events(events_);
    ensure(!events_.empty() && events_.back().request == id && events_.back().finish == reason,
           "the end is told at once");
    for (const auto& e : events_)
      check_event(e);
  }

  void check_event(const token_event& e) {
    const auto it = lives_.find(e.request);
    ensure(it != lives_.end(), "no event after the last");
    auto& l = it->second;
    if (e.has_token) {
      auto& index = e.is_prompt ? l.num_scores : l.num_tokens;
      const auto& all = e.is_prompt ? l.expected.scores : l.expected.generated;
      ensure(!e.is_prompt || l.num_tokens == 0, "the prompt comes first");
      ensure(e.token_index == index + (e.is_prompt ? 1 : 0), "every index once and in order");
      ensure(index < all.size(), "not more tokens than alone");
      const auto& expected = all[index++];
      ensure(e.token.token == expected.token && e.token.logprob == expected.logprob
               && e.token.top_tokens == expected.top_tokens,
             "the same token as alone");
    }
    if (e.finish == finish_reason::none)
      return;
    if (e.finish == finish_reason::stop || e.finish == finish_reason::length) {
      ensure(l.num_scores == l.expected.scores.size(), "every prompt token is scored");
      ensure(l.num_tokens == l.expected.generated.size(), "all tokens are there");
      ensure(e.finish == l.expected.finish, "the same end as alone");
      ensure(e.has_token == !l.expected.generated.empty(), "an end without token only for scores");
      ++num_finished_;
    } else {
      ensure(!e.has_token, "given up without a token");
    }
    lives_.erase(it);
  }

  void drain() {
    std::uint64_t work = 0;
    for (const auto& [id, l] : lives_)
      work += l.expected.log.size();
    // Alone, a request needs at most a step a position. Preempted it needs them again.
    const auto bound = last_step_ + 4 * work;
    while (true) {
      const bool sent = send();
      if (scheduler_.count().num_in_flight == 0) {
        check_events();
        if (now_ < fence_end_) {
          pass(std::chrono::milliseconds(10)); // who waits for pages goes on behind it
          continue;
        }
        ensure(lives_.empty(), "with nothing in flight there is something to send");
        break;
      }
      ensure(sent || !pipeline_.in_flight().empty(), "something goes on");
      ensure(last_step_ <= bound, "no live lock");
      for (std::size_t i = 0; i < pipeline_.num_stages(); ++i)
        pipeline_.advance(i);
      complete();
      check_events();
    }
    const auto c = scheduler_.count();
    ensure(c.num_free_pages == lim_.num_pages, "no page leaks");
    ensure(c.num_queued == 0 && c.num_running == 0, "nobody is left");
    ensure(scheduler_.oldest_step() == last_step_ + 1, "every step is complete");
  }

  std::mt19937_64 random_;
  std::uint32_t max_length_ = 0;
  limits lim_;
  replica_scheduler scheduler_;
  fake_pipeline pipeline_;
  std::map<request_id, life> lives_; ///< accepted and without a last event
  std::vector<token_event> events_;
  std::vector<std::pair<std::uint64_t, std::vector<output_token>>> answered_;
  time_point now_{};
  request_id last_id_ = 0;
  std::uint64_t last_step_ = 0;
  std::uint64_t num_finished_ = 0;
  std::uint64_t num_late_ = 0;
  time_point fence_end_{};
  std::vector<std::uint32_t> draft_counts_;
  std::vector<std::int32_t> drafts_;
};

TEST_CASE("any schedule gives every request the tokens that it gets alone") {
  std::uint64_t num_preemptions = 0;
  std::uint64_t num_finished = 0;
  std::uint64_t num_drafted = 0;
  std::uint64_t num_accepted = 0;
  std::uint64_t num_late = 0;
  for (std::uint64_t seed = 1; seed <= 6000; ++seed) {
    INFO("seed " << seed);
    world w{seed};
    w.run();
    num_preemptions += w.num_preemptions();
    num_finished += w.num_finished();
    num_drafted += w.count().num_drafted_tokens;
    num_accepted += w.count().num_accepted_tokens;
    num_late += w.num_late();
  }
  INFO(num_preemptions << " preemptions, " << num_finished << " requests finished");
  CHECK(num_preemptions > 3000);
  CHECK(num_finished > 30000);
  INFO(num_late << " late writes of the dead");
  CHECK(num_late > 1000);
  INFO(num_accepted << " of " << num_drafted << " drafts accepted");
  CHECK(num_drafted > 10000);
  CHECK(num_accepted > num_drafted / 4);
}

TEST_CASE("under constant load every request ends, in about the order of arrival") {
  limits l;
  l.num_pages = 24;
  l.page_tokens = 4;
  l.max_batch_tokens = 12;
  l.max_batch_sequences = 8;
  l.prefill_chunk_tokens = 5;
  l.max_in_flight = 3;
  l.max_queued = 16;
  l.max_context = 64;
  replica_scheduler s{l};
  fake_pipeline pipeline{l, 2};
  std::mt19937_64 random{7};
  std::map<request_id, std::uint64_t> submitted_at; // step
  std::vector<token_event> events;
  request_id id = 0;
  std::uint64_t longest = 0;
  std::uint64_t num_ended = 0;
  for (int i = 0; i < 20000; ++i) {
    while (s.count().num_queued < l.max_queued) {
      request r;
      r.id = ++id;
      r.prompt.assign(1 + random() % 30, static_cast<std::int32_t>(random() % kVocabulary));
      r.max_tokens = static_cast<std::uint32_t>(1 + random() % 40);
      REQUIRE(s.submit(r));
      submitted_at[id] = s.oldest_step();
    }
    while (const auto* batch = s.next())
      pipeline.send(batch);
    pipeline.advance(0);
    pipeline.advance(1);
    if (const auto* batch = pipeline.finished()) {
      const auto outputs = pipeline.answers();
      const auto step = batch->step;
      pipeline.pop();
      REQUIRE(s.complete(step, outputs));
    }
    s.take_events(events);
    for (const auto& e : events)
      if (e.finish != finish_reason::none) {
        longest = std::max(longest, s.oldest_step() - submitted_at[e.request]);
        submitted_at.erase(e.request);
        ++num_ended;
      }
  }
  INFO(num_ended << " ended, the longest took " << longest << " steps, "
                 << s.count().num_preemptions << " preemptions");
  CHECK(s.count().num_preemptions > 100);
  CHECK(submitted_at.size() <= l.max_queued + 24);
  CHECK(num_ended > 700);
  CHECK(longest < 800);
}

} // namespace
} // namespace troupe::schedule
