#include "troupe/actors/gateway.hpp"
#include "troupe/http/answer_replay.hpp"

#include <algorithm>
#include <chrono>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

/// The part of the gateway that answers completions.
namespace troupe::actors {

namespace {

constexpr std::size_t max_key_bytes = 255;
constexpr const char* chat_route = "/v1/chat/completions";
constexpr const char* text_route = "/v1/completions";
constexpr const char* responses_route = "/v1/responses/{}";
constexpr int unprocessable = 422; // RFC 9110, 15.5.21

schedule::time_point current_time() {
  return std::chrono::steady_clock::now();
}

std::int64_t unix_milliseconds() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(
           std::chrono::system_clock::now().time_since_epoch())
    .count();
}

http::error_reply key_fault(const std::string& what, const char* reason) {
  return http::error_response(
    http::refuse(error_code::invalid_request, "Idempotency-Key", what, reason).value());
}

} // namespace

void gateway::serve_completion(http_call& call, bool chat) {
  const char* route = chat ? chat_route : text_route;
  std::string key{call.request.header("Idempotency-Key").value_or("")};
  if (key.size() > max_key_bytes)
    return refuse(call, route,
                  key_fault(fmt::format("{} bytes (allowed: up to {})", key.size(), max_key_bytes),
                            "invalid_idempotency_key"));
  if (const auto* known = key.empty() ? nullptr : journal_.log().find_key(key)) {
    if (known->what.chat == chat && known->what.body == call.request.body)
      return attach(call, route, *known, std::nullopt);
    // As the IETF's draft has it (draft-ietf-httpapi-idempotency-key-header, 2.7).
    auto reply = key_fault("it was used for another request", "idempotency_mismatch");
    reply.status = unprocessable;
    return refuse(call, route, reply);
  }
  if (plan_.num_replicas() == 0 || !(was_ready_ || is_ready()))
    return refuse(call, route,
                  http::error_response(fail(error_code::unavailable, "the cluster is starting",
                                            "wait until GET /health answers 200")
                                         .value()));
  seed_state_ = seed_state_ * 6364136223846793005U + 1442695040888963407U; // Knuth's MMIX generator
  auto seed = seed_state_ >> 16U;
  auto created_ms = unix_milliseconds();
  auto parsed =
    chat ? http::parse_chat_request(call.request.body, options_.served, seed, created_ms / 1000)
         : http::parse_text_request(call.request.body, options_.served, seed);
  if (!parsed)
    return refuse(call, route, http::error_response(parsed.error()));
  auto arrived = current_time();
  auto requests = http::to_schedule(*parsed, next_request_,
                                    arrived + std::chrono::seconds(plan_.request_timeout_s()));
  auto call_id = next_call_++;
  schedule::accepted_call accepted;
  accepted.id = call_id;
  accepted.chat = chat;
  accepted.body = std::move(call.request.body);
  accepted.seed = seed;
  accepted.created_ms = created_ms;
  accepted.deadline_ms = accepted.created_ms + std::int64_t{1000} * plan_.request_timeout_s();
  accepted.first_request = next_request_;
  accepted.num_choices = static_cast<std::uint32_t>(requests.size());
  accepted.keeps_scores = parsed->num_logprobs >= 0 || parsed->num_prompt_logprobs >= 0;

  open_call open;
  open.route = route;
  open.goes_on = !key.empty();
  open.first_id = next_request_;
  open.num_requests = accepted.num_choices;
  open.arrived = arrived;
  open.last_token.resize(requests.size());
  next_request_ += requests.size();

  http::answer_identity identity;
  identity.id = http::answer_id(call_id);
  identity.model = options_.served.name;
  identity.created_s = accepted.created_ms / 1000;
  identity.first_id = open.first_id;
  bool stream = parsed->stream;
  listener first{
    next_listener_++, call.response,
    http::response_builder(std::move(*parsed), *options_.tokenizer, std::move(identity)), stream,
    false};

  accepted.key = std::move(key);
  auto now_ms = accepted.created_ms;
  journal_.accept(std::move(accepted));
  journal_.flush(now_ms);
  auto& placed = calls_.emplace(call_id, std::move(open)).first->second;
  for (const auto& r : requests) {
    call_of_[r.id] = call_id;
    metrics_.count_tokens(r.prompt.size(), 0);
  }
  add_listener(call_id, placed, std::move(first));
  submit(placed, std::move(requests));
}

void gateway::submit(open_call& call, std::vector<schedule::request> requests) {
  auto* target = choose_replica();
  call.replica = target->report.replica;
  call.submitted = true;
  for (auto& r : requests) {
    ++target->report.counters
        .num_queued; // until its next report: spreads a burst over the replicas
    send(target->scheduler, std::make_shared<schedule::request>(std::move(r)));
  }
}

void gateway::take_up_calls() {
  auto now_ms = unix_milliseconds();
  std::vector<const schedule::logged_call*> unfinished;
  for (const auto& [id, logged] : journal_.log().calls())
    if (logged.state == schedule::call_state::in_progress)
      unfinished.push_back(&logged);
  for (const auto* logged : unfinished) {
    auto call_id = logged->what.id;
    auto builder = http::rebuild(*logged, options_.served);
    if (!builder || logged->what.deadline_ms <= now_ms) {
      auto why = builder ? fail(error_code::deadline_exceeded,
                                "the request's time was over when the frontend was back",
                                "serving.request_timeout_s sets the limit")
                             .value()
                         : builder.error();
      journal_.fail(call_id, why, now_ms);
      continue;
    }
    open_call open;
    open.route = logged->what.chat ? chat_route : text_route;
    open.goes_on = true;
    open.first_id = logged->what.first_request;
    open.num_requests = logged->what.num_choices;
    open.arrived = current_time();
    open.last_token.assign(open.num_requests, open.arrived);
    out_.clear();
    http::replay(*logged, *builder, out_);
    bool done = builder->done();
    // Whose text ended with a stop string, and nobody came to say so.
    for (std::uint32_t i = 0; i < open.num_requests; ++i) {
      if (builder->ended(i))
        journal_.end_choice(open.first_id + i, now_ms);
      else
        call_of_[open.first_id + i] = call_id;
    }
    if (done)
      continue;
    bool stream = builder->request().stream;
    open.listeners.push_back({0, nullptr, std::move(*builder), stream, false});
    calls_.emplace(call_id, std::move(open));
  }
  journal_.flush(now_ms);
  metrics_.count_resumed(calls_.size());
  if (!calls_.empty())
    spdlog::info("{} requests of the last frontend go on", calls_.size());
}

void gateway::submit_taken_up() {
  auto now_ms = unix_milliseconds();
  std::vector<std::pair<open_call*, std::vector<schedule::request>>> rest;
  for (auto& [call_id, call] : calls_) {
    const auto* logged = journal_.log().find(call_id);
    if (call.submitted || logged == nullptr)
      continue;
    auto deadline = current_time() + std::chrono::milliseconds(logged->what.deadline_ms - now_ms);
    rest.emplace_back(&call,
                      http::requests_to_resume(*logged, call.listeners.front().builder, deadline));
  }
  // All of it has to be computed again: what is short first gets most of them going soon.
  auto length = [](const auto& entry) {
    std::size_t sum = 0;
    for (const auto& r : entry.second)
      sum += r.prompt.size() + r.generated.size();
    return sum;
  };
  std::stable_sort(rest.begin(), rest.end(),
                   [&](const auto& a, const auto& b) { return length(a) < length(b); });
  for (auto& [call, requests] : rest)
    submit(*call, std::move(requests));
}

void gateway::serve_response(http_call& call) {
  auto name = std::string_view(call.request.path).substr(std::string_view("/v1/responses/").size());
  auto id = http::call_of_answer(name);
  const auto* known = id ? journal_.log().find(*id) : nullptr;
  if (known == nullptr)
    return refuse(
      call, responses_route,
      http::error_response(http::refusal{
        fail(error_code::not_found, fmt::format("there is no answer {}", name),
             fmt::format("answers are kept for {} s", options_.journal.limits.retain_ms / 1000))
          .value(),
        "id", "response_not_found"}));
  if (call.request.query_value("stream") == "true")
    return attach(call, responses_route, *known, true);
  auto body = http::response_body(*known, options_.served);
  if (body)
    answer(call, responses_route, 200, std::move(*body));
  else
    refuse(call, responses_route, http::error_response(body.error()));
}

void gateway::attach(http_call& call, const char* route, const schedule::logged_call& known,
                     std::optional<bool> stream) {
  auto builder = http::rebuild(known, options_.served, stream);
  if (!builder)
    return refuse(call, route, http::error_response(builder.error()));
  bool is_stream = builder->request().stream;
  out_.clear();
  if (is_stream)
    builder->open(out_);
  http::replay(known, *builder, out_);
  bool failed = known.state == schedule::call_state::failed;
  if (failed)
    builder->fail(known.why, out_);
  if (failed && !is_stream)
    return refuse(call, route, http::error_response(known.why));
  if (!is_stream && builder->done())
    return answer(call, route, 200, std::exchange(out_, {}));
  bool done = builder->done();
  listener l{next_listener_++, call.response, std::move(*builder), is_stream, is_stream};
  if (is_stream) {
    metrics_.count_response(route, 200);
    l.response->begin_stream(200, "text/event-stream", {{"Cache-Control", "no-cache"}});
    if (!out_.empty())
      l.response->write(out_);
  }
  if (done)
    return l.response->end();
  auto found = calls_.find(known.what.id);
  if (found == calls_.end())
    return l.response->end(); // every call in progress is open
  add_listener(known.what.id, found->second, std::move(l));
}

void gateway::add_listener(std::uint64_t call_id, open_call& call, listener l) {
  // Nobody's text is not needed any more: this listener's says the same.
  std::erase_if(call.listeners, [](const auto& other) { return other.response == nullptr; });
  listeners_.emplace(l.id, call_id);
  auto response = l.response;
  auto listener_id = l.id;
  call.listeners.push_back(std::move(l));
  auto self = caf::actor_cast<gateway_actor>(this);
  response->on_disconnect(
    [self, listener_id] { caf::anon_send(self, cancel_atom::value, listener_id); });
}

void gateway::remove_listener(std::uint64_t listener_id) {
  auto call_id = listeners_.find(listener_id);
  if (call_id == listeners_.end())
    return;
  auto found = calls_.find(call_id->second);
  listeners_.erase(call_id);
  if (found == calls_.end())
    return;
  auto& call = found->second;
  auto left = std::find_if(call.listeners.begin(), call.listeners.end(),
                           [&](const auto& l) { return l.id == listener_id; });
  if (left == call.listeners.end())
    return;
  if (call.listeners.size() > 1) {
    call.listeners.erase(left);
  } else if (call.goes_on) {
    left->response = nullptr;
  } else {
    journal_.forget(found->first);
    journal_.flush(unix_milliseconds());
    close_call(found->first);
  }
}

void gateway::cancel_requests(const open_call& call) {
  for (std::uint32_t i = 0; i < call.num_requests; ++i) {
    auto id = call.first_id + i;
    if (call_of_.erase(id) != 0 && call.submitted)
      send(replicas_[call.replica].scheduler, cancel_atom::value, id);
  }
}

void gateway::close_call(std::uint64_t call_id) {
  auto found = calls_.find(call_id);
  if (found == calls_.end())
    return;
  cancel_requests(found->second);
  for (const auto& l : found->second.listeners)
    listeners_.erase(l.id);
  calls_.erase(found);
}

void gateway::fail_call(std::uint64_t call_id, open_call& call, const error& why) {
  // Whom the queue has turned away has brought nothing worth keeping.
  if (why.code == error_code::overloaded)
    journal_.forget(call_id);
  else
    journal_.fail(call_id, why, unix_milliseconds());
  for (auto& l : call.listeners) {
    if (!l.response)
      continue;
    out_.clear();
    l.builder.fail(why, out_);
    if (l.begun) {
      l.response->write(out_);
      l.response->end();
      continue;
    }
    auto reply = http::error_response(why);
    http::header_list extra;
    if (reply.retry_after_s)
      extra.push_back({"Retry-After", std::to_string(*reply.retry_after_s)});
    metrics_.count_response(call.route, reply.status);
    l.response->send(reply.status, "application/json", std::move(reply.body), std::move(extra));
  }
  close_call(call_id);
}

void gateway::measure(open_call& call, const schedule::token_event& event) {
  if (!event.has_token || event.is_prompt)
    return;
  auto& last = call.last_token[event.request - call.first_id];
  auto time = current_time();
  if (event.token_index == 0)
    metrics_.first_token(time - call.arrived);
  else
    metrics_.between_tokens(time - last);
  last = time;
  metrics_.count_tokens(0, 1);
}

void gateway::begin_stream(const open_call& call, listener& l) {
  l.begun = true;
  metrics_.count_response(call.route, 200);
  l.response->begin_stream(200, "text/event-stream", {{"Cache-Control", "no-cache"}});
  l.builder.open(out_);
}

void gateway::on_event(std::uint64_t call_id, open_call& call, const schedule::token_event& event) {
  measure(call, event);
  http::response_builder::step step; // the same for every listener
  for (auto& l : call.listeners) {
    out_.clear();
    if (l.stream && !l.begun && l.response)
      begin_stream(call, l);
    step = l.builder.on_event(event, out_);
    if (!l.response)
      continue;
    if (l.stream) {
      if (!out_.empty())
        l.response->write(out_);
      if (step.done)
        l.response->end();
    } else if (step.done) {
      metrics_.count_response(call.route, 200);
      l.response->send(200, "application/json", std::exchange(out_, {}));
    }
  }
  if (step.cancel) {
    journal_.end_choice(event.request, unix_milliseconds());
    if (call_of_.erase(event.request) != 0)
      send(replicas_[call.replica].scheduler, cancel_atom::value, event.request);
  }
  if (event.finish != schedule::finish_reason::none)
    call_of_.erase(event.request);
  if (step.done)
    close_call(call_id);
}

void gateway::on_progress(const progress& made) {
  // All tokens of the step in one write, before anybody sees one of them.
  auto now_ms = unix_milliseconds();
  for (const auto& event : made.events)
    journal_.append(event, now_ms);
  journal_.flush(now_ms);
  for (const auto& event : made.events) {
    auto id = call_of_.find(event.request);
    if (id == call_of_.end())
      continue; // the client left, or its stop string came
    auto call_id = id->second;
    auto& call = calls_.at(call_id);
    on_event(call_id, call, event);
  }
  for (const auto& [request, why] : made.errors) {
    auto id = call_of_.find(request);
    if (id == call_of_.end())
      continue;
    auto call_id = id->second;
    fail_call(call_id, calls_.at(call_id), why);
  }
  journal_.flush(now_ms);
}

} // namespace troupe::actors
