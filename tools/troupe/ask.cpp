#include "commands.hpp"

#include "troupe/http/client.hpp"
#include "troupe/http/sse.hpp"

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <iostream>
#include <memory>
#include <optional>

#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <unistd.h>

namespace troupe::tools {

namespace {

using namespace std::chrono_literals;
using nlohmann::json;

std::atomic<bool> interrupted{false};

struct talk_arguments {
  std::string cluster, endpoint, question, system;
  std::optional<double> temperature;
  std::optional<std::uint64_t> seed;
  std::uint32_t max_tokens = 0;
  bool hide_thinking = false;
};

/// Streams one answer to the terminal, thinking dimmed, and returns its content.
expected<std::string> stream_answer(const std::string& endpoint, const talk_arguments& given,
                                    const json& messages) {
  json body{{"messages", messages}, {"stream", true}};
  auto models = http::fetch({"GET", endpoint + "/v1/models", {}, {}}, 5000ms);
  if (!models)
    return tl::unexpected(models.error());
  auto listed = json::parse(models->body, nullptr, false);
  if (!listed.is_object() || !listed.contains("data") || listed["data"].empty())
    return fail(error_code::internal, endpoint + " lists no models");
  body["model"] = listed["data"][0]["id"];
  if (given.temperature)
    body["temperature"] = *given.temperature;
  if (given.seed)
    body["seed"] = *given.seed;
  if (given.max_tokens > 0)
    body["max_tokens"] = given.max_tokens;

  const char* dim = has_colours() ? "\033[2m" : "";
  const char* plain = has_colours() ? "\033[0m" : "";
  http::sse_parser parser;
  std::string content;
  std::optional<error> failed;
  bool thinking = false;
  auto show = [&](const std::string& text, bool is_thinking) {
    if (is_thinking != thinking)
      fmt::print("{}", is_thinking ? dim : plain);
    thinking = is_thinking;
    fmt::print("{}", text);
    std::fflush(stdout);
  };
  auto on_piece = [&](std::string_view piece) {
    auto events = parser.feed(piece);
    if (!events) {
      failed = events.error();
      return false;
    }
    for (const auto& event : *events) {
      if (event.data == "[DONE]")
        continue;
      auto chunk = json::parse(event.data, nullptr, false);
      if (!chunk.is_object())
        continue;
      if (chunk.contains("error")) {
        failed = error{error_code::unavailable,
                       chunk["error"].value("message", "the answer broke off"), "", ""};
        return false;
      }
      for (const auto& choice : chunk.value("choices", json::array())) {
        auto delta = choice.value("delta", json::object());
        if (delta.contains("reasoning") && delta["reasoning"].is_string() && !given.hide_thinking)
          show(delta["reasoning"].get<std::string>(), true);
        if (delta.contains("content") && delta["content"].is_string()) {
          auto text = delta["content"].get<std::string>();
          if (!text.empty())
            show(text, false);
          content += text;
        }
      }
    }
    return !interrupted.load();
  };
  http::client_request request{
    "POST", endpoint + "/v1/chat/completions", {{"Content-Type", "application/json"}}, body.dump()};
  auto answer = http::fetch_stream(request, {}, on_piece);
  fmt::print("{}\n", plain);
  if (failed)
    return tl::unexpected(*failed);
  if (!answer)
    return tl::unexpected(answer.error());
  if (answer->status != 200) {
    auto refused = json::parse(answer->body, nullptr, false);
    std::string message = answer->body;
    if (refused.is_object() && refused.contains("error"))
      message = refused["error"].value("message", message);
    return fail(error_code::invalid_request, fmt::format("{} (HTTP {})", message, answer->status));
  }
  return content;
}

void add_talk_options(CLI::App* sub, const std::shared_ptr<talk_arguments>& given) {
  sub->add_option("--cluster", given->cluster,
                  "name of the cluster; may be left out if only one runs");
  sub->add_option("--endpoint", given->endpoint,
                  "ask this frontend instead, for instance 10.0.0.1:8000");
  sub->add_option("--system", given->system, "system message");
  sub->add_option("--temperature", given->temperature, "0 always takes the likeliest token");
  sub->add_option("--seed", given->seed, "the same seed draws the same answer");
  sub->add_option("--max-tokens", given->max_tokens, "end the answer there");
  sub->add_flag("--hide-thinking", given->hide_thinking, "show the answer only");
}

json first_messages(const talk_arguments& given) {
  json messages = json::array();
  if (!given.system.empty())
    messages.push_back({{"role", "system"}, {"content", given.system}});
  return messages;
}

int chat(const talk_arguments& given) {
  auto endpoint = resolve_endpoint(given.cluster, given.endpoint);
  if (!endpoint)
    return complain(endpoint.error());
  bool terminal = ::isatty(STDIN_FILENO) == 1;
  struct sigaction action {};
  action.sa_handler = [](int) { interrupted.store(true); };
  ::sigaction(SIGINT, &action, nullptr); // without SA_RESTART: a read is interrupted too
  if (terminal)
    fmt::print("Talking to {}. Ctrl-C stops an answer, /new forgets the conversation, /quit or "
               "Ctrl-D ends.\n",
               *endpoint);
  auto messages = first_messages(given);
  for (;;) {
    if (terminal)
      fmt::print("{}> {}", has_colours() ? "\033[1m" : "", has_colours() ? "\033[0m" : "");
    std::fflush(stdout);
    std::string line;
    interrupted.store(false);
    if (!std::getline(std::cin, line) || line == "/quit") {
      if (terminal)
        fmt::print("\n");
      return EXIT_SUCCESS;
    }
    if (line.empty())
      continue;
    if (line == "/new") {
      messages = first_messages(given);
      continue;
    }
    messages.push_back({{"role", "user"}, {"content", line}});
    auto answer = stream_answer(*endpoint, given, messages);
    if (!answer) {
      complain(answer.error());
      messages.erase(messages.size() - 1);
      if (!terminal)
        return EXIT_FAILURE;
      continue;
    }
    messages.push_back({{"role", "assistant"}, {"content", *answer}});
  }
}

} // namespace

void add_ask(CLI::App& app, command& run) {
  auto given = std::make_shared<talk_arguments>();
  auto* sub = app.add_subcommand("ask", "Ask one question; the answer streams to the terminal");
  sub->add_option("QUESTION", given->question, "what to ask")->required();
  add_talk_options(sub, given);
  sub->callback([given, &run] {
    run = [given] {
      auto endpoint = resolve_endpoint(given->cluster, given->endpoint);
      if (!endpoint)
        return complain(endpoint.error());
      auto messages = first_messages(*given);
      messages.push_back({{"role", "user"}, {"content", given->question}});
      auto answer = stream_answer(*endpoint, *given, messages);
      return answer ? EXIT_SUCCESS : complain(answer.error());
    };
  });
}

void add_chat(CLI::App& app, command& run) {
  auto given = std::make_shared<talk_arguments>();
  auto* sub = app.add_subcommand("chat", "Talk in the terminal");
  add_talk_options(sub, given);
  sub->callback([given, &run] { run = [given] { return chat(*given); }; });
}

} // namespace troupe::tools
