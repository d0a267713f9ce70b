#pragma once

#include "troupe/base/error.hpp"
#include "troupe/kernels/ops.hpp"

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace troupe::model {

/// Where a file says that a tensor is; checked to lie within the file.
struct tensor_entry {
  std::string_view dtype;          ///< as written in the header, "BF16"; static storage
  std::vector<std::int64_t> shape; ///< row-major
  std::uint64_t offset = 0;        ///< bytes from the start of the file
  std::uint64_t num_bytes = 0;
};

using tensor_directory = std::unordered_map<std::string, tensor_entry>;

/// Parses the header of a safetensors file (format: huggingface/safetensors, README "Format"):
/// eight bytes of little-endian header length, a JSON object, the data without holes. `file` is
/// the whole file; only the header is read. Never trusts a number in it. Errors: invalid_model
/// naming `name` and the tensor.
expected<tensor_directory> parse_safetensors(std::span<const std::byte> file,
                                             const std::string& name);

/// A tensor in a mapped file. The memory belongs to whatever gave the view.
struct tensor_view {
  std::string_view dtype;
  std::optional<kernels::element_type> type; ///< nothing where no weight may have this dtype
  std::span<const std::int64_t> shape;
  const std::byte* data = nullptr; ///< may be unaligned: the format promises no alignment
  std::uint64_t num_bytes = 0;
};

/// One safetensors file, mapped read-only. Mapping reads the header alone; pages of tensors
/// are read when touched. Immutable, so any thread may use it.
class safetensors_file {
public:
  /// Errors: invalid_model for a missing or damaged file, io_failed for what the system refuses.
  static expected<std::shared_ptr<const safetensors_file>> open(const std::filesystem::path& path);

  ~safetensors_file();
  safetensors_file(const safetensors_file&) = delete;
  safetensors_file& operator=(const safetensors_file&) = delete;

  const std::string& name() const { return name_; }
  const tensor_directory& tensors() const { return tensors_; }

  /// A view valid as long as this object; nothing if the file has no such tensor.
  std::optional<tensor_view> find(const std::string& tensor) const;

private:
  safetensors_file(std::string name, const std::byte* data, std::size_t size);

  std::string name_;
  const std::byte* data_;
  std::size_t size_;
  tensor_directory tensors_;
};

} // namespace troupe::model
