#include "streams.hpp"

#include "troupe/http/sse.hpp"

#include <algorithm>
#include <fstream>

#include <catch2/catch.hpp>
#include <fmt/format.h>

namespace troupe::process_tests {

namespace {

/// Longer than any busy machine takes for a token: something waited for a deadline.
constexpr auto longest_honest_pause = 10s;

std::vector<conversation> read_golden() {
  std::ifstream file(source_path("configs/models/troupe-mini/golden.json"));
  std::vector<conversation> result;
  for (const auto& entry : json::parse(file))
    result.push_back({entry.at("question"), entry.at("prompt"), entry.at("tokens"),
                      entry.at("text"), entry.at("answer"), entry.at("prompt_logprobs"),
                      entry.at("top_logprobs")});
  return result;
}

/// Takes one event of a stream; what is wrong with it, or nothing.
std::string take_event(const std::string& data, stream_result& result, bool& done) {
  if (done)
    return "an event after [DONE]: " + data;
  if (data == "[DONE]") {
    done = true;
    return {};
  }
  auto chunk = json::parse(data, nullptr, false);
  if (!chunk.is_object())
    return "not JSON: " + data;
  if (chunk.contains("error"))
    return data;
  if (auto id = chunk.value("id", ""); result.id.empty())
    result.id = id;
  else if (result.id != id)
    return "a chunk of another answer: " + data;
  for (const auto& choice : chunk.value("choices", json::array())) {
    if (!result.finish.empty())
      return "a chunk after the last one: " + data;
    auto now = steady::now();
    for (std::int32_t token : choice.value("token_ids", json::array())) {
      result.tokens.push_back(token);
      result.times.push_back(now);
    }
    result.text += choice.value("text", "");
    if (const auto& finish = choice.at("finish_reason"); finish.is_string())
      result.finish = finish;
  }
  return {};
}

} // namespace

const std::vector<conversation>& golden() {
  static const auto all = read_golden();
  return all;
}

json golden_request(const conversation& c) {
  return {{"prompt", c.prompt},
          {"temperature", 0},
          {"max_tokens", 256},
          {"stream", true},
          {"return_token_ids", true}};
}

std::string stream_result::difference(const conversation& c) const {
  auto where = fmt::format("\"{}\": ", c.question);
  if (!problem.empty())
    return fmt::format("{}{} (after {} tokens)", where, problem, tokens.size());
  for (std::size_t i = 0; i < std::max(tokens.size(), c.tokens.size()); ++i) {
    if (i >= tokens.size())
      return fmt::format("{}the tokens from index {} on are lost", where, i);
    if (i >= c.tokens.size())
      return fmt::format("{}a token too many at index {}: {}", where, i, tokens[i]);
    if (tokens[i] != c.tokens[i])
      return fmt::format("{}token {} is {}, not {}", where, i, tokens[i], c.tokens[i]);
  }
  if (finish != "stop")
    return fmt::format("{}finish_reason is \"{}\"", where, finish);
  return text == c.text ? "" : fmt::format("{}the text is \"{}\"", where, text);
}

stream_result stream_completion(const std::string& endpoint, const json& request,
                                const std::function<bool(const stream_result&)>& on_tokens,
                                const std::string& key) {
  stream_result result;
  http::sse_parser parser;
  bool done = false;
  bool left = false;
  auto on_piece = [&](std::string_view piece) {
    auto events = parser.feed(piece);
    if (!events) {
      result.problem = events.error().text();
      return false;
    }
    for (const auto& event : *events) {
      result.problem = take_event(event.data, result, done);
      if (!result.problem.empty())
        return false;
    }
    left = !events->empty() && on_tokens && !on_tokens(result);
    return !left;
  };
  http::header_list headers{{"Content-Type", "application/json"}};
  if (!key.empty())
    headers.push_back({"Idempotency-Key", key});
  auto answer =
    http::fetch_stream({"POST", endpoint + "/v1/completions", std::move(headers), request.dump()},
                       {5s, 60s}, on_piece);
  if (!answer) {
    result.problem = answer.error().text();
    return result;
  }
  result.status = answer->status;
  if (answer->status != 200)
    result.problem = fmt::format("status {}: {}", answer->status, answer->body);
  else if (result.problem.empty() && !done && !left)
    result.problem = "the stream ended without [DONE]";
  return result;
}

std::vector<std::string> run_golden_crowd(const std::string& endpoint) {
  std::vector<stream_result> results(golden().size());
  std::vector<std::thread> clients;
  for (std::size_t i = 0; i < results.size(); ++i)
    clients.emplace_back(
      [&, i] { results[i] = stream_completion(endpoint, golden_request(golden()[i])); });
  for (auto& client : clients)
    client.join();
  std::vector<std::string> problems;
  for (std::size_t i = 0; i < results.size(); ++i) {
    const auto& times = results[i].times;
    for (std::size_t t = 1; t < times.size(); ++t)
      if (times[t] - times[t - 1] > longest_honest_pause)
        problems.push_back(fmt::format("\"{}\": {:.0f} ms between the tokens {} and {}",
                                       golden()[i].question, milliseconds(times[t] - times[t - 1]),
                                       t - 1, t));
    if (auto difference = results[i].difference(golden()[i]); !difference.empty())
      problems.push_back(difference);
  }
  return problems;
}

golden_load::golden_load(std::string endpoint, std::size_t stride)
  : endpoint_(std::move(endpoint)) {
  for (std::size_t i = 0; i < golden().size(); i += stride) {
    clients_.push_back(std::make_unique<client>());
    auto& c = *clients_.back();
    c.thread = std::thread([this, &c, i] { converse(c, golden()[i]); });
  }
}

golden_load::~golden_load() {
  finish();
}

void golden_load::converse(client& c, const conversation& talk) {
  auto request = golden_request(talk);
  while (!stopping_ && c.problems.empty()) {
    auto result = stream_completion(endpoint_, request);
    if (auto difference = result.difference(talk); !difference.empty())
      c.problems.push_back(difference);
    for (std::size_t i = 1; i < result.times.size(); ++i)
      c.gaps.push_back({result.times[i - 1], result.times[i]});
    ++num_done_;
    num_tokens_ += result.tokens.size();
  }
}

void golden_load::finish() {
  stopping_ = true;
  for (auto& c : clients_)
    if (c->thread.joinable())
      c->thread.join();
}

steady::duration golden_load::longest_gap(steady::time_point from, steady::time_point to) const {
  steady::duration longest{};
  for (const auto& c : clients_)
    for (const auto& g : c->gaps)
      if (g.end > from && g.end <= to)
        longest = std::max(longest, g.end - g.begin);
  return longest;
}

std::vector<std::string> golden_load::problems() const {
  std::vector<std::string> result;
  for (const auto& c : clients_)
    result.insert(result.end(), c->problems.begin(), c->problems.end());
  return result;
}

std::string lines(const std::vector<std::string>& list) {
  std::string result;
  for (const auto& line : list)
    result += line + "\n";
  return result;
}

} // namespace troupe::process_tests
