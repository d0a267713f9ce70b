#include "troupe/schedule/request_log.hpp"

#include "troupe/schedule/record_codec.hpp"

#include <algorithm>
#include <utility>

namespace troupe::schedule {

namespace {

enum class change : std::uint8_t { accept = 1, token = 2, end_choice = 3, fail = 4, forget = 5 };

// Of a token change. The finish reason lies above them.
constexpr unsigned is_prompt_bit = 1;
constexpr unsigned has_token_bit = 2;
constexpr unsigned has_scores_bit = 4;
constexpr unsigned finish_shift = 3;

/// More than any call may have; a record that says so is damaged.
constexpr std::uint64_t max_choices = 1U << 16U;

constexpr std::size_t snapshot_record_bytes = std::size_t{1} << 20;

void write_accept(std::string& record, const accepted_call& call) {
  record_writer out(record);
  out.put_byte(static_cast<std::uint8_t>(change::accept));
  out.put(call.id);
  out.put_text(call.key);
  out.put_byte(static_cast<std::uint8_t>((call.chat ? 1U : 0U) | (call.keeps_scores ? 2U : 0U)));
  out.put_text(call.body);
  out.put(call.seed);
  out.put_signed(call.created_ms);
  out.put_signed(call.deadline_ms);
  out.put(call.first_request);
  out.put(call.num_choices);
}

void read_accept(record_reader& in, accepted_call& call) {
  call.id = in.integer();
  call.key = in.text();
  const unsigned flags = in.byte();
  call.chat = (flags & 1U) != 0;
  call.keeps_scores = (flags & 2U) != 0;
  call.body = in.text();
  call.seed = in.integer();
  call.created_ms = in.signed_integer();
  call.deadline_ms = in.signed_integer();
  call.first_request = in.integer();
  call.num_choices = static_cast<std::uint32_t>(std::min(in.integer(), max_choices));
}

void write_scores(record_writer& out, const output_token& token) {
  out.put_float(token.logprob);
  out.put(token.top_tokens.size());
  for (auto t : token.top_tokens)
    out.put_signed(t);
  out.put(token.top_logprobs.size());
  for (auto l : token.top_logprobs)
    out.put_float(l);
}

void read_scores(record_reader& in, output_token& token) {
  token.logprob = in.real();
  token.top_tokens.clear();
  token.top_logprobs.clear();
  for (auto n = std::min<std::uint64_t>(in.integer(), in.num_left()); n > 0; --n)
    token.top_tokens.push_back(static_cast<std::int32_t>(in.signed_integer()));
  for (auto n = std::min<std::uint64_t>(in.integer(), in.num_left()); n > 0; --n)
    token.top_logprobs.push_back(in.real());
}

void write_token(std::string& record, const token_event& event, bool with_scores,
                 std::int64_t now_ms) {
  with_scores = with_scores && event.has_token;
  record_writer out(record);
  out.put_byte(static_cast<std::uint8_t>(change::token));
  out.put(event.request);
  out.put_byte(static_cast<std::uint8_t>(
    (event.is_prompt ? is_prompt_bit : 0U) | (event.has_token ? has_token_bit : 0U)
    | (with_scores ? has_scores_bit : 0U) | static_cast<unsigned>(event.finish) << finish_shift));
  if (event.is_prompt)
    out.put(event.token_index);
  if (event.has_token)
    out.put_signed(event.token.token);
  if (with_scores)
    write_scores(out, event.token);
  if (event.finish != finish_reason::none)
    out.put_signed(now_ms);
}

/// What `write_token` wrote, but for token_index where it is not written.
void read_token(record_reader& in, token_event& event, std::int64_t& now_ms) {
  event.request = in.integer();
  const unsigned flags = in.byte();
  event.is_prompt = (flags & is_prompt_bit) != 0;
  event.has_token = (flags & has_token_bit) != 0;
  event.finish = static_cast<finish_reason>(flags >> finish_shift);
  if (event.is_prompt)
    event.token_index = static_cast<std::uint32_t>(in.integer());
  if (event.has_token)
    event.token.token = static_cast<std::int32_t>(in.signed_integer());
  if ((flags & has_scores_bit) != 0)
    read_scores(in, event.token);
  if (event.finish != finish_reason::none)
    now_ms = in.signed_integer();
}

void write_end_choice(std::string& record, request_id request, std::int64_t now_ms) {
  record_writer out(record);
  out.put_byte(static_cast<std::uint8_t>(change::end_choice));
  out.put(request);
  out.put_signed(now_ms);
}

void write_fail(std::string& record, std::uint64_t call, const error& why, std::int64_t now_ms) {
  record_writer out(record);
  out.put_byte(static_cast<std::uint8_t>(change::fail));
  out.put(call);
  out.put_byte(static_cast<std::uint8_t>(why.code));
  out.put_text(why.cause);
  out.put_text(why.cure);
  out.put_text(why.origin);
  out.put_signed(now_ms);
}

void write_choice(std::string& record, const logged_call& call, std::uint32_t index) {
  const auto& choice = call.choices[index];
  const bool with_scores = call.what.keeps_scores;
  token_event event;
  event.request = call.what.first_request + index;
  event.has_token = true;
  event.is_prompt = true;
  for (const auto& [position, token] : choice.prompt_scores) {
    event.token_index = position;
    event.token = token;
    write_token(record, event, with_scores, 0);
  }
  event.is_prompt = false;
  for (std::size_t i = 0; i < choice.tokens.size(); ++i) {
    if (with_scores)
      event.token = choice.scores[i];
    event.token.token = choice.tokens[i];
    if (i + 1 == choice.tokens.size() && !choice.finished_bare)
      event.finish = choice.finish;
    write_token(record, event, with_scores, call.ended_ms);
  }
  if (choice.finished_bare) {
    event.has_token = false;
    event.finish = choice.finish;
    write_token(record, event, with_scores, call.ended_ms);
  }
}

} // namespace

request_log::request_log(limits l) : limits_(l) {}

void request_log::accept(accepted_call call, std::string& record) {
  const auto before = record.size();
  write_accept(record, call);
  do_accept(std::move(call), record.size() - before);
}

bool request_log::append(const token_event& event, std::int64_t now_ms, std::string& record) {
  const auto at = find_request(event.request);
  if (at.call == nullptr)
    return false;
  const auto& choice = at.call->choices[at.choice];
  if (choice.finish != finish_reason::none
      || (!event.is_prompt && event.has_token && event.token_index != choice.tokens.size()))
    return false;
  const auto before = record.size();
  write_token(record, event, at.call->what.keeps_scores, now_ms);
  do_append(at, event, now_ms, record.size() - before);
  return true;
}

void request_log::end_choice(request_id request, std::int64_t now_ms, std::string& record) {
  const auto at = find_request(request);
  if (at.call == nullptr)
    return;
  write_end_choice(record, request, now_ms);
  do_end_choice(at, now_ms);
}

void request_log::fail(std::uint64_t call, const error& why, std::int64_t now_ms,
                       std::string& record) {
  const auto found = calls_.find(call);
  if (found == calls_.end() || found->second.state != call_state::in_progress)
    return;
  write_fail(record, call, why, now_ms);
  do_fail(found->second, why, now_ms);
}

void request_log::forget(std::uint64_t call, std::string& record) {
  const auto found = calls_.find(call);
  if (found == calls_.end() || found->second.state != call_state::in_progress)
    return;
  record_writer out(record);
  out.put_byte(static_cast<std::uint8_t>(change::forget));
  out.put(call);
  do_forget(call);
}

void request_log::expire(std::int64_t now_ms) {
  while (!ended_.empty() && ended_.begin()->first + limits_.retain_ms <= now_ms)
    drop_oldest();
}

const logged_call* request_log::find(std::uint64_t call) const {
  const auto found = calls_.find(call);
  return found != calls_.end() ? &found->second : nullptr;
}

const logged_call* request_log::find_key(std::string_view key) const {
  const auto found = keys_.find(key);
  return found != keys_.end() ? find(found->second) : nullptr;
}

request_log::place request_log::find_request(request_id request) {
  const auto found = requests_.find(request);
  return found != requests_.end() ? found->second : place{};
}

void request_log::do_accept(accepted_call&& call, std::size_t bytes) {
  auto& added = calls_[call.id];
  added.choices.resize(call.num_choices);
  added.bytes = bytes;
  bytes_ += bytes;
  for (std::uint32_t i = 0; i < call.num_choices; ++i)
    requests_[call.first_request + i] = {&added, i};
  if (!call.key.empty()) {
    if (const auto owner = keys_.find(call.key); owner != keys_.end())
      free_key(calls_.at(owner->second));
    keys_.emplace(call.key, call.id);
  }
  added.what = std::move(call);
}

void request_log::do_append(place at, const token_event& event, std::int64_t now_ms,
                            std::size_t bytes) {
  auto& call = *at.call;
  auto& choice = call.choices[at.choice];
  call.bytes += bytes;
  bytes_ += bytes;
  if (event.is_prompt) {
    choice.prompt_scores.emplace_back(event.token_index, event.token);
  } else if (event.has_token) {
    choice.tokens.push_back(event.token.token);
    if (call.what.keeps_scores)
      choice.scores.push_back(event.token);
  }
  if (event.finish == finish_reason::none)
    return;
  choice.finished_bare = !event.has_token;
  choice.finish = event.finish;
  do_end_choice(at, now_ms);
}

void request_log::do_end_choice(place at, std::int64_t now_ms) {
  auto& call = *at.call;
  auto& choice = call.choices[at.choice];
  if (choice.finish == finish_reason::none) {
    choice.finish = finish_reason::cancelled;
    choice.finished_bare = true;
  }
  requests_.erase(call.what.first_request + at.choice);
  if (std::all_of(call.choices.begin(), call.choices.end(),
                  [](const auto& c) { return c.finish != finish_reason::none; }))
    settle(call, call_state::completed, now_ms);
}

void request_log::do_fail(logged_call& call, const error& why, std::int64_t now_ms) {
  call.why = why;
  free_key(call);
  settle(call, call_state::failed, now_ms);
}

void request_log::settle(logged_call& call, call_state state, std::int64_t now_ms) {
  call.state = state;
  call.ended_ms = now_ms;
  for (std::uint32_t i = 0; i < call.what.num_choices; ++i)
    requests_.erase(call.what.first_request + i);
  ended_.emplace(now_ms, call.what.id);
  ended_bytes_ += call.bytes;
  enforce_limits();
}

void request_log::enforce_limits() {
  while (ended_.size() > limits_.max_retained
         || (ended_bytes_ > limits_.max_retained_bytes && !ended_.empty()))
    drop_oldest();
}

void request_log::drop_oldest() {
  const auto id = ended_.begin()->second;
  ended_.erase(ended_.begin());
  ended_bytes_ -= calls_.at(id).bytes;
  do_forget(id);
}

void request_log::free_key(logged_call& call) {
  if (!call.what.key.empty())
    keys_.erase(call.what.key);
  call.what.key.clear();
}

void request_log::do_forget(std::uint64_t id) {
  const auto found = calls_.find(id);
  if (found == calls_.end())
    return;
  const auto& what = found->second.what;
  for (std::uint32_t i = 0; i < what.num_choices; ++i)
    requests_.erase(what.first_request + i);
  free_key(found->second);
  bytes_ -= found->second.bytes;
  calls_.erase(found);
}

void request_log::write_snapshot(std::vector<std::string>& records) const {
  records.clear();
  std::string record;
  for (const auto& [id, call] : calls_) {
    write_accept(record, call.what);
    for (std::uint32_t c = 0; c < call.what.num_choices; ++c)
      write_choice(record, call, c);
    if (call.state == call_state::failed)
      write_fail(record, id, call.why, call.ended_ms);
    if (record.size() >= snapshot_record_bytes)
      records.push_back(std::exchange(record, {}));
  }
  if (!record.empty())
    records.push_back(std::move(record));
}

bool request_log::apply(std::string_view record) {
  record_reader in(record);
  while (!in.at_end())
    if (!apply_change(in))
      return false;
  return true;
}

bool request_log::apply_change(record_reader& in) {
  const auto before = in.num_left();
  switch (static_cast<change>(in.byte())) {
  case change::accept: {
    accepted_call call;
    read_accept(in, call);
    if (!in.ok() || call.num_choices == 0 || call.num_choices == max_choices
        || calls_.contains(call.id))
      return false;
    do_accept(std::move(call), before - in.num_left());
    return true;
  }
  case change::token: {
    token_event event;
    std::int64_t now_ms = 0;
    read_token(in, event, now_ms);
    const auto at = find_request(event.request);
    if (!in.ok() || at.call == nullptr || event.finish > finish_reason::failed)
      return false;
    do_append(at, event, now_ms, before - in.num_left());
    return true;
  }
  case change::end_choice: {
    const auto at = find_request(in.integer());
    const auto now_ms = in.signed_integer();
    if (!in.ok() || at.call == nullptr)
      return false;
    do_end_choice(at, now_ms);
    return true;
  }
  case change::fail: {
    const auto found = calls_.find(in.integer());
    error why;
    why.code = static_cast<error_code>(in.byte());
    why.cause = in.text();
    why.cure = in.text();
    why.origin = in.text();
    const auto now_ms = in.signed_integer();
    if (!in.ok() || found == calls_.end() || found->second.state != call_state::in_progress)
      return false;
    do_fail(found->second, why, now_ms);
    return true;
  }
  case change::forget: {
    const auto found = calls_.find(in.integer());
    if (!in.ok() || found == calls_.end() || found->second.state != call_state::in_progress)
      return false;
    do_forget(found->first);
    return true;
  }
  }
  return false;
}

} // namespace troupe::schedule
