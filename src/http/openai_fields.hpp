#pragma once

#include "troupe/http/openai_error.hpp"

#include <nlohmann/json.hpp>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace troupe::http {

/// A body as the client wrote it: objects keep the order of their keys, which templates show to
/// the model.
using json = nlohmann::ordered_json;

/// Parses a body that has to be a JSON object. Errors: invalid_request with the place of the
/// fault. Numbers that no double holds are refused by the parser. Pure.
answered<json> parse_json_object(std::string_view body);

/// A value as shown in an error: short, valid UTF-8.
std::string show(const json& value);

/// Reads the fields of one JSON object and keeps the first refusal, so that the fields can be
/// read in a row and checked once. A field that is null counts as absent, as in OpenAI's API.
/// The object must outlive the reader.
class field_reader {
public:
  explicit field_reader(const json& object, std::string prefix = {})
    : object_(object), prefix_(std::move(prefix)) {}

  /// The field's value, null if it is absent.
  const json* find(const char* name) const;

  bool boolean(const char* name, bool fallback);
  std::optional<std::int64_t> integer(const char* name, std::int64_t min, std::int64_t max);
  /// A number within [min, max], or (min, max] with `above_min`.
  std::optional<double> number(const char* name, double min, double max, bool above_min = false);
  std::optional<std::string> text(const char* name);
  /// A list of token ids below `vocab_size`.
  std::vector<std::int32_t> token_ids(const char* name, std::int32_t vocab_size);

  /// Notes that `name` is at fault, unless something was noted before.
  void refuse_field(const std::string& name, const std::string& what,
                    error_code code = error_code::invalid_request, std::string reason = {});
  void note(refusal r);

  bool failed() const { return first_.has_value(); }
  /// Only after failed().
  tl::unexpected<refusal> failure() const { return tl::unexpected<refusal>(*first_); }

private:
  const json& object_;
  std::string prefix_;
  std::optional<refusal> first_;
};

/// A JSON integer, or a number without a fraction such as 16.0, that fits 64 bits.
std::optional<std::int64_t> as_integer(const json& value);

/// Reads a list of token ids into `out`; what is wrong with it, or nothing.
std::optional<std::string> read_token_ids(const json& list, std::int32_t vocab_size,
                                          std::vector<std::int32_t>& out);

} // namespace troupe::http
