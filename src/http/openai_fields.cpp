#include "troupe/http/openai_fields.hpp"

#include "troupe/http/openai_json.hpp"
#include "troupe/model/json_shape.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace troupe::http {

namespace {

/// At most `most` bytes of `text` as valid UTF-8.
std::string shortened(std::string_view text, std::size_t most) {
  std::string out;
  append_valid_utf8(out, text.substr(0, most));
  if (text.size() > most)
    out += "...";
  return out;
}

/// nlohmann's text behind its "[json.exception...] " tag, cut to a readable length.
std::string reason_of(const json::exception& e) {
  std::string_view text = e.what();
  if (const auto tag = text.find("] "); tag != std::string_view::npos)
    text.remove_prefix(tag + 2);
  return shortened(text, 200);
}

} // namespace

answered<json> parse_json_object(std::string_view body) {
  if (body.empty())
    return fail(error_code::invalid_request, "the body is empty, a JSON object is expected");
  const auto shape = model::shape_of_json(body);
  if (shape.depth > model::max_json_depth)
    return fail(error_code::invalid_request,
                fmt::format("the body is nested {} levels deep, at most {} are allowed",
                            shape.depth, model::max_json_depth));
  if (shape.most_members > model::max_json_members)
    return fail(error_code::invalid_request,
                fmt::format("the body has an object of {} members, at most {} are allowed",
                            shape.most_members, model::max_json_members));
  try {
    json value = json::parse(body);
    if (!value.is_object())
      return fail(error_code::invalid_request,
                  fmt::format("the body is {}, a JSON object is expected", show(value)));
    return value;
  } catch (const json::exception& e) {
    return fail(error_code::invalid_request, "the body is not JSON: " + reason_of(e));
  }
}

std::string show(const json& value) {
  if (value.is_object())
    return "an object";
  if (value.is_array())
    return fmt::format("a list of {}", value.size());
  constexpr std::size_t most = 60;
  if (value.is_string())
    return fmt::format("\"{}\"", shortened(value.get_ref<const std::string&>(), most));
  return shortened(value.dump(), most);
}

std::optional<std::int64_t> as_integer(const json& value) {
  if (value.is_number_unsigned()) {
    const auto n = value.get<std::uint64_t>();
    if (n > static_cast<std::uint64_t>(INT64_MAX))
      return std::nullopt;
    return static_cast<std::int64_t>(n);
  }
  if (value.is_number_integer())
    return value.get<std::int64_t>();
  if (value.is_number_float()) {
    const double n = value.get<double>();
    constexpr double exact = 9007199254740992.0; // 2^53
    if (std::abs(n) <= exact && n == std::trunc(n))
      return static_cast<std::int64_t>(n);
  }
  return std::nullopt;
}

std::optional<std::string> read_token_ids(const json& list, std::int32_t vocab_size,
                                          std::vector<std::int32_t>& out) {
  out.clear();
  out.reserve(list.size());
  for (std::size_t i = 0; i < list.size(); ++i) {
    const auto id = as_integer(list[i]);
    if (!id && !list[i].is_number())
      return fmt::format("element {} is {}, not a token id", i, show(list[i]));
    if (!id || *id < 0 || *id >= vocab_size)
      return fmt::format("token id {} at index {} is out of range (allowed: 0 to {})",
                         show(list[i]), i, vocab_size - 1);
    out.push_back(static_cast<std::int32_t>(*id));
  }
  return std::nullopt;
}

const json* field_reader::find(const char* name) const {
  const auto found = object_.find(name);
  return found == object_.end() || found->is_null() ? nullptr : &*found;
}

void field_reader::note(refusal r) {
  if (!first_)
    first_ = std::move(r);
}

void field_reader::refuse_field(const std::string& name, const std::string& what, error_code code,
                                std::string reason) {
  note(refuse(code, prefix_ + name, what, std::move(reason)).value());
}

bool field_reader::boolean(const char* name, bool fallback) {
  const json* value = find(name);
  if (!value)
    return fallback;
  if (value->is_boolean())
    return value->get<bool>();
  refuse_field(name, show(*value) + " is not true or false");
  return fallback;
}

std::optional<std::int64_t> field_reader::integer(const char* name, std::int64_t min,
                                                  std::int64_t max) {
  const json* value = find(name);
  if (!value)
    return std::nullopt;
  const auto n = as_integer(*value);
  if (n && *n >= min && *n <= max)
    return n;
  refuse_field(name, fmt::format("{} is not {} (allowed: {} to {})", show(*value),
                                 n || value->is_number() ? "in range" : "an integer", min, max));
  return std::nullopt;
}

std::optional<double> field_reader::number(const char* name, double min, double max,
                                           bool above_min) {
  const json* value = find(name);
  if (!value)
    return std::nullopt;
  if (value->is_number()) {
    const double n = value->get<double>();
    if (n <= max && (above_min ? n > min : n >= min))
      return n;
  }
  refuse_field(name, fmt::format("{} is not {} (allowed: {}{} to {})", show(*value),
                                 value->is_number() ? "in range" : "a number",
                                 above_min ? "above " : "", min, max));
  return std::nullopt;
}

std::optional<std::string> field_reader::text(const char* name) {
  const json* value = find(name);
  if (!value)
    return std::nullopt;
  if (value->is_string())
    return value->get<std::string>();
  refuse_field(name, show(*value) + " is not a string");
  return std::nullopt;
}

std::vector<std::int32_t> field_reader::token_ids(const char* name, std::int32_t vocab_size) {
  std::vector<std::int32_t> ids;
  const json* value = find(name);
  if (!value)
    return ids;
  if (!value->is_array())
    refuse_field(name, show(*value) + " is not a list of token ids");
  else if (const auto fault = read_token_ids(*value, vocab_size, ids))
    refuse_field(name, *fault);
  return ids;
}

} // namespace troupe::http
