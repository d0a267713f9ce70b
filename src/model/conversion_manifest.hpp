#pragma once

#include "troupe/base/error.hpp"
#include "troupe/model/conversion_plan.hpp"
#include "troupe/model/quantize.hpp"
#include "troupe/model/shard_file.hpp"

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace troupe::model {

/// What quantizing did to one tensor.
struct tensor_loss {
  std::string tensor;
  rounding_loss loss;
};

/// A file of a converted model that is done.
struct finished_shard {
  std::string file;
  std::int32_t stage = 0;
  std::int32_t expert_group = -1; ///< as in planned_shard
  file_seal seal;
  std::vector<std::string> tensors;
  std::vector<tensor_loss> losses; ///< of the quantized ones
};

/// `troupe-manifest.json` of a converted model: of what it was made, how, and which files it has,
/// with their checksums. It is written anew whenever a file is done, and so tells the next
/// conversion where to go on.
struct conversion_manifest {
  std::string source;      ///< its directory, for people
  std::string fingerprint; ///< of the source: see fingerprint_of
  integer_format format;
  shard_layout layout;
  bool is_complete = false;
  std::vector<finished_shard> shards;                   ///< in the plan's order
  std::vector<std::pair<std::string, file_seal>> files; ///< all others, when complete

  static constexpr const char* file_name = "troupe-manifest.json";

  std::string to_text() const;

  /// Errors: invalid_model naming `file` and what is wrong.
  static expected<conversion_manifest> parse(std::string_view text, const std::string& file);

  /// Nothing if `directory` has none. Errors: as parse; io_failed.
  static expected<std::optional<conversion_manifest>> load(const std::filesystem::path& directory);
};

/// Tells sources apart without reading all of them: a checksum over config.json, the index and,
/// for each file of weights, its name, size, header and a few samples of its data.
/// Errors: io_failed; invalid_model for a file that is missing.
expected<std::string> fingerprint_of(const std::filesystem::path& source);

/// "int4, groups of 128", for people.
std::string describe(const integer_format& format);

} // namespace troupe::model
