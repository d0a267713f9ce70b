#pragma once

#include "troupe/base/error.hpp"
#include "troupe/telemetry/nvml_api.hpp"
#include "troupe/telemetry/visible_gpus.hpp"
#include "cluster.pb.h"

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

namespace troupe::telemetry {

/// The driver's library of readings, NVML, opened while the program runs: it comes with the driver
/// and is no dependency. It makes no CUDA context. Calls may take tens of milliseconds, the first
/// one seconds. Used by one thread.
class nvml {
public:
  static constexpr const char* usual_library = "libnvidia-ml.so.1";

  /// Fails with unavailable where there is no such library or no driver behind it.
  static expected<nvml> open(const std::string& library = usual_library);

  nvml(nvml&& other) noexcept;
  nvml& operator=(nvml&&) = delete;
  ~nvml();

  using device = nvml_api::device;

  /// All GPUs of the host, in NVML's order. One that cannot be asked has no name.
  std::vector<gpu_identity> gpus() const;

  /// Null: there is none.
  device at_index(std::size_t index) const;
  device at_bus_id(const std::string& bus_id) const; ///< "0000:1b:00.0"

  /// What the GPU tells about itself; everything but `device` of the message. Readings that the
  /// library, the driver or the GPU does not have are left out.
  proto::GpuReading read(device gpu) const;

private:
  nvml(void* library, nvml_api::functions api) : library_(library), api_(api) {}

  std::string text(decltype(nvml_api::functions::nvmlDeviceGetName) ask, device gpu) const;
  void read_links(device gpu, proto::GpuReading& to) const;

  void* library_; ///< of dlopen; null: moved from
  nvml_api::functions api_;
};

/// A field's number as an unsigned one; nullopt for one that is negative, of an unknown type or
/// not there.
std::optional<std::uint64_t> count_of(const nvml_api::field_value& field);

} // namespace troupe::telemetry
