#pragma once

#include "troupe/base/error.hpp"

#include <optional>
#include <string>

namespace troupe::http {

/// Why a request is not served: an error that also knows which field of the body is at fault.
struct refusal : error {
  std::string param;  ///< the field, "messages[2].role"; empty if it is none
  std::string reason; ///< OpenAI's word for programs, "model_not_found"; empty if there is none

  /// An error without a field.
  refusal(error e) : error(std::move(e)) {}
  refusal(error e, std::string param_name, std::string reason_word = {})
    : error(std::move(e)), param(std::move(param_name)), reason(std::move(reason_word)) {}
};

template <class T>
using answered = tl::expected<T, refusal>;

/// Refuses a request for the sake of `param`: the message reads "param: what". Pure.
tl::unexpected<refusal> refuse(error_code code, const std::string& param, const std::string& what,
                               std::string reason = {});

/// An HTTP answer that says what went wrong.
struct error_reply {
  int status = 500;
  std::optional<int> retry_after_s; ///< the Retry-After header, with 503
  std::string body;                 ///< JSON, OpenAI's error object
};

/// Status and body of an error: 400, 404, 413, 503 (with Retry-After), 504, or 500 for what is
/// our own fault. The body is {"error": {"message", "type", "param", "code", "troupe":
/// {"code", "cause", "cure", "origin"}}}, where "code" is a word or null. Pure.
error_reply error_response(const error& e);
error_reply error_response(const refusal& r);

} // namespace troupe::http
