#pragma once

#include <optional>
#include <string>

#include "troupe/kernels/cuda/nccl_api.hpp"

namespace troupe::kernels::cuda {

inline constexpr const char* kNcclLibrary = "libnccl.so.2";

/// Opens NCCL, which stays open as long as the process lives: its threads do. Nothing where it is
/// missing, or older than what is needed, with the cause in `error`.
std::optional<nccl_api::functions> open_nccl(const std::string& library, std::string& error);

} // namespace troupe::kernels::cuda
