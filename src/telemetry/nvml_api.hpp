#pragma once

#include <cstdint>

/// The few declarations of NVML that are used, written down here so that nothing has to be
/// installed to build. Source: NVIDIA's NVML API reference (docs.nvidia.com/deploy/nvml-api).
/// Functions are known by the name of their symbol, version included; their layouts are part of
/// NVML's promise to keep old programs working.
namespace troupe::telemetry::nvml_api {

using device = struct nvmlDevice_st*;
using result = int; ///< nvmlReturn_t

inline constexpr result success = 0;
inline constexpr result not_supported = 3;

/// The size of every buffer for a name or a UUID (NVML_DEVICE_NAME_V2_BUFFER_SIZE).
inline constexpr unsigned text_size = 96;

/// The most links that a GPU has (NVML_NVLINK_MAX_LINKS).
inline constexpr unsigned max_links = 18;

/// nvmlUtilization_t, in percent
struct utilization {
  unsigned gpu;
  unsigned memory;
};

/// nvmlMemory_t, in bytes
struct memory {
  unsigned long long total;
  unsigned long long free;
  unsigned long long used;
};

enum temperature_sensor : int { temperature_gpu = 0 };                  // nvmlTemperatureSensors_t
enum clock_type : int { clock_sm = 1, clock_memory = 2 };               // nvmlClockType_t
enum memory_error : int { error_corrected = 0, error_uncorrected = 1 }; // nvmlMemoryErrorType_t
enum ecc_counter : int { since_driver_load = 0 };                       // NVML_VOLATILE_ECC

/// nvmlNvLinkErrorCounter_t
enum link_error : int { link_replay = 0, link_recovery = 1, link_crc_flit = 2, link_crc_data = 3 };

/// Fields of nvmlDeviceGetFieldValues, in KiB: NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX and _RX.
enum field : unsigned { field_link_sent = 138, field_link_received = 139 };

/// As the scope of such a field: summed over all links.
inline constexpr unsigned all_links = ~0U;

/// nvmlValueType_t
enum value_type : int {
  value_double = 0,
  value_unsigned_int = 1,
  value_unsigned_long = 2,
  value_unsigned_long_long = 3,
  value_signed_long_long = 4,
  value_signed_int = 5,
  value_unsigned_short = 6,
};

/// nvmlFieldValue_t
struct field_value {
  unsigned field_id;
  unsigned scope_id;
  long long timestamp;
  long long latency_us;
  int type;
  result status; ///< the value counts only if this is `success`
  union {
    double as_double;
    int as_int;
    unsigned as_unsigned;
    unsigned long as_unsigned_long;
    unsigned long long as_unsigned_long_long;
    long long as_long_long;
    unsigned short as_unsigned_short;
  } value;
};
static_assert(sizeof(field_value) == 40);

/// Null: this library has no such function.
struct functions {
  result (*nvmlInit_v2)() = nullptr;
  result (*nvmlShutdown)() = nullptr;
  const char* (*nvmlErrorString)(result) = nullptr;
  result (*nvmlDeviceGetCount_v2)(unsigned*) = nullptr;
  result (*nvmlDeviceGetHandleByIndex_v2)(unsigned, device*) = nullptr;
  result (*nvmlDeviceGetHandleByPciBusId_v2)(const char*, device*) = nullptr;
  result (*nvmlDeviceGetName)(device, char*, unsigned) = nullptr;
  result (*nvmlDeviceGetUUID)(device, char*, unsigned) = nullptr;
  result (*nvmlDeviceGetUtilizationRates)(device, utilization*) = nullptr;
  result (*nvmlDeviceGetMemoryInfo)(device, memory*) = nullptr;
  result (*nvmlDeviceGetTemperature)(device, int, unsigned*) = nullptr;
  result (*nvmlDeviceGetClockInfo)(device, int, unsigned*) = nullptr;
  result (*nvmlDeviceGetPowerUsage)(device, unsigned*) = nullptr;
  result (*nvmlDeviceGetTotalEccErrors)(device, int, int, unsigned long long*) = nullptr;
  result (*nvmlDeviceGetNvLinkState)(device, unsigned, int*) = nullptr;
  result (*nvmlDeviceGetNvLinkErrorCounter)(device, unsigned, int, unsigned long long*) = nullptr;
  result (*nvmlDeviceGetFieldValues)(device, int, field_value*) = nullptr;
};

} // namespace troupe::telemetry::nvml_api
