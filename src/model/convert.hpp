#pragma once

#include "troupe/base/error.hpp"
#include "troupe/model/conversion_manifest.hpp"
#include "troupe/model/conversion_plan.hpp"
#include "troupe/model/quantize.hpp"

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace troupe::model {

struct conversion_options {
  std::filesystem::path source; ///< a Hugging Face directory in BF16, FP16, FP32 or FP8
  std::filesystem::path target; ///< made if it is not there
  integer_format format;
  shard_layout layout;
  int num_threads = 1;
};

/// How far a conversion is. Bytes are those of tensors in the target.
struct conversion_progress {
  std::string file; ///< the shard
  std::size_t shard = 0;
  std::size_t num_shards = 0;
  std::uint64_t bytes_done = 0;
  std::uint64_t bytes_total = 0;
  bool is_checking = false;   ///< reads what an earlier run wrote
  bool is_shard_done = false; ///< the shard has its name and stands in the manifest
};

using conversion_watcher = std::function<void(const conversion_progress&)>;

struct conversion_result {
  conversion_plan plan;
  conversion_manifest manifest;
  std::size_t num_reused = 0;          ///< shards of an earlier run
  std::vector<std::string> done_again; ///< shards of an earlier run that were missing or damaged
};

/// Quantizes a checkpoint: writes shards by stage and expert group (conversion_plan.hpp), then
/// index, tokenizer and config.json, so that a directory that has a config.json is whole; and a
/// manifest.
///
/// Shards are written one after the other, tensors of a shard in parallel; a thread holds one
/// tensor at a time. The bytes written do not depend on the number of threads. A conversion that
/// was interrupted goes on when it is started again: shards that the manifest lists and whose
/// checksum holds stay as they are, all others are written. Only one process may convert into a
/// directory.
///
/// `watch` is told of every tensor and shard, on the calling thread.
/// Errors: invalid_model for a source that is damaged or quantized already, a value that is not
/// finite, and a target that holds something else; invalid_config as plan_conversion; io_failed.
expected<conversion_result> convert(const conversion_options& options,
                                    const conversion_watcher& watch);

/// The kind of a tensor, for summaries: "mlp.experts.*.up_proj".
std::string kind_of(const std::string& tensor);

} // namespace troupe::model
