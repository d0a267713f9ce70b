#include "troupe/http/openai_logprobs.hpp"

#include "troupe/http/openai_json.hpp"
#include "troupe/model/tokenizer.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <vector>

namespace troupe::http {

namespace {

void separate(std::string& list) {
  if (!list.empty())
    list += ',';
}

/// The best tokens that an answer may show: never more than were asked for.
std::size_t num_shown(const schedule::output_token& token, std::size_t num_best) {
  return std::min({num_best, token.top_tokens.size(), token.top_logprobs.size()});
}

} // namespace

void token_namer::append_name(std::string& out, std::int32_t token) const {
  if (as_ids_)
    fmt::format_to(std::back_inserter(out), "\"token_id:{}\"", token);
  else
    append_json_string(out, tokenizer_->token_bytes(token));
}

void token_namer::append_bytes(std::string& out, std::int32_t token) const {
  out += '[';
  bool first = true;
  for (const char c : tokenizer_->token_bytes(token)) {
    fmt::format_to(std::back_inserter(out), "{}{}", first ? "" : ",",
                   static_cast<unsigned>(static_cast<unsigned char>(c)));
    first = false;
  }
  out += ']';
}

std::uint32_t token_namer::num_characters(std::int32_t token) const {
  // A character counts where its first byte is, so that those cut across tokens count once.
  std::uint32_t count = 0;
  for (const char c : tokenizer_->token_bytes(token))
    count += (static_cast<unsigned char>(c) & 0xC0) != 0x80;
  return count;
}

void logprob_list::begin_entry(std::int32_t token, bool visible) {
  ++count_;
  if (chat_)
    return;
  separate(tokens_);
  namer_.append_name(tokens_, token);
  separate(offsets_);
  fmt::format_to(std::back_inserter(offsets_), "{}", offset_);
  if (visible)
    offset_ += namer_.num_characters(token);
  separate(logprobs_);
  separate(best_);
}

void logprob_list::add_unscored(std::int32_t token, bool visible) {
  begin_entry(token, visible);
  logprobs_ += "null";
  best_ += "null";
}

void logprob_list::add(const schedule::output_token& token, bool visible) {
  begin_entry(token.token, visible);
  if (chat_) {
    add_chat_entry(token);
  } else {
    append_json_logprob(logprobs_, token.logprob);
    add_best(token);
  }
}

void logprob_list::add_chat_entry(const schedule::output_token& token) {
  const auto append_token = [this](std::int32_t id, float logprob) {
    entries_ += R"({"token":)";
    namer_.append_name(entries_, id);
    entries_ += R"(,"logprob":)";
    append_json_logprob(entries_, logprob);
    entries_ += R"(,"bytes":)";
    namer_.append_bytes(entries_, id);
  };
  separate(entries_);
  append_token(token.token, token.logprob);
  entries_ += R"(,"top_logprobs":[)";
  for (std::size_t i = 0; i < num_shown(token, num_best_); ++i) {
    if (i > 0)
      entries_ += ',';
    append_token(token.top_tokens[i], token.top_logprobs[i]);
    entries_ += '}';
  }
  entries_ += "]}";
}

void logprob_list::add_best(const schedule::output_token& token) {
  // Different tokens may have the same name, for instance two halves of a character: the
  // more likely one keeps it, for a JSON object has each key once.
  std::vector<std::string> names;
  best_ += '{';
  const auto append_token = [&](std::int32_t id, float logprob) {
    std::string name;
    namer_.append_name(name, id);
    if (std::find(names.begin(), names.end(), name) != names.end())
      return;
    if (!names.empty())
      best_ += ',';
    best_ += name;
    best_ += ':';
    append_json_logprob(best_, logprob);
    names.push_back(std::move(name));
  };
  append_token(token.token, token.logprob);
  for (std::size_t i = 0; i < num_shown(token, num_best_); ++i)
    append_token(token.top_tokens[i], token.top_logprobs[i]);
  best_ += '}';
}

void logprob_list::write(std::string& out) {
  if (chat_)
    out.append(R"({"content":[)").append(entries_).append("]}");
  else
    out.append(R"({"text_offset":[)")
      .append(offsets_)
      .append(R"(],"token_logprobs":[)")
      .append(logprobs_)
      .append(R"(],"tokens":[)")
      .append(tokens_)
      .append(R"(],"top_logprobs":[)")
      .append(best_)
      .append("]}");
  for (std::string* list : {&entries_, &tokens_, &logprobs_, &best_, &offsets_})
    list->clear();
  count_ = 0;
}

void append_prompt_logprobs(std::string& out, std::span<const std::int32_t> prompt,
                            std::span<const schedule::output_token> scored, std::int32_t num_best,
                            const token_namer& namer) {
  const auto append_token = [&](std::int32_t id, float logprob, std::size_t rank) {
    fmt::format_to(std::back_inserter(out), R"("{}":{{"logprob":)", id);
    append_json_logprob(out, logprob);
    if (rank > 0)
      fmt::format_to(std::back_inserter(out), R"(,"rank":{},"decoded_token":)", rank);
    else
      out += R"(,"rank":null,"decoded_token":)";
    namer.append_name(out, id);
    out += '}';
  };
  out += '[';
  for (std::size_t i = 0; i < prompt.size(); ++i) {
    if (i > 0)
      out += ',';
    // Where no score arrived, an empty list of best tokens and logprob 0 would be a lie.
    if (i == 0 || i >= scored.size() || scored[i].token != prompt[i]) {
      out += "null";
      continue;
    }
    const schedule::output_token& token = scored[i];
    const auto& best = token.top_tokens;
    const auto found = std::find(best.begin(), best.end(), token.token);
    const auto rank =
      found == best.end() ? std::size_t{0} : static_cast<std::size_t>(found - best.begin()) + 1;
    out += '{';
    append_token(token.token, token.logprob, rank);
    for (std::size_t k = 0; k < num_shown(token, static_cast<std::size_t>(num_best)); ++k) {
      if (best[k] == token.token)
        continue;
      out += ',';
      append_token(best[k], token.top_logprobs[k], k + 1);
    }
    out += '}';
  }
  out += ']';
}

} // namespace troupe::http
