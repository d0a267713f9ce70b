// A library that answers like NVML, with known values: what tests open in place of the driver's.
// Written from the API reference and not from src/telemetry/nvml_api.hpp, which it is to check.
//
// FAKE_NVML in the environment makes it another machine:
//   no-driver   the library is there, the driver is not
//   mute        every reading is "not supported"
//   stuck       a reading never returns; it writes a byte to the descriptor FAKE_NVML_FD first
// Built with FAKE_NVML_LACKING, it has the functions of an old library only.

#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <strings.h>
#include <unistd.h>

extern "C" {

struct nvmlDevice_st {
  unsigned index;
  const char* name;
  const char* uuid;
  const char* bus_id;
  const char* old_bus_id;
};
using nvmlDevice_t = nvmlDevice_st*;

enum {
  NVML_SUCCESS = 0,
  NVML_ERROR_INVALID_ARGUMENT = 2,
  NVML_ERROR_NOT_SUPPORTED = 3,
  NVML_ERROR_NOT_FOUND = 6,
  NVML_ERROR_INSUFFICIENT_SIZE = 7,
  NVML_ERROR_DRIVER_NOT_LOADED = 9,
};

struct nvmlUtilization_t {
  unsigned int gpu;
  unsigned int memory;
};

struct nvmlMemory_t {
  unsigned long long total;
  unsigned long long free;
  unsigned long long used;
};

union nvmlValue_t {
  double dVal;
  unsigned int uiVal;
  unsigned long ulVal;
  unsigned long long ullVal;
};

struct nvmlFieldValue_t {
  unsigned int fieldId;
  unsigned int scopeId;
  long long timestamp;
  long long latencyUsec;
  int valueType;
  int nvmlReturn;
  nvmlValue_t value;
};

static nvmlDevice_st fake_gpus[] = {
  {0, "NVIDIA H100 80GB HBM3", "GPU-aa110000-1111-2222-3333-444455556666", "00000000:1B:00.0",
   "0000:1B:00.0"},
  {1, "NVIDIA H100 80GB HBM3", "GPU-ab220000-1111-2222-3333-444455556666", "00000000:43:00.0",
   "0000:43:00.0"},
  {2, "NVIDIA H100 80GB HBM3", "GPU-c3330000-1111-2222-3333-444455556666", "00000000:52:00.0",
   "0000:52:00.0"},
};
constexpr unsigned num_fake_gpus = 3;

static bool machine_is(const char* what) {
  const char* machine = std::getenv("FAKE_NVML");
  return machine != nullptr && std::strcmp(machine, what) == 0;
}

/// What a reading answers before it looks at its arguments.
static int mood() {
  return machine_is("mute") ? NVML_ERROR_NOT_SUPPORTED : NVML_SUCCESS;
}

int nvmlInit_v2() {
  return machine_is("no-driver") ? NVML_ERROR_DRIVER_NOT_LOADED : NVML_SUCCESS;
}

int nvmlShutdown() {
  return NVML_SUCCESS;
}

const char* nvmlErrorString(int result) {
  return result == NVML_ERROR_DRIVER_NOT_LOADED ? "Driver Not Loaded" : "Some Error";
}

int nvmlDeviceGetCount_v2(unsigned int* count) {
  *count = num_fake_gpus;
  return NVML_SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvmlDevice_t* device) {
  if (index >= num_fake_gpus)
    return NVML_ERROR_INVALID_ARGUMENT;
  *device = &fake_gpus[index];
  return NVML_SUCCESS;
}

int nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t* memory) {
  if (machine_is("stuck")) {
    const char* fd = std::getenv("FAKE_NVML_FD");
    if (::write(std::atoi(fd), "x", 1) != 1)
      std::abort();
    for (;;)
      ::pause();
  }
  if (const int refused = mood())
    return refused;
  constexpr unsigned long long gib = 1ULL << 30;
  *memory = {80 * gib, (60 - device->index) * gib, (20 + device->index) * gib};
  return NVML_SUCCESS;
}

#ifndef FAKE_NVML_LACKING

static int put(const char* text, char* to, unsigned int length) {
  if (std::strlen(text) >= length)
    return NVML_ERROR_INSUFFICIENT_SIZE;
  std::strcpy(to, text);
  return NVML_SUCCESS;
}

int nvmlDeviceGetHandleByPciBusId_v2(const char* bus_id, nvmlDevice_t* device) {
  for (auto& gpu : fake_gpus)
    if (::strcasecmp(gpu.bus_id, bus_id) == 0 || ::strcasecmp(gpu.old_bus_id, bus_id) == 0) {
      *device = &gpu;
      return NVML_SUCCESS;
    }
  return NVML_ERROR_NOT_FOUND;
}

int nvmlDeviceGetName(nvmlDevice_t device, char* name, unsigned int length) {
  return put(device->name, name, length);
}

int nvmlDeviceGetUUID(nvmlDevice_t device, char* uuid, unsigned int length) {
  return put(device->uuid, uuid, length);
}

int nvmlDeviceGetUtilizationRates(nvmlDevice_t device, nvmlUtilization_t* utilization) {
  if (const int refused = mood())
    return refused;
  *utilization = {87 + device->index, 31 + device->index};
  return NVML_SUCCESS;
}

int nvmlDeviceGetTemperature(nvmlDevice_t device, int sensor, unsigned int* temperature) {
  if (const int refused = mood())
    return refused;
  if (sensor != 0)
    return NVML_ERROR_INVALID_ARGUMENT;
  *temperature = 54 + device->index;
  return NVML_SUCCESS;
}

int nvmlDeviceGetClockInfo(nvmlDevice_t device, int type, unsigned int* clock) {
  if (const int refused = mood())
    return refused;
  constexpr unsigned clocks[] = {1001, 1980, 2619, 1545}; // graphics, SM, memory, video; MHz
  if (type < 0 || type > 3)
    return NVML_ERROR_INVALID_ARGUMENT;
  *clock = clocks[type] + device->index;
  return NVML_SUCCESS;
}

int nvmlDeviceGetPowerUsage(nvmlDevice_t device, unsigned int* power) {
  if (const int refused = mood())
    return refused;
  *power = 412'500 + device->index; // mW
  return NVML_SUCCESS;
}

int nvmlDeviceGetTotalEccErrors(nvmlDevice_t device, int error_type, int counter_type,
                                unsigned long long* count) {
  if (const int refused = mood())
    return refused;
  // Corrected or not, since the driver was loaded (0) or ever (1).
  *count = (error_type == 0 ? 30 : 40) + (counter_type == 0 ? 0 : 1000) + device->index;
  return NVML_SUCCESS;
}

/// Links 0 to 3 are up, 4 and 5 are down, others do not exist.
int nvmlDeviceGetNvLinkState(nvmlDevice_t, unsigned int link, int* is_active) {
  if (const int refused = mood())
    return refused;
  if (link >= 6)
    return NVML_ERROR_INVALID_ARGUMENT;
  *is_active = link < 4 ? 1 : 0;
  return NVML_SUCCESS;
}

/// Replay 10 + link, recovery 20 + link, flits 30 + link; data is not counted.
int nvmlDeviceGetNvLinkErrorCounter(nvmlDevice_t, unsigned int link, int counter,
                                    unsigned long long* count) {
  if (const int refused = mood())
    return refused;
  if (link >= 4)
    return NVML_ERROR_INVALID_ARGUMENT;
  if (counter < 0 || counter > 2)
    return NVML_ERROR_NOT_SUPPORTED;
  *count = 10 * (counter + 1U) + link;
  return NVML_SUCCESS;
}

/// Only sums over all links, in KiB; of the last GPU only what was received.
int nvmlDeviceGetFieldValues(nvmlDevice_t device, int count, nvmlFieldValue_t* values) {
  if (const int refused = mood())
    return refused;
  for (int i = 0; i < count; ++i) {
    auto& field = values[i];
    field.nvmlReturn = NVML_ERROR_NOT_SUPPORTED;
    if (field.scopeId != UINT_MAX)
      continue;
    if (field.fieldId == 138 && device->index < 2) {
      field.nvmlReturn = NVML_SUCCESS;
      field.valueType = 3; // unsigned long long
      field.value.ullVal = (1ULL << 33) + device->index;
    } else if (field.fieldId == 139) {
      field.nvmlReturn = NVML_SUCCESS;
      field.valueType = 1; // unsigned int
      field.value.ullVal = ~0ULL;
      field.value.uiVal = 5 + device->index;
    }
  }
  return NVML_SUCCESS;
}

#endif
}
