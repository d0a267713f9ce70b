#pragma once

#include "troupe/http/openai_error.hpp"
#include "troupe/http/openai_request.hpp"
#include "troupe/schedule/types.hpp"

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

namespace troupe::model {
class tokenizer;
}

namespace troupe::http {

/// What names an answer.
struct answer_identity {
  std::string id;                    ///< without "chatcmpl-" or "cmpl-", unique
  std::string model;                 ///< the served name
  std::int64_t created_s = 0;        ///< Unix time
  schedule::request_id first_id = 0; ///< scheduler's id of choice 0, see to_schedule
};

/// Tokens counted over all choices.
struct token_usage {
  std::uint64_t prompt_tokens = 0;
  std::uint64_t completion_tokens = 0;
  std::uint64_t reasoning_tokens = 0; ///< those among the completion's up to and with </think>
};

/// Turns the events of one HTTP request's choices into its answer: frames of server-sent
/// events, or one JSON body. Whatever is to be sent is appended to `out`, so nothing more
/// is needed than to write it. Not thread-safe: it belongs to whoever feeds it.
class response_builder {
public:
  /// What the caller has to do after an event.
  struct step {
    bool cancel = false; ///< a stop string was found: cancel this event's request
    bool done = false;   ///< the answer is complete
  };

  /// `tokenizer` must outlive the builder.
  response_builder(completion_request r, const model::tokenizer& tokenizer, answer_identity id);
  ~response_builder();
  response_builder(response_builder&&) noexcept;
  response_builder& operator=(response_builder&&) noexcept;

  /// Of a stream: what can be sent before the first token. Call once, first.
  void open(std::string& out);

  /// Takes an event of one of the choices, any order between choices. Events of choices that have
  /// ended, or that are not of this request, are ignored. A `failed` event ends the
  /// answer as `fail` does; callers that know why call `fail` instead.
  step on_event(const schedule::token_event& e, std::string& out);

  /// Gives up all choices. Of a stream: appends an error event and the end mark. Otherwise
  /// appends nothing: the caller sends error_response. Without effect once done.
  void fail(const error& e, std::string& out);

  /// Of an answer that is not streamed: appends all of it as far as it has come; choices that go
  /// on have null as their finish_reason. Call once at most, and no other member after it.
  void write_so_far(std::string& out);

  bool done() const;
  /// True once `choice` needs no more events.
  bool ended(std::uint32_t choice) const;
  token_usage usage() const;
  const completion_request& request() const;

private:
  struct state;
  std::unique_ptr<state> state_;
};

} // namespace troupe::http
