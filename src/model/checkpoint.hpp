#pragma once

#include "troupe/base/error.hpp"
#include "troupe/model/safetensors.hpp"
#include "troupe/model/tensor_source.hpp"

#include <filesystem>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace troupe::model {

/// The tensors of a Hugging Face directory: `model.safetensors`, or shards named by
/// `model.safetensors.index.json`. A shard is mapped when the first of its tensors is asked
/// for, so a process maps only what it uses; nothing is copied. Any thread may use it.
class checkpoint final : public tensor_source {
public:
  /// Reads the index, or the header of the single file. Errors: invalid_model naming the file
  /// and key; io_failed.
  static expected<std::shared_ptr<checkpoint>> open(const std::filesystem::path& directory);

  const std::filesystem::path& directory() const { return directory_; }

  /// True if the index (or the single file's header) has the tensor.
  bool contains(const std::string& tensor) const override;

  /// A view valid as long as this object. Errors: invalid_model naming the tensor and the file
  /// for a missing tensor, a missing shard, a damaged shard, or a shard that lacks the tensor.
  expected<tensor_view> tensor(const std::string& name) override;

  /// The names of all tensors, sorted.
  std::vector<std::string> tensor_names() const;

  /// The file that holds a tensor, for errors; the directory if none does.
  std::string file_of(const std::string& tensor) const override;

  std::size_t num_open_shards() const;

private:
  struct shard {
    std::string name;
    std::shared_ptr<const safetensors_file> file; ///< null until used
  };

  explicit checkpoint(std::filesystem::path directory);

  expected<void> read_index(const std::filesystem::path& file);
  expected<void> read_single(const std::filesystem::path& file);

  std::filesystem::path directory_;
  std::string index_file_; ///< what lists the tensors
  std::unordered_map<std::string, std::size_t> shard_of_;
  mutable std::mutex mutex_; ///< guards shard::file
  std::vector<shard> shards_;
};

} // namespace troupe::model
