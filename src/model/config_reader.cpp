#include "troupe/model/config_reader.hpp"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <system_error>

#include <fmt/format.h>

namespace troupe::model {

namespace {

/// The value as it may stand in an error: short, and printable whatever bytes it holds.
std::string shown(const nlohmann::json& value) {
  using json = nlohmann::json;
  if (value.is_array() || value.is_object())
    return value.is_array() ? "a list" : "an object";
  auto result = value.dump(-1, ' ', true, json::error_handler_t::replace);
  if (result.size() > 60)
    result = result.substr(0, 57) + "...";
  return result;
}

} // namespace

expected<std::string> read_text_file(const std::filesystem::path& file, std::uint64_t max_bytes) {
  std::error_code status;
  const auto kind = std::filesystem::status(file, status).type();
  if (kind == std::filesystem::file_type::not_found)
    return fail(error_code::invalid_model, fmt::format("{} does not exist", file.string()),
                "give a Hugging Face model directory that holds it");
  if (kind != std::filesystem::file_type::regular)
    return fail(status ? error_code::io_failed : error_code::invalid_model,
                fmt::format("{} cannot be read: {}", file.string(),
                            status ? status.message() : "it is not a regular file"));
  const auto size = std::filesystem::file_size(file, status);
  if (status)
    return fail(error_code::io_failed,
                fmt::format("{} cannot be read: {}", file.string(), status.message()));
  if (size > max_bytes)
    return fail(error_code::invalid_model,
                fmt::format("{} has {} bytes, more than the {} that make sense", file.string(),
                            size, max_bytes));
  std::ifstream in(file, std::ios::binary);
  std::string text(size, '\0');
  errno = 0;
  if (!in || !in.read(text.data(), static_cast<std::streamsize>(size)))
    return fail(error_code::io_failed,
                fmt::format("{} cannot be read: {}", file.string(),
                            errno != 0 ? std::strerror(errno) : "it ended early"));
  return text;
}

expected<nlohmann::json> parse_json_object(std::string_view text, const std::string& file) {
  try {
    auto value = nlohmann::json::parse(text.begin(), text.end());
    if (!value.is_object())
      return fail(error_code::invalid_model,
                  fmt::format("{}: the top level is not an object", file),
                  "the file must hold one JSON object");
    return value;
  } catch (const nlohmann::json::exception& reason) {
    return fail(error_code::invalid_model,
                fmt::format("{} is not valid JSON: {}", file, reason.what()),
                "copy the file again from its source");
  }
}

config_reader::config_reader(std::string file, const nlohmann::json& object, std::string prefix)
  : file_(std::move(file)), object_(&object), prefix_(std::move(prefix)) {}

const nlohmann::json* config_reader::find(const char* key) const {
  const auto found = object_->find(key);
  return found == object_->end() || found->is_null() ? nullptr : &*found;
}

bool config_reader::has(const char* key) const {
  return find(key) != nullptr;
}

const nlohmann::json* config_reader::require(const char* key, const char* wanted) {
  const auto* value = find(key);
  if (value == nullptr)
    refuse(key, "is missing", fmt::format("give {}", wanted));
  return value;
}

void config_reader::refuse(const char* key, const std::string& what, std::string cure) {
  if (state_)
    state_ = fail(error_code::invalid_model,
                  fmt::format("{}: key \"{}{}\" {}", file_, prefix_, key, what), std::move(cure));
}

std::int32_t config_reader::to_integer(const char* key, const nlohmann::json& value,
                                       std::int32_t min, std::int32_t max) {
  const auto cure = fmt::format("give an integer from {} to {}", min, max);
  // A huge unsigned value would wrap when read as signed.
  const bool fits = value.is_number_unsigned()
                      ? value.get<std::uint64_t>() <= static_cast<std::uint64_t>(INT64_MAX)
                      : value.is_number_integer();
  if (!fits || value.get<std::int64_t>() < min || value.get<std::int64_t>() > max) {
    refuse(key, fmt::format("is {}", shown(value)), cure);
    return min;
  }
  return static_cast<std::int32_t>(value.get<std::int64_t>());
}

std::int32_t config_reader::integer(const char* key, std::int32_t min, std::int32_t max) {
  const auto* value = require(key, fmt::format("an integer from {} to {}", min, max).c_str());
  return value == nullptr ? min : to_integer(key, *value, min, max);
}

std::int32_t config_reader::integer_or(const char* key, std::int32_t min, std::int32_t max,
                                       std::int32_t otherwise) {
  return has(key) ? integer(key, min, max) : otherwise;
}

double config_reader::number(const char* key, double min, double max) {
  const auto wanted = fmt::format("a number from {} to {}", min, max);
  const auto* value = require(key, wanted.c_str());
  if (value == nullptr)
    return min;
  // Written so that a NaN is refused as well.
  if (!value->is_number() || !(value->get<double>() >= min && value->get<double>() <= max)) {
    refuse(key, fmt::format("is {}", shown(*value)), "give " + wanted);
    return min;
  }
  return value->get<double>();
}

double config_reader::number_or(const char* key, double min, double max, double otherwise) {
  return has(key) ? number(key, min, max) : otherwise;
}

bool config_reader::boolean_or(const char* key, bool otherwise) {
  const auto* value = find(key);
  if (value == nullptr)
    return otherwise;
  if (!value->is_boolean()) {
    refuse(key, fmt::format("is {}", shown(*value)), "give true or false");
    return otherwise;
  }
  return value->get<bool>();
}

std::string config_reader::text(const char* key) {
  const auto* value = require(key, "a string");
  if (value == nullptr)
    return {};
  if (!value->is_string()) {
    refuse(key, fmt::format("is {}", shown(*value)), "give a string");
    return {};
  }
  return value->get<std::string>();
}

std::string config_reader::text_or(const char* key, std::string otherwise) {
  return has(key) ? text(key) : otherwise;
}

std::vector<std::int32_t> config_reader::integers(const char* key, std::int32_t min,
                                                  std::int32_t max) {
  std::vector<std::int32_t> result;
  const auto* value = require(key, "an integer or a list of integers");
  if (value == nullptr)
    return result;
  if (!value->is_array())
    return {to_integer(key, *value, min, max)};
  for (const auto& entry : *value)
    result.push_back(to_integer(key, entry, min, max));
  return result;
}

const nlohmann::json& config_reader::object(const char* key) {
  static const nlohmann::json empty = nlohmann::json::object();
  const auto* value = require(key, "an object");
  if (value == nullptr)
    return empty;
  if (!value->is_object()) {
    refuse(key, fmt::format("is {}", shown(*value)), "give an object");
    return empty;
  }
  return *value;
}

expected<void> config_reader::finish() const {
  return state_;
}

} // namespace troupe::model
