#include "drill_clients.hpp"

#include "troupe/http/client.hpp"
#include "troupe/http/sse.hpp"

#include <algorithm>

#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <unistd.h>

namespace troupe::tools::drills {

using nlohmann::json;

namespace {

constexpr std::uint32_t max_tokens = 256;
constexpr std::size_t most_streams = 2048; ///< of an open loop, before it counts as overrun
constexpr auto reconnect_patience = 30s;   ///< without any progress
constexpr auto reconnect_pause = 20ms;
constexpr auto refused_pause = 200ms;
constexpr http::client_timeouts timeouts{2s, 30s}; ///< the second: then a request has hung

} // namespace

clients::clients(std::string endpoint, const std::vector<drill::conversation>& known,
                 drill::load_settings load, std::uint64_t seed)
  : endpoint_(std::move(endpoint)),
    known_(known),
    load_(load),
    key_prefix_(fmt::format("drill-{}-{}", ::getpid(), seed)) {
  for (unsigned i = 0; i < load_.streams; ++i)
    add_stream();
  if (load_.rate_per_s > 0)
    generator_ = std::thread([this, seed] { arrive(seed); });
}

clients::~clients() {
  finish();
}

void clients::add_stream() {
  auto s = std::make_unique<stream>();
  s->number = static_cast<std::uint32_t>(streams_.size());
  s->thread = std::thread([this, p = s.get()] {
    if (load_.rate_per_s > 0)
      run_open(*p);
    else
      run_closed(*p);
  });
  streams_.push_back(std::move(s));
}

void clients::finish() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    work_.notify_all();
  }
  if (generator_.joinable())
    generator_.join();
  for (auto& s : streams_)
    if (s->thread.joinable())
      s->thread.join();
}

void clients::run_closed(stream& s) {
  for (std::size_t k = 0; !stopping_; ++k)
    converse(s, s.number + k * load_.streams);
}

void clients::run_open(stream& s) {
  for (;;) {
    std::size_t number = 0;
    {
      std::unique_lock lock(mutex_);
      ++num_idle_;
      work_.wait(lock, [&] { return stopping_ || !waiting_.empty(); });
      --num_idle_;
      if (stopping_)
        return;
      number = waiting_.front();
      waiting_.pop_front();
    }
    converse(s, number);
  }
}

void clients::arrive(std::uint64_t seed) {
  drill::arrivals gaps(load_.rate_per_s, seed);
  auto next = std::chrono::steady_clock::now();
  for (std::size_t number = 0; !stopping_; ++number) {
    if (number >= load_.streams) {
      next += gaps.next();
      std::this_thread::sleep_until(next);
    }
    std::lock_guard lock(mutex_);
    waiting_.push_back(number);
    if (waiting_.size() > num_idle_ && streams_.size() < most_streams)
      add_stream();
    else if (waiting_.size() == most_streams)
      problems_.push_back("the load is more than the cluster can serve: lower load.rate_per_s");
    work_.notify_one();
  }
}

void clients::report(std::string problem) {
  std::lock_guard lock(mutex_);
  problems_.push_back(std::move(problem));
}

void clients::converse(stream& s, std::size_t number) {
  const auto& talk = known_[number % known_.size()];
  const auto key = fmt::format("{}-{}", key_prefix_, number);
  answer got;
  std::int64_t trouble_ns = 0;
  s.moved_ns = now_ns();
  for (;;) {
    const auto had = got.tokens.size();
    const auto how = attempt(s, talk, key, got);
    if (how == end::done) {
      judge(talk, got);
      break;
    }
    ++(how == end::refused ? refused_ : how == end::broke ? reconnects_ : errors_);
    if (got.tokens.size() > had || trouble_ns == 0)
      trouble_ns = now_ns();
    if (how == end::failed
        || now_ns() - trouble_ns > std::chrono::nanoseconds(reconnect_patience).count()) {
      if (how != end::failed)
        ++errors_;
      report(
        fmt::format("\"{}\": {} (after {} tokens)", talk.question, got.problem, got.tokens.size()));
      break;
    }
    std::this_thread::sleep_for(how == end::refused ? refused_pause : reconnect_pause);
  }
  s.moved_ns = 0;
  ++conversations_;
}

clients::end clients::attempt(stream& s, const drill::conversation& talk, const std::string& key,
                              answer& got) {
  const json body{{"prompt", talk.prompt},
                  {"temperature", 0},
                  {"max_tokens", max_tokens},
                  {"return_token_ids", true},
                  {"stream", true}};
  http::sse_parser parser;
  std::size_t index = 0;
  bool done = false, failed = false;
  const auto on_piece = [&](std::string_view piece) {
    auto events = parser.feed(piece);
    if (!events) {
      got.problem = events.error().text();
      failed = true;
      return false;
    }
    for (const auto& event : *events)
      if (!take_event(s, event.data, index, got, done)) {
        failed = true;
        return false;
      }
    return true;
  };
  auto reply = http::fetch_stream({"POST",
                                   endpoint_ + "/v1/completions",
                                   {{"Content-Type", "application/json"}, {"Idempotency-Key", key}},
                                   body.dump()},
                                  timeouts, on_piece);
  if (failed)
    return end::failed;
  if (!reply) {
    got.problem = reply.error().cause;
    // The same key again finds the answer where it was left, if the frontend is back.
    const auto code = reply.error().code;
    return code == error_code::unavailable || code == error_code::peer_lost ? end::broke
                                                                            : end::failed;
  }
  if (reply->status == 200 && done)
    return end::done;
  got.problem = reply->status == 200 ? "the stream ended without [DONE]"
                                     : fmt::format("status {}: {}", reply->status, reply->body);
  return reply->status == 503 ? end::refused : reply->status == 200 ? end::broke : end::failed;
}

bool clients::take_event(stream& s, const std::string& data, std::size_t& index, answer& got,
                         bool& done) {
  if (data == "[DONE]") {
    done = true;
    return true;
  }
  const auto now = now_ns();
  auto chunk = json::parse(data, nullptr, false);
  if (!chunk.is_object() || chunk.contains("error")) {
    got.problem = "the stream says " + data;
    return false;
  }
  auto choices = chunk.find("choices");
  if (choices == chunk.end() || !choices->is_array())
    return true;
  for (const auto& choice : *choices) {
    auto tokens = choice.find("token_ids");
    if (tokens == choice.end() || !tokens->is_array())
      continue;
    for (const auto& token : *tokens) {
      if (!token.is_number_integer()) {
        got.problem = "not a token: " + token.dump();
        return false;
      }
      const auto id = token.get<std::int32_t>();
      const auto at = index++;
      if (at < got.tokens.size()) {
        got.repeated_otherwise = got.repeated_otherwise || got.tokens[at] != id;
        continue;
      }
      got.tokens.push_back(id);
      if (got.last_ns != 0) {
        std::lock_guard lock(s.mutex);
        s.gaps.push_back({s.number, got.last_ns, now});
      }
      got.last_ns = now;
      s.moved_ns = now;
      ++tokens_;
    }
  }
  return true;
}

void clients::judge(const drill::conversation& talk, const answer& got) {
  const auto found = drill::compare(talk.tokens, got.tokens);
  lost_ += found.lost;
  duplicated_ += found.duplicated;
  wrong_ += found.wrong + (got.repeated_otherwise ? 1 : 0);
  if (found.any())
    report(fmt::format("\"{}\": the answer {}", talk.question, found.text()));
  if (got.repeated_otherwise)
    report(fmt::format("\"{}\": a retry gave other tokens than before", talk.question));
}

std::vector<drill::gap> clients::take_gaps() {
  std::vector<drill::gap> result;
  std::lock_guard lock(mutex_);
  for (auto& s : streams_) {
    std::lock_guard inner(s->mutex);
    result.insert(result.end(), s->gaps.begin(), s->gaps.end());
    s->gaps.clear();
  }
  return result;
}

std::vector<std::string> clients::take_problems() {
  std::lock_guard lock(mutex_);
  return std::exchange(problems_, {});
}

bool clients::all_went_on_since(std::int64_t ns) const {
  std::lock_guard lock(mutex_);
  return std::ranges::all_of(streams_, [&](const auto& s) {
    const auto moved = s->moved_ns.load();
    return moved == 0 || moved > ns;
  });
}

drill::tally clients::counts() const {
  return {conversations_, tokens_, lost_, duplicated_, wrong_, errors_, reconnects_, refused_};
}

} // namespace troupe::tools::drills
