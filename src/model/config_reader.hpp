#pragma once

#include "troupe/base/error.hpp"

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

namespace troupe::model {

/// Reads a whole file of at most `max_bytes`. Errors: invalid_model when it is missing, no
/// regular file or too large; io_failed when the system cannot read it.
expected<std::string> read_text_file(const std::filesystem::path& file, std::uint64_t max_bytes);

/// Parses JSON whose top level is an object. `file` is the name put into the error.
expected<nlohmann::json> parse_json_object(std::string_view text, const std::string& file);

/// Reads typed keys of one JSON object and remembers the first thing that is wrong, so that a
/// list of keys reads as a list. A getter that fails returns an arbitrary valid value; ask
/// `finish` before using any of them. The object must outlive the reader.
class config_reader {
public:
  /// `prefix` is the path of the object within the file, "rope_scaling." or nothing.
  config_reader(std::string file, const nlohmann::json& object, std::string prefix = {});

  /// True when the key is there and not null.
  bool has(const char* key) const;

  std::int32_t integer(const char* key, std::int32_t min, std::int32_t max);
  std::int32_t integer_or(const char* key, std::int32_t min, std::int32_t max,
                          std::int32_t otherwise);
  double number(const char* key, double min, double max);
  double number_or(const char* key, double min, double max, double otherwise);
  bool boolean_or(const char* key, bool otherwise);
  std::string text(const char* key);
  std::string text_or(const char* key, std::string otherwise);

  /// An integer or a list of integers.
  std::vector<std::int32_t> integers(const char* key, std::int32_t min, std::int32_t max);

  /// A nested object; an empty one, and an error remembered, where there is none.
  const nlohmann::json& object(const char* key);

  /// Remembers an error about a key unless there is one already.
  void refuse(const char* key, const std::string& what, std::string cure);

  /// The first error, if any: invalid_model naming file and key.
  expected<void> finish() const;

private:
  const nlohmann::json* find(const char* key) const;
  const nlohmann::json* require(const char* key, const char* wanted);
  std::int32_t to_integer(const char* key, const nlohmann::json& value, std::int32_t min,
                          std::int32_t max);

  std::string file_;
  const nlohmann::json* object_;
  std::string prefix_;
  expected<void> state_;
};

} // namespace troupe::model
