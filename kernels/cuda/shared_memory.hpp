#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

/// Memory of a GPU that several processes of a host share, by CUDA's inter-process handles (CUDA
/// programming guide, "Interprocess Communication"). The process that made it owns it: it lives as
/// long as that process, whatever happens to those that map it. This header needs no CUDA toolkit;
/// the functions exist where TROUPE_HAS_CUDA is defined.
namespace troupe::kernels::cuda {

/// Memory of this process and the handle by which others map it.
struct exported_memory {
  std::shared_ptr<void> memory; ///< null: there is not that much
  std::string handle;           ///< a cudaIpcMemHandle_t
};

/// New memory, zeroed. `error` says why there is none.
exported_memory export_memory(std::int32_t device, std::size_t bytes, std::string& error);

/// Maps another process's memory; unmapped with the last copy of the pointer. Null where that
/// fails, with the cause in `error`.
std::shared_ptr<void> import_memory(std::int32_t device, const std::string& handle,
                                    std::string& error);

/// Where weights are kept that outlive the process which placed them. The sequence of `place` calls
/// is the same in every process that loads the same part of a model, so a successor finds each
/// weight where its predecessor has left it and copies nothing.
class weight_memory {
public:
  virtual ~weight_memory() = default;

  /// The index-th piece; the same bytes for the same index in every process. Null: there is not
  /// that much.
  virtual std::shared_ptr<void> piece(std::size_t index, std::size_t bytes) = 0;

  /// A predecessor has placed everything.
  virtual bool is_filled() const = 0;
};

} // namespace troupe::kernels::cuda
