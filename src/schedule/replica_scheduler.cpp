#include "troupe/schedule/replica_scheduler.hpp"

#include "troupe/schedule/page_pool.hpp"
#include "troupe/schedule/sequence.hpp"

#include <algorithm>
#include <cassert>
#include <unordered_map>
#include <utility>

#include <fmt/format.h>

namespace troupe::schedule {

namespace {

std::uint32_t ceil_div(std::uint32_t a, std::uint32_t b) {
  return a / b + (a % b != 0 ? 1 : 0);
}

} // namespace

struct replica_scheduler::state {
  /// A micro-batch that was sent, and whose rows it holds: members[i] goes with slice i.
  struct flight {
    micro_batch batch;
    std::vector<sequence*> members;
    bool has_decodes = false;
  };

  explicit state(limits l) : lim(l), pool(l.num_pages) {
    assert(lim.num_pages > 0 && lim.page_tokens > 0 && lim.max_batch_tokens > 0
           && lim.max_batch_sequences > 0 && lim.prefill_chunk_tokens > 0 && lim.max_in_flight > 0
           && lim.max_decoding > 0 && lim.max_context > 0);
    const auto capacity = std::uint64_t{lim.num_pages} * lim.page_tokens;
    max_length = static_cast<std::uint32_t>(std::min<std::uint64_t>(lim.max_context, capacity));
    // More running sequences than decode rows in all slots could only wait for one another.
    max_running =
      std::uint64_t{std::min(lim.max_batch_sequences, lim.max_batch_tokens)} * lim.max_in_flight;
  }

  const limits lim;
  page_pool pool;
  std::uint32_t max_length = 0;
  std::uint64_t max_running = 0;
  std::uint64_t next_step = 1;
  time_point fence_end{};
  bool verifies_drafts = false; ///< in the micro-batch that is being made

  std::unordered_map<request_id, std::unique_ptr<sequence>> sequences;
  std::deque<sequence*> waiting;  ///< first come, first served; preempted ones return to the front
  std::vector<sequence*> running; ///< ready or in flight, in the order of their admission
  std::vector<sequence*> ready;   ///< the one that has waited longest for a step first

  std::vector<std::unique_ptr<flight>> in_flight; ///< oldest first
  std::vector<token_event> events;
  counters totals; ///< only the numbers that grow

  // What was used before and is used again, so that a step allocates nothing.
  std::vector<std::unique_ptr<flight>> spare_flights;
  std::vector<sequence_slice> spare_slices;

  std::uint32_t pages_for(std::uint32_t num_positions) const {
    return ceil_div(num_positions, lim.page_tokens);
  }

  /// Takes `s` out of the running ones.
  void drop_running(sequence& s) {
    std::erase(running, &s);
    if (s.where == phase::ready)
      std::erase(ready, &s);
  }

  /// Ends a request: its last event goes out, its pages and its memory are free
  /// at once or when its micro-batch completes. `s` may be gone afterwards.
  void end(sequence& s, finish_reason reason) {
    events.push_back({.request = s.what.id,
                      .is_prompt = false,
                      .has_token = false,
                      .token_index = s.num_generated(),
                      .token = {},
                      .finish = reason});
    if (s.where == phase::waiting)
      std::erase(waiting, &s);
    else
      drop_running(s);
    if (s.where == phase::in_flight)
      s.where = phase::ended;
    else
      forget(s);
  }

  void forget(sequence& s) {
    pool.release(s.pages);
    sequences.erase(request_id{s.what.id});
  }

  /// Takes the pages of the most recently admitted sequence that came after `s` and is not
  /// in flight, and sends it back to the queue. False if there is none. Only younger ones
  /// give way, so the oldest sequence always gets on and with it, in turn, everybody.
  bool preempt_younger_than(const sequence& s) {
    for (auto i = running.size(); i-- > 0 && running[i] != &s;) {
      auto& victim = *running[i];
      if (victim.where != phase::ready || pool.num_freed_by(victim.pages) == 0)
        continue;
      running.erase(running.begin() + static_cast<std::ptrdiff_t>(i));
      pool.release(victim.pages);
      victim.num_computed = 0;
      victim.where = phase::waiting; // taken out of `ready` when the micro-batch is made
      waiting.push_front(&victim);
      ++totals.num_preemptions;
      return true;
    }
    return false;
  }

  /// Grows the block table for up to `wanted` more positions and says for how many. A chunk is
  /// cut to the free pages before anybody loses theirs. 0 if not even one position fits.
  std::uint32_t grow(sequence& s, std::uint32_t wanted) {
    const auto room = [&] {
      const auto pages = std::uint64_t{s.pages.size()} + pool.num_free();
      return pages * lim.page_tokens - s.num_computed;
    };
    while (room() == 0)
      if (!preempt_younger_than(s))
        return 0;
    const auto num_rows = static_cast<std::uint32_t>(std::min<std::uint64_t>(wanted, room()));
    for (auto n = pages_for(s.num_computed + num_rows); s.pages.size() < n;)
      s.pages.push_back(pool.take());
    return num_rows;
  }

  /// Pages that the running sequences still lack for the tokens they have.
  std::uint32_t num_promised() const {
    std::uint32_t sum = 0;
    for (const auto* s : running)
      sum += pages_for(s->num_known()) - std::min(num_pages(*s), pages_for(s->num_known()));
    return sum;
  }

  static std::uint32_t num_pages(const sequence& s) {
    return static_cast<std::uint32_t>(s.pages.size());
  }

  bool has_room(const flight& f) const {
    return f.batch.tokens.size() < lim.max_batch_tokens
           && f.batch.sequences.size() < lim.max_batch_sequences;
  }

  /// Puts the next rows of `s` into `f`. False if there is no page for them.
  bool add(flight& f, sequence& s) {
    const auto rows_left = lim.max_batch_tokens - static_cast<std::uint32_t>(f.batch.tokens.size());
    const auto wanted = std::min({s.num_remaining(), lim.prefill_chunk_tokens, rows_left});
    const auto num_drafts =
      verifies_drafts && wanted == s.num_remaining()
        ? std::min(s.num_usable_drafts(), std::min(lim.prefill_chunk_tokens, rows_left) - wanted)
        : 0;
    const auto num_rows = grow(s, wanted + num_drafts);
    if (num_rows == 0)
      return false;
    sequence_slice slice;
    if (!spare_slices.empty()) {
      slice = std::move(spare_slices.back());
      spare_slices.pop_back();
    }
    s.write_slice(f.batch, std::move(slice), num_rows, num_rows - std::min(num_rows, wanted),
                  lim.draft_tokens);
    f.members.push_back(&s);
    s.where = phase::in_flight;
    return true;
  }

  /// Adds ready sequences, longest waiting first, until `quota` of them are in.
  std::uint32_t add_ready(flight& f, bool decodes, std::uint32_t quota) {
    std::uint32_t num_added = 0;
    for (auto* s : ready) {
      if (num_added == quota || !has_room(f))
        break;
      if (s->where == phase::ready && s->is_decode() == decodes && add(f, *s))
        ++num_added;
    }
    return num_added;
  }

  /// Admits from the queue while the pages for all known tokens of a sequence are free, and not
  /// promised to prefills that are under way: a long prompt does not start only to be thrown
  /// out. A page for every fourth running sequence stays free, about what they take in a
  /// quarter of the steps that fill a page. Nobody overtakes the head of the queue.
  void admit(flight& f, std::uint32_t quota) {
    if (quota == 0 || waiting.empty())
      return;
    auto promised = num_promised();
    for (; quota > 0 && !waiting.empty() && has_room(f) && running.size() < max_running; --quota) {
      auto& s = *waiting.front();
      const auto reserve = ceil_div(static_cast<std::uint32_t>(running.size()), 4);
      const auto needed = pages_for(s.num_known());
      if (std::uint64_t{promised} + reserve + needed > pool.num_free())
        return;
      waiting.pop_front();
      running.push_back(&s);
      [[maybe_unused]] const bool added = add(f, s);
      assert(added);
      promised += needed - num_pages(s);
    }
  }

  std::unique_ptr<flight> take_flight() {
    if (spare_flights.empty())
      return std::make_unique<flight>();
    auto f = std::move(spare_flights.back());
    spare_flights.pop_back();
    return f;
  }

  void give_back(std::unique_ptr<flight> f) {
    for (auto& slice : f->batch.sequences)
      spare_slices.push_back(std::move(slice));
    f->batch.sequences.clear();
    f->batch.tokens.clear();
    f->batch.outputs.clear();
    f->members.clear();
    spare_flights.push_back(std::move(f));
  }

  /// Takes every step in flight for not sent.
  void forget_flights() {
    for (auto& f : in_flight) {
      for (auto* s : f->members) {
        if (s->where == phase::ended)
          forget(*s);
        else
          s->where = phase::ready;
      }
      give_back(std::move(f));
    }
    in_flight.clear();
  }

  /// Takes the answers to one slice of `batch`. `s` may be gone afterwards.
  void advance(sequence& s, const micro_batch& batch, const sequence_slice& slice,
               std::span<const output_row> rows, std::span<const output_token> outputs,
               std::span<const std::int32_t> drafts) {
    s.num_computed += slice.num_rows - slice.num_drafts;
    totals.num_drafted_tokens += slice.num_drafts;
    s.num_scored = std::max(s.num_scored, std::min(s.num_computed, s.num_prompt - 1));
    if (s.num_generated() == 0 && s.num_remaining() == 0)
      totals.num_prompt_tokens += s.num_prompt;
    auto finish = finish_reason::none;
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const bool is_prompt = rows[i].target >= 0;
      const auto index = is_prompt ? rows[i].position : s.num_generated();
      if (!is_prompt) {
        finish = s.append(outputs[i].token);
        ++totals.num_generated_tokens;
      }
      auto& event = events.emplace_back();
      event.request = s.what.id;
      event.is_prompt = is_prompt;
      event.has_token = true;
      event.token_index = index;
      event.token = outputs[i];
      event.finish = finish;
      if (is_prompt) {
        event.token.token = rows[i].target;
        continue;
      }
      // What follows was drawn behind a draft: it is right only if the draft was.
      if (finish != finish_reason::none || i + 1 == rows.size()
          || batch.tokens[static_cast<std::size_t>(rows[i + 1].row)] != outputs[i].token)
        break;
      ++s.num_computed;
      ++totals.num_accepted_tokens;
    }
    if (!rows.empty() && rows.back().target < 0)
      s.drafts.assign(drafts.begin(), drafts.end());
    if (finish != finish_reason::none) {
      drop_running(s);
      forget(s);
    } else if (s.only_scores() && s.num_remaining() == 0) {
      s.where = phase::ready;
      end(s, finish_reason::length);
    } else {
      s.where = phase::ready;
      ready.push_back(&s);
    }
  }
};

replica_scheduler::replica_scheduler(limits l) : state_(std::make_unique<state>(l)) {}

replica_scheduler::~replica_scheduler() = default;

expected<void> replica_scheduler::submit(request r) {
  auto& st = *state_;
  const auto id = r.id;
  if (r.prompt.empty())
    return fail(error_code::invalid_request, fmt::format("request {}: the prompt is empty", id),
                "send at least one token");
  if (st.sequences.contains(id))
    return fail(error_code::invalid_request, fmt::format("request {} is being served already", id),
                "give every request its own id");
  const auto needed = std::uint64_t{r.prompt.size()} + std::min<std::uint32_t>(r.max_tokens, 1);
  if (needed > st.max_length)
    return fail(error_code::invalid_request,
                fmt::format("request {}: a prompt of {} tokens with at least {} generated does not "
                            "fit into the {} tokens that a sequence can have (context {}, "
                            "{} KV pages of {})",
                            id, r.prompt.size(), needed - r.prompt.size(), st.max_length,
                            st.lim.max_context, st.lim.num_pages, st.lim.page_tokens),
                "shorten the prompt");
  if (st.waiting.size() >= st.lim.max_queued && !r.resumed)
    return fail(error_code::overloaded,
                fmt::format("request {}: {} requests wait already", id, st.waiting.size()),
                "try again later");

  auto owned = std::make_unique<sequence>(std::move(r), st.max_length);
  auto& s = *owned;
  st.sequences.emplace(id, std::move(owned));
  st.waiting.push_back(&s);
  const bool nothing_to_score = s.only_scores() && s.num_scored == s.num_known();
  if (nothing_to_score || (!s.only_scores() && s.tokens.size() >= s.length_limit))
    st.end(s, finish_reason::length);
  return {};
}

void replica_scheduler::cancel(request_id id) {
  auto& st = *state_;
  const auto it = st.sequences.find(id);
  if (it != st.sequences.end() && it->second->where != phase::ended)
    st.end(*it->second, finish_reason::cancelled);
}

const micro_batch* replica_scheduler::next() {
  auto& st = *state_;
  const auto num_in_flight = static_cast<std::uint32_t>(st.in_flight.size());
  if (num_in_flight == st.lim.max_in_flight || (st.ready.empty() && st.waiting.empty()))
    return nullptr;

  // Every free slot gets its part of what can go now, so that all stages have work. Decodes go in
  // no more micro-batches than can be computed at once, since the fewer rows one has, the more
  // reading the weights costs each row; slots beyond are for prefills. No micro-batch gets more
  // decodes than its part of all of them, also where others are in flight: otherwise those that
  // once met in one would stay together and leave stages idle.
  const auto num_slots = st.lim.max_in_flight - num_in_flight;
  std::uint32_t num_decodes = 0;
  std::uint32_t num_ready_decodes = 0;
  for (const auto* s : st.running) {
    num_decodes += s->is_decode();
    num_ready_decodes += s->where == phase::ready && s->is_decode();
  }
  const auto num_prefills =
    static_cast<std::uint32_t>(st.ready.size() + st.waiting.size()) - num_ready_decodes;
  const auto num_decoding =
    std::count_if(st.in_flight.begin(), st.in_flight.end(), [](auto& f) { return f->has_decodes; });
  const auto decode_quota = static_cast<std::uint32_t>(num_decoding) < st.lim.max_decoding
                              ? ceil_div(num_decodes, st.lim.max_decoding)
                              : 0;
  const auto prefill_quota = ceil_div(num_prefills, num_slots);

  auto f = st.take_flight();
  st.verifies_drafts =
    std::uint64_t{decode_quota} * (1 + st.lim.draft_tokens) <= st.lim.max_batch_tokens;
  f->has_decodes = st.add_ready(*f, true, decode_quota) > 0;
  const auto num_added = st.add_ready(*f, false, prefill_quota);
  st.admit(*f, prefill_quota - num_added);
  std::erase_if(st.ready, [](const sequence* s) { return s->where != phase::ready; });
  if (f->members.empty()) {
    st.give_back(std::move(f));
    return nullptr;
  }
  f->batch.step = st.next_step++;
  return &st.in_flight.emplace_back(std::move(f))->batch;
}

expected<void> replica_scheduler::complete(std::uint64_t step,
                                           std::span<const output_token> outputs,
                                           const draft_list& drafts) {
  auto& st = *state_;
  const auto it = std::find_if(st.in_flight.begin(), st.in_flight.end(),
                               [&](const auto& f) { return f->batch.step == step; });
  if (it == st.in_flight.end())
    return {};
  const auto& rows = (*it)->batch.outputs;
  if (outputs.size() != rows.size())
    return fail(error_code::internal,
                fmt::format("step {} has {} output rows, but {} answers came back", step,
                            rows.size(), outputs.size()));
  std::size_t num_drafts = 0;
  bool too_many = false;
  for (const auto count : drafts.counts) {
    num_drafts += count;
    too_many = too_many || count > st.lim.draft_tokens;
  }
  if (too_many || num_drafts != drafts.tokens.size()
      || (!drafts.counts.empty() && drafts.counts.size() != (*it)->members.size()))
    return fail(error_code::internal,
                fmt::format("step {} has {} slices, but {} drafts for {} came back", step,
                            (*it)->members.size(), drafts.tokens.size(), drafts.counts.size()));

  auto f = std::move(*it);
  st.in_flight.erase(it);
  std::size_t first = 0;
  std::size_t first_draft = 0;
  for (std::size_t i = 0; i < f->members.size(); ++i) {
    const std::size_t num_of_slice = drafts.counts.empty() ? 0 : drafts.counts[i];
    auto last = first;
    while (last < rows.size() && rows[last].sequence == static_cast<std::int32_t>(i))
      ++last;
    auto& s = *f->members[i];
    if (s.where == phase::ended)
      st.forget(s);
    else
      st.advance(s, f->batch, f->batch.sequences[i], std::span(rows).subspan(first, last - first),
                 outputs.subspan(first, last - first),
                 drafts.tokens.subspan(first_draft, num_of_slice));
    first = last;
    first_draft += num_of_slice;
  }
  st.give_back(std::move(f));
  return {};
}

void replica_scheduler::fail_step(std::uint64_t step) {
  auto& st = *state_;
  const auto it = std::find_if(st.in_flight.begin(), st.in_flight.end(),
                               [&](const auto& f) { return f->batch.step == step; });
  if (it == st.in_flight.end())
    return;
  auto f = std::move(*it);
  st.in_flight.erase(it);
  for (auto* s : f->members) {
    if (s->where != phase::ended)
      st.end(*s, finish_reason::failed);
    st.forget(*s);
  }
  st.give_back(std::move(f));
}

void replica_scheduler::expire(time_point now) {
  auto& st = *state_;
  std::vector<sequence*> late;
  const auto collect = [&](sequence* s) {
    if (s->what.deadline < now)
      late.push_back(s);
  };
  std::for_each(st.running.begin(), st.running.end(), collect);
  std::for_each(st.waiting.begin(), st.waiting.end(), collect);
  for (auto* s : late)
    st.end(*s, finish_reason::failed);
}

void replica_scheduler::fence(time_point end) {
  auto& st = *state_;
  st.fence_end = std::max(st.fence_end, end);
  for (const auto& f : st.in_flight)
    for (const auto& slice : f->batch.sequences) {
      const auto first = slice.first_position / st.lim.page_tokens;
      const auto last = (slice.first_position + slice.num_rows - 1) / st.lim.page_tokens;
      for (auto i = first; i <= last; ++i)
        st.pool.expose(slice.pages[i]);
    }
}

void replica_scheduler::fence_all(time_point end) {
  fence(end);
  state_->pool.expose_free();
}

void replica_scheduler::end_fence(time_point now) {
  if (state_->fence_end != time_point{} && now >= state_->fence_end) {
    state_->fence_end = {};
    state_->pool.end_rest();
  }
}

void replica_scheduler::forget_kv() {
  auto& st = *state_;
  st.forget_flights();
  std::stable_sort(st.running.begin(), st.running.end(),
                   [](const auto* a, const auto* b) { return a->num_known() < b->num_known(); });
  for (auto i = st.running.rbegin(); i != st.running.rend(); ++i) {
    auto& s = **i;
    st.pool.release(s.pages);
    s.num_computed = 0;
    s.where = phase::waiting;
    st.waiting.push_front(&s);
  }
  st.totals.num_preemptions += st.running.size();
  st.running.clear();
  st.ready.clear();
}

void replica_scheduler::fail_all() {
  auto& st = *state_;
  st.forget_flights();
  while (!st.running.empty())
    st.end(*st.running.front(), finish_reason::failed);
  while (!st.waiting.empty())
    st.end(*st.waiting.front(), finish_reason::failed);
}

std::vector<const micro_batch*> replica_scheduler::in_flight() const {
  std::vector<const micro_batch*> batches;
  for (const auto& f : state_->in_flight)
    batches.push_back(&f->batch);
  return batches;
}

std::uint64_t replica_scheduler::oldest_step() const {
  const auto& st = *state_;
  return st.in_flight.empty() ? st.next_step : st.in_flight.front()->batch.step;
}

void replica_scheduler::take_events(std::vector<token_event>& out) {
  out.clear();
  out.swap(state_->events);
}

counters replica_scheduler::count() const {
  const auto& st = *state_;
  auto c = st.totals;
  c.num_queued = static_cast<std::uint32_t>(st.waiting.size());
  c.num_running = static_cast<std::uint32_t>(st.running.size());
  c.num_free_pages = st.pool.num_free() + st.pool.num_resting();
  c.num_in_flight = static_cast<std::uint32_t>(st.in_flight.size());
  return c;
}

} // namespace troupe::schedule
