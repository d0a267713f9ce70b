#pragma once

#include "troupe/http/openai_request.hpp"
#include "troupe/http/openai_response.hpp"
#include "troupe/schedule/request_log.hpp"

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

/// Answers made once more from what a schedule::request_log holds: for clients that ask
/// again, and for calls that go on after the frontend died. Made from the same tokens, an answer
/// is the same to the byte.
namespace troupe::http {

/// Calls of one frontend, at most; its incarnation stands above them in a call's number.
inline constexpr unsigned call_bits = 40;

/// What answers carry as the id of a call, without "chatcmpl-" or "cmpl-".
std::string answer_id(std::uint64_t call);

/// The call that an id names, with or without what stands before it; nothing if it is none.
std::optional<std::uint64_t> call_of_answer(std::string_view id);

/// Reads the body of a logged call again, with the same seed and at the same time. `stream`
/// overrides the body's.
answered<response_builder> rebuild(const schedule::logged_call& call, const serving_model& served,
                                   std::optional<bool> stream = {});

/// Gives a new builder of a call everything that it has brought, choice by choice.
void replay(const schedule::logged_call& call, response_builder& builder, std::string& out);

/// The requests of a call that have to go on, with what they have generated.
std::vector<schedule::request> requests_to_resume(const schedule::logged_call& call,
                                                  const response_builder& builder,
                                                  schedule::time_point deadline);

/// The body of GET /v1/responses/{id}: the answer as far as it has come, in the shape that it has
/// without streaming, and before all else "status": in_progress, completed, or failed (and then
/// "error").
answered<std::string> response_body(const schedule::logged_call& call, const serving_model& served);

} // namespace troupe::http
