#pragma once

#include "troupe/http/openai_request.hpp"
#include "troupe/http/openai_response.hpp"
#include "troupe/model/chat_template.hpp"
#include "troupe/model/tokenizer.hpp"

#include <nlohmann/json.hpp>

#include <cstdint>
#include <fstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace troupe::http::openai_testing {

using nlohmann::json;

inline const model::tokenizer& mini_tokenizer() {
  static const model::tokenizer loaded = [] {
    auto t = model::tokenizer::load(TROUPE_SOURCE_DIR "/configs/models/troupe-mini");
    if (!t)
      throw std::runtime_error(t.error().text());
    return std::move(*t);
  }();
  return loaded;
}

inline std::vector<std::int32_t> encode(std::string_view text) {
  return mini_tokenizer().encode(text).value();
}

inline const model::chat_renderer& mini_chat() {
  static const model::chat_renderer loaded = [] {
    auto c = model::chat_renderer::load(TROUPE_SOURCE_DIR "/configs/models/troupe-mini");
    if (!c)
      throw std::runtime_error(c.error().text());
    return std::move(*c);
  }();
  return loaded;
}

/// troupe-mini as it is served.
inline serving_model mini_model() {
  serving_model served;
  served.name = "troupe-mini";
  served.max_context = 2048;
  served.vocab_size = 1024;
  served.eos_tokens = {1018};
  served.defaults.temperature = 0.6F;
  served.defaults.top_p = 0.95F;
  served.tokenizer = &mini_tokenizer();
  served.chat = &mini_chat();
  return served;
}

inline completion_request parse_ok(const json& body, bool chat) {
  auto r = chat ? parse_chat_request(body.dump(), mini_model(), 7)
                : parse_text_request(body.dump(), mini_model(), 7);
  if (!r)
    throw std::runtime_error(r.error().text());
  return std::move(*r);
}

inline constexpr schedule::request_id kFirstId = 100;

inline schedule::token_event
token_event(std::uint32_t choice, std::uint32_t index, std::int32_t token,
            schedule::finish_reason finish = schedule::finish_reason::none) {
  schedule::token_event e;
  e.request = kFirstId + choice;
  e.has_token = true;
  e.token_index = index;
  e.token.token = token;
  e.token.logprob = -0.5F;
  e.finish = finish;
  return e;
}

inline schedule::token_event prompt_event(std::uint32_t choice, std::uint32_t position,
                                          std::int32_t token, float logprob) {
  schedule::token_event e = token_event(choice, position, token);
  e.is_prompt = true;
  e.token.logprob = logprob;
  return e;
}

/// Every event of a choice: the tokens in order, the last with `finish`.
inline std::vector<schedule::token_event> events_of(std::uint32_t choice,
                                                    const std::vector<std::int32_t>& tokens,
                                                    schedule::finish_reason finish) {
  std::vector<schedule::token_event> events;
  for (std::size_t i = 0; i < tokens.size(); ++i)
    events.push_back(token_event(choice, static_cast<std::uint32_t>(i), tokens[i],
                                 i + 1 == tokens.size() ? finish : schedule::finish_reason::none));
  return events;
}

inline response_builder builder_for(const json& body, bool chat) {
  return response_builder(parse_ok(body, chat), mini_tokenizer(),
                          {"1", "troupe-mini", 1700000000, kFirstId});
}

/// Feeds events and returns all that was sent.
inline std::string answer(response_builder& b, const std::vector<schedule::token_event>& events) {
  std::string out;
  b.open(out);
  for (const auto& e : events)
    b.on_event(e, out);
  return out;
}

/// The data of each frame.
inline std::vector<std::string> frames_of(std::string_view stream) {
  std::vector<std::string> frames;
  while (!stream.empty()) {
    const auto end = stream.find("\n\n");
    if (!stream.starts_with("data: ") || end == std::string_view::npos)
      throw std::runtime_error("not a frame: " + std::string(stream));
    frames.emplace_back(stream.substr(6, end - 6));
    stream.remove_prefix(end + 2);
  }
  return frames;
}

struct conversation {
  std::vector<std::int32_t> prompt;
  std::vector<std::int32_t> tokens;
  std::string text;
};

/// The model's own answers to 48 questions.
inline const std::vector<conversation>& golden() {
  static const std::vector<conversation> all = [] {
    std::ifstream file(TROUPE_SOURCE_DIR "/configs/models/troupe-mini/golden.json");
    std::vector<conversation> list;
    for (const json& c : json::parse(file))
      list.push_back({c["prompt"], c["tokens"], c["text"]});
    return list;
  }();
  return all;
}

} // namespace troupe::http::openai_testing
