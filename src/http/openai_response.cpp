#include "troupe/http/openai_response.hpp"

#include "troupe/http/openai_choice.hpp"
#include "troupe/http/openai_json.hpp"
#include "troupe/http/openai_logprobs.hpp"
#include "troupe/model/text_stream.hpp"
#include "troupe/model/tokenizer.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <optional>
#include <utility>
#include <vector>

namespace troupe::http {

namespace {

model::text_stream_options stream_options(const completion_request& r) {
  model::text_stream_options options;
  options.skip_special = r.skip_special_tokens;
  options.stop = r.stop;
  options.include_stop = r.include_stop;
  options.min_tokens = r.min_tokens;
  options.split_reasoning = r.split_reasoning;
  options.reasoning_open = r.reasoning_open;
  for (const std::string_view marker : model::tool_markers(r.calls_as))
    options.shown.emplace_back(marker);
  return options;
}

/// One choice on its way to the client. While streaming, text, ids and logprobs are what was
/// not sent yet; otherwise they are all of it.
struct choice {
  model::text_stream stream;
  logprob_list logprobs;
  std::string text;
  std::string reasoning;
  std::optional<model::tool_call_parser> parser; ///< where the model may call tools
  std::vector<tool_call> calls;
  std::vector<std::int32_t> token_ids;
  std::vector<schedule::output_token> scored; ///< by position of the prompt
  std::string call_prefix;                    ///< of the calls' ids
  std::uint64_t num_tokens = 0;
  std::uint64_t num_reasoning_tokens = 0;
  bool begun = false;      ///< the prompt's part, if any, was added
  bool sent = false;       ///< a chunk went out
  std::string_view finish; ///< OpenAI's word, once it has ended
  std::string stop_reason; ///< JSON

  choice(const completion_request& r, const model::tokenizer& t, const token_namer& namer)
    : stream(t, stream_options(r)), logprobs(namer, r.chat, std::max(r.num_logprobs, 0)) {
    if (r.calls_as != model::tool_syntax::none)
      parser.emplace(r.calls_as, r.tool_names, r.max_calls);
  }
};

} // namespace

struct response_builder::state {
  completion_request request;
  const model::tokenizer* tokenizer;
  answer_identity id;
  token_namer namer;
  std::vector<choice> choices;
  std::size_t num_ended = 0;
  bool failed = false;
  std::string head; ///< start of every object up to "choices":[

  state(completion_request r, const model::tokenizer& t, answer_identity i)
    : request(std::move(r)), tokenizer(&t), id(std::move(i)), namer(t, request.tokens_as_ids) {
    choices.reserve(request.num_choices());
    for (std::uint32_t c = 0; c < request.num_choices(); ++c) {
      choices.emplace_back(request, t, namer);
      // A function of the answer, so that whoever asks again gets the same.
      if (request.calls_as != model::tool_syntax::none)
        choices.back().call_prefix = fmt::format("call_{}-{}-", id.id, c);
    }
    const bool chat = request.chat;
    const char* object = !chat            ? "text_completion"
                         : request.stream ? "chat.completion.chunk"
                                          : "chat.completion";
    head = R"({"id":)";
    append_json_string(head, (chat ? "chatcmpl-" : "cmpl-") + id.id);
    fmt::format_to(std::back_inserter(head), R"(,"object":"{}","created":{},"model":)", object,
                   id.created_s);
    append_json_string(head, id.model);
    head += R"(,"choices":[)";
  }

  const prompt_input& prompt_of(std::size_t c) const { return request.prompts[c / request.n]; }
  bool done() const { return failed || num_ended == choices.size(); }

  token_usage usage() const {
    token_usage u;
    for (const prompt_input& p : request.prompts)
      u.prompt_tokens += p.tokens.size();
    for (const choice& c : choices) {
      u.completion_tokens += c.num_tokens;
      u.reasoning_tokens += c.num_reasoning_tokens;
    }
    return u;
  }

  void append_usage(std::string& out) const {
    const token_usage u = usage();
    fmt::format_to(std::back_inserter(out),
                   R"("usage":{{"prompt_tokens":{},"completion_tokens":{},"total_tokens":{},)"
                   R"("completion_tokens_details":{{"reasoning_tokens":{}}}}})",
                   u.prompt_tokens, u.completion_tokens, u.prompt_tokens + u.completion_tokens,
                   u.reasoning_tokens);
  }

  /// Keeps a prompt token's score until the answer needs it.
  void keep_score(choice& c, std::size_t position, const schedule::token_event& e) {
    if (position >= c.scored.size())
      return;
    c.scored[position] = e.token;
  }

  /// Puts the prompt in front of a choice that echoes it.
  void begin(std::size_t index) {
    choice& c = choices[index];
    c.begun = true;
    if (!request.echo)
      return;
    const prompt_input& p = prompt_of(index);
    if (p.text) {
      c.text = *p.text;
    } else {
      for (const std::int32_t token : p.tokens)
        c.text += tokenizer->token_bytes(token);
    }
    if (request.num_logprobs < 0)
      return;
    for (std::size_t i = 0; i < p.tokens.size(); ++i) {
      const bool visible = i >= p.num_added_tokens;
      const bool known = i > 0 && i < c.scored.size() && c.scored[i].token == p.tokens[i];
      if (known)
        c.logprobs.add(c.scored[i], visible);
      else
        c.logprobs.add_unscored(p.tokens[i], visible);
    }
  }

  void add_text(choice& c, const model::text_delta& delta) {
    if (c.parser)
      add_calls(c, c.parser->push(delta.content));
    else
      c.text += delta.content;
    if (request.include_reasoning)
      c.reasoning += delta.reasoning;
  }

  static void add_calls(choice& c, const model::tool_text& more) {
    c.text += more.content;
    for (const auto& piece : more.calls) {
      if (c.calls.empty() || c.calls.back().index != piece.index)
        c.calls.push_back({piece.index, piece.name, {}});
      c.calls.back().arguments += piece.arguments;
    }
  }

  void add_token(choice& c, const schedule::token_event& e) {
    const std::int32_t token = e.token.token;
    ++c.num_tokens;
    if (request.return_token_ids)
      c.token_ids.push_back(token);
    const bool was_reasoning = c.stream.in_reasoning();
    // A token that ends the text is no part of it, unless the client wants to see what ended it.
    const bool in_text = e.finish != schedule::finish_reason::stop || request.include_stop;
    if (request.num_logprobs >= 0)
      c.logprobs.add(e.token,
                     in_text && !(request.skip_special_tokens && tokenizer->is_special(token)));
    if (in_text)
      add_text(c, c.stream.push(token));
    if (was_reasoning || c.stream.in_reasoning()) // what opens or closes it counts
      ++c.num_reasoning_tokens;
  }

  /// Ends a choice if the event, or the text that it led to, says so.
  step settle(choice& c, const schedule::token_event& e) {
    using schedule::finish_reason;
    const bool has_all_calls = c.parser && c.parser->ended();
    if (!c.stream.stopped() && e.finish != finish_reason::none)
      add_text(c, c.stream.finish());
    if (has_all_calls) {
      c.finish = "stop";
    } else if (c.stream.stopped()) {
      c.finish = "stop";
      append_json_string(c.stop_reason, c.stream.matched_stop());
    } else if (e.finish == finish_reason::stop) {
      c.finish = "stop";
      const auto& asked = request.stop_token_ids;
      if (std::find(asked.begin(), asked.end(), e.token.token) != asked.end())
        c.stop_reason = std::to_string(e.token.token);
    } else if (e.finish == finish_reason::length) {
      c.finish = "length";
    } else if (e.finish == finish_reason::cancelled) {
      c.finish = "abort";
    }
    if (!c.finish.empty()) {
      ++num_ended;
      if (c.parser)
        add_calls(c, c.parser->finish());
      if (c.parser && c.parser->num_calls() > 0 && c.finish == "stop")
        c.finish = "tool_calls";
    }
    return {!c.finish.empty() && e.finish == finish_reason::none, false};
  }

  choice_content content_of(std::size_t index) {
    choice& c = choices[index];
    choice_content content;
    content.index = static_cast<std::uint32_t>(index);
    content.text = c.text;
    content.reasoning = c.reasoning;
    content.calls = c.calls;
    content.call_prefix = c.call_prefix;
    content.logprobs = request.num_logprobs >= 0 ? &c.logprobs : nullptr;
    content.finish_reason = c.finish;
    content.stop_reason = c.stop_reason;
    content.with_token_ids = request.return_token_ids;
    content.token_ids = c.token_ids;
    content.with_prompt_ids = request.return_token_ids && !request.chat && !c.sent;
    content.prompt_ids = prompt_of(index).tokens;
    return content;
  }

  void open_frame(std::string& out) const { out.append("data: ").append(head); }

  void close_frame(std::string& out) const {
    out.append(request.include_usage ? "],\"usage\":null}\n\n" : "]}\n\n");
  }

  /// Sends what a choice has gathered, if it is worth a chunk.
  void send(std::size_t index, std::string& out) {
    choice& c = choices[index];
    if (c.text.empty() && c.reasoning.empty() && c.calls.empty() && c.finish.empty()
        && c.logprobs.empty() && c.token_ids.empty())
      return;
    open_frame(out);
    append_choice(out, request.chat ? choice_shape::chat_delta : choice_shape::text,
                  content_of(index));
    out += '}';
    close_frame(out);
    c.sent = true;
    c.text.clear();
    c.reasoning.clear();
    c.calls.clear();
    c.token_ids.clear();
  }

  void close(std::string& out) const {
    if (request.include_usage) {
      open_frame(out);
      out += "],";
      append_usage(out);
      out += "}\n\n";
    }
    out += "data: [DONE]\n\n";
  }

  void append_prompt_scores(std::string& out, std::size_t index) const {
    out += R"(,"prompt_logprobs":)";
    append_prompt_logprobs(out, prompt_of(index).tokens, choices[index].scored,
                           request.num_prompt_logprobs, namer);
  }

  /// The whole answer as one object.
  void append_body(std::string& out) {
    const bool scores = request.num_prompt_logprobs >= 0;
    out += head;
    for (std::size_t i = 0; i < choices.size(); ++i) {
      if (i > 0)
        out += ',';
      append_choice(out, request.chat ? choice_shape::chat_message : choice_shape::text,
                    content_of(i));
      if (scores && !request.chat)
        append_prompt_scores(out, i);
      out += '}';
    }
    out += "],";
    append_usage(out);
    if (scores && request.chat)
      append_prompt_scores(out, 0);
    if (request.return_token_ids && request.chat) {
      out += R"(,"prompt_token_ids":)";
      append_ids(out, request.prompts.front().tokens);
    }
    out += '}';
  }
};

response_builder::response_builder(completion_request r, const model::tokenizer& tokenizer,
                                   answer_identity id)
  : state_(std::make_unique<state>(std::move(r), tokenizer, std::move(id))) {
  const completion_request& kept = state_->request;
  const bool scores = kept.num_prompt_logprobs >= 0 || (kept.echo && kept.num_logprobs >= 0);
  for (std::size_t i = 0; scores && i < state_->choices.size(); ++i) {
    schedule::output_token unknown;
    unknown.token = -1;
    state_->choices[i].scored.assign(state_->prompt_of(i).tokens.size(), unknown);
  }
}

response_builder::~response_builder() = default;
response_builder::response_builder(response_builder&&) noexcept = default;
response_builder& response_builder::operator=(response_builder&&) noexcept = default;

void response_builder::open(std::string& out) {
  state& s = *state_;
  if (!s.request.stream || !s.request.chat)
    return;
  for (std::size_t i = 0; i < s.choices.size(); ++i) {
    s.open_frame(out);
    choice_content content;
    content.index = static_cast<std::uint32_t>(i);
    content.with_role = true;
    append_choice(out, choice_shape::chat_delta, content);
    out += '}';
    if (s.request.return_token_ids && i == 0) {
      out += R"(],"prompt_token_ids":)";
      append_ids(out, s.request.prompts.front().tokens);
      out += s.request.include_usage ? ",\"usage\":null}\n\n" : "}\n\n";
    } else {
      s.close_frame(out);
    }
  }
}

response_builder::step response_builder::on_event(const schedule::token_event& e,
                                                  std::string& out) {
  state& s = *state_;
  const std::uint64_t index = e.request - s.id.first_id; // wraps for ids below: ignored
  if (s.done() || index >= s.choices.size() || !s.choices[index].finish.empty())
    return {false, s.done()};
  choice& c = s.choices[index];
  if (e.is_prompt) {
    s.keep_score(c, e.token_index, e);
    return {};
  }
  if (e.finish == schedule::finish_reason::failed) {
    fail(troupe::fail(error_code::unavailable, "the request was given up while it was being served",
                      "send it again")
           .value(),
         out);
    return {false, true};
  }
  if (!c.begun)
    s.begin(index);
  step result;
  if (s.request.score_only) {
    // Its one token exists only because the scheduler gives no fewer.
    c.finish = e.finish == schedule::finish_reason::cancelled ? "abort" : "length";
    ++s.num_ended;
    result.cancel = e.finish == schedule::finish_reason::none;
  } else {
    if (e.has_token)
      s.add_token(c, e);
    result = s.settle(c, e);
  }
  if (s.request.stream)
    s.send(index, out);
  result.done = s.done();
  if (result.done && s.request.stream)
    s.close(out);
  else if (result.done)
    s.append_body(out);
  return result;
}

void response_builder::fail(const error& e, std::string& out) {
  state& s = *state_;
  if (s.done())
    return;
  s.failed = true;
  if (s.request.stream)
    out.append("data: ").append(error_response(e).body).append("\n\ndata: [DONE]\n\n");
}

void response_builder::write_so_far(std::string& out) {
  for (std::size_t i = 0; i < state_->choices.size(); ++i)
    if (!state_->choices[i].begun)
      state_->begin(i);
  state_->append_body(out);
}

bool response_builder::done() const {
  return state_->done();
}

bool response_builder::ended(std::uint32_t choice) const {
  return state_->failed
         || (choice < state_->choices.size() && !state_->choices[choice].finish.empty());
}

token_usage response_builder::usage() const {
  return state_->usage();
}

const completion_request& response_builder::request() const {
  return state_->request;
}

} // namespace troupe::http
