#include "troupe/http/openai_error.hpp"

#include "troupe/http/openai_json.hpp"

namespace troupe::http {

namespace {

struct http_class {
  int status;
  std::string_view type;
  bool try_again;
};

http_class classify(error_code code) {
  switch (code) {
  case error_code::invalid_request: return {400, "invalid_request_error", false};
  case error_code::not_found: return {404, "not_found_error", false};
  case error_code::too_large: return {413, "invalid_request_error", false};
  case error_code::overloaded:
  case error_code::unavailable:
  case error_code::resource_exhausted:
  case error_code::peer_lost:
  case error_code::stale_epoch: return {503, "service_unavailable_error", true};
  case error_code::deadline_exceeded: return {504, "timeout_error", false};
  case error_code::cancelled: return {499, "cancelled_error", false};
  case error_code::none:
  case error_code::io_failed:
  case error_code::internal:
  case error_code::invalid_config:
  case error_code::invalid_model: break;
  }
  return {500, "internal_server_error", false};
}

constexpr int kRetryAfterSeconds = 1;

void append_or_null(std::string& out, std::string_view text) {
  if (text.empty())
    out += "null";
  else
    append_json_string(out, text);
}

} // namespace

tl::unexpected<refusal> refuse(error_code code, const std::string& param, const std::string& what,
                               std::string reason) {
  return tl::unexpected<refusal>(
    refusal{fail(code, param + ": " + what).value(), param, std::move(reason)});
}

error_reply error_response(const refusal& r) {
  const http_class kind = classify(r.code);
  error_reply reply;
  // A prompt that is too long is a bad request to OpenAI's clients; 413 is for bodies.
  reply.status = r.code == error_code::too_large && !r.param.empty() ? 400 : kind.status;
  if (kind.try_again)
    reply.retry_after_s = kRetryAfterSeconds;
  std::string& out = reply.body;
  out = R"({"error":{"message":)";
  append_json_string(out, r.cure.empty() ? r.cause : r.cause + ". " + r.cure);
  out += R"(,"type":)";
  append_json_string(out, kind.type);
  out += R"(,"param":)";
  append_or_null(out, r.param);
  out += R"(,"code":)";
  append_or_null(out, r.reason);
  out += R"(,"troupe":{"code":)";
  append_json_string(out, to_string(r.code));
  out += R"(,"cause":)";
  append_json_string(out, r.cause);
  out += R"(,"cure":)";
  append_or_null(out, r.cure);
  out += R"(,"origin":)";
  append_or_null(out, r.origin);
  out += "}}}";
  return reply;
}

error_reply error_response(const error& e) {
  return error_response(refusal{e});
}

} // namespace troupe::http
